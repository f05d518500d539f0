//! Many URLs as a stream.
//!
//! Invariant: the number of fetches never exceeds the client's limit on calls in flight, including fetches that wait to
//! be yielded in order, so an endless list of URLs takes bounded memory. A yielded response is complete and holds no
//! permit, so the stream goes on whatever the caller does with it.

use std::{
    collections::BTreeMap,
    fmt,
    future::Future,
    iter::Enumerate,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_core::Stream;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use http::Method;
use reqwest::Response;

use crate::{
    call::{Shared, read_whole},
    client::RequestBuilder,
    error::RequestError,
};

/// The result for one of many URLs.
#[derive(Debug)]
#[expect(clippy::exhaustive_structs, reason = "its three parts are all there is, and callers take it apart")]
pub struct Fetched {
    /// The position of the URL in the input, from 0.
    pub index: usize,
    /// The URL, as it was given.
    pub url: String,
    /// The response, its body in memory, or why there is none.
    pub result: Result<Response, RequestError>,
}

/// The stream of [`TimeoutClient::get_many`](crate::TimeoutClient::get_many), in the order of the answers.
#[must_use = "a stream does nothing until it is polled"]
pub struct FetchMany<I> {
    client: Arc<Shared>,
    urls: Option<Enumerate<I>>,
    timeout: Option<Duration>,
    running: FuturesUnordered<Pin<Box<dyn Future<Output = Fetched> + Send>>>,
    /// `Some` if the caller wants the order of the URLs.
    order: Option<Order>,
}

#[derive(Debug, Default)]
struct Order {
    next: usize,
    early: BTreeMap<usize, Fetched>,
}

impl<I: Iterator<Item: AsRef<str>>> FetchMany<I> {
    pub(crate) fn new(client: Arc<Shared>, urls: I, timeout: Option<Duration>) -> Self {
        Self { client, urls: Some(urls.enumerate()), timeout, running: FuturesUnordered::new(), order: None }
    }

    /// Yields in the order of the URLs. An early answer waits for its turn in memory.
    pub fn ordered(mut self) -> Self {
        self.order.get_or_insert_default();
        self
    }

    fn start_what_fits(&mut self) {
        let early = self.order.as_ref().map_or(0, |order| order.early.len());
        let limit = self.client.gate.size();
        while self.running.len() + early < limit {
            // A finished iterator is not asked again: it need not be fused.
            let Some((index, url)) = self.urls.as_mut().and_then(Iterator::next) else {
                self.urls = None;
                return;
            };
            self.start(index, url.as_ref());
        }
    }

    fn start(&mut self, index: usize, url: &str) {
        let mut request = RequestBuilder::new(Arc::clone(&self.client), Method::GET, url);
        if self.timeout.is_some() {
            request = request.timeout(self.timeout);
        }
        let (call, url) = (request.send_for_success(), url.to_owned());
        self.running.push(Box::pin(async move {
            // Whole, because a caller that collects the answers reads none before the last one has come.
            let result = match call.await {
                Ok(response) => read_whole(response).await,
                Err(error) => Err(error),
            };
            Fetched { index, url, result }
        }));
    }
}

impl<I: Iterator<Item: AsRef<str>> + Unpin> Stream for FetchMany<I> {
    type Item = Fetched;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Fetched>> {
        let this = &mut *self;
        loop {
            if let Some(order) = &mut this.order
                && let Some(fetched) = order.early.remove(&order.next)
            {
                order.next += 1;
                return Poll::Ready(Some(fetched));
            }
            this.start_what_fits();
            match (std::task::ready!(this.running.poll_next_unpin(cx)), &mut this.order) {
                (Some(fetched), Some(order)) => {
                    order.early.insert(fetched.index, fetched);
                }
                (fetched, _) => return Poll::Ready(fetched),
            }
        }
    }
}

impl<I> fmt::Debug for FetchMany<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FetchMany").field("running", &self.running.len()).finish_non_exhaustive()
    }
}
