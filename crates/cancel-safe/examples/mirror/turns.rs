//! Scheduling: hands out the URLs of the list, host by host in turn, and reads them from the disk as they are needed.
//!
//! Invariant: a host that is down, or at its limit, holds up no other; only a bounded number of its URLs waits in
//! memory.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{FutureExt, Stream};
use tokio::time::Sleep;

use super::hosts::Hosts;
use super::list::List;
use super::report::host_of;

/// How soon to check again whether any host may have more.
const PAUSE: Duration = Duration::from_millis(50);

/// A URL whose turn it is: its slot, and itself.
pub(crate) type Turn = (u32, String);

/// The stream of all URLs of a list that need fetching.
pub(crate) struct Turns {
    list: Arc<List>,
    hosts: Arc<Hosts>,
    /// Whether URLs whose file is there are included.
    refresh: bool,
    /// The next URL of each host that has any left.
    queue: VecDeque<Next>,
    left: usize,
    pause: Option<Pin<Box<Sleep>>>,
}

struct Next {
    slot: u32,
    /// Its URL, once it was looked up.
    url: Option<String>,
}

impl Turns {
    /// Creates the stream over `list`, with `left` URLs to come.
    pub(crate) fn new(list: Arc<List>, hosts: Arc<Hosts>, refresh: bool, left: usize) -> Self {
        let queue = list.firsts().map(|slot| Next { slot, url: None }).collect();
        Self { list, hosts, refresh, queue, left, pause: None }
    }

    /// The next URL of a host, if it may have one now; the host goes to the end of the queue.
    fn take(&mut self, mut next: Next) -> Option<Turn> {
        while self.list.is_complete(next.slot) && !self.refresh {
            next = Next { slot: self.list.next(next.slot)?, url: None };
        }
        // A line that cannot be read is told when it is fetched.
        let url = next.url.take().unwrap_or_else(|| self.list.line(next.slot).unwrap_or_default().url);
        if !self.hosts.may_begin(host_of(&url)) {
            self.queue.push_back(Next { slot: next.slot, url: Some(url) });
            return None;
        }
        if let Some(slot) = self.list.next(next.slot) {
            self.queue.push_back(Next { slot, url: None });
        }
        Some((next.slot, url))
    }
}

impl Stream for Turns {
    type Item = Turn;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Turn>> {
        loop {
            for _ in 0..self.queue.len() {
                let Some(next) = self.queue.pop_front() else { break };
                if let Some(turn) = self.take(next) {
                    self.left = self.left.saturating_sub(1);
                    self.pause = None;
                    return Poll::Ready(Some(turn));
                }
            }
            if self.queue.is_empty() {
                self.left = 0;
                return Poll::Ready(None);
            }
            let pause = self.pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(PAUSE)));
            if pause.poll_unpin(cx).is_pending() {
                return Poll::Pending;
            }
            self.pause = None;
        }
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, (self.left == 0).then_some(0))
    }
}
