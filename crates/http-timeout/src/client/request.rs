//! A request in reqwest's words, until it is sent.
//!
//! Invariant: a request that was never sent holds no resources, and a mistake in it is an error of `send`.

use std::{
    fmt,
    future::{Future, ready},
    sync::Arc,
    time::Duration,
};

use futures_util::future::Either;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Version, header::Entry};
use reqwest::{Body, IntoUrl, Request, Response};
use serde::Serialize;
use url::Url;

use crate::{
    call::{DefaultHeaders, Order, Shared, send},
    error::{CallReport, Failure, Phase, RequestError, Subject, redacted, redacted_text},
};

/// Builds a request, with the methods of [`reqwest::RequestBuilder`].
///
/// A mistake, such as an invalid URL or header, shows as the error of [`send`](Self::send).
#[must_use = "a request does nothing until it is sent"]
pub struct RequestBuilder {
    client: Arc<Shared>,
    /// The request with its subject, because an invalid request does not show it.
    request: Result<(reqwest::RequestBuilder, Subject), RequestError>,
    timeout: Option<Duration>,
    idempotent: bool,
    streaming: bool,
}

impl RequestBuilder {
    pub(crate) fn new(client: Arc<Shared>, method: Method, url: impl IntoUrl) -> Self {
        let report = |url| {
            let (method, elapsed) = (Some(method.clone()), Duration::ZERO);
            Box::new(CallReport { method, url, phase: Phase::Permit, attempts: 0, elapsed })
        };
        // Parsed first, because reqwest's error does not show the invalid URL.
        let request = match (Url::parse(url.as_str()), client.reqwest()) {
            (Ok(url), Ok(reqwest)) => {
                let subject = Subject { method: method.clone(), url: url.clone() };
                Ok((reqwest.request(method, url), subject))
            }
            (Ok(url), Err(error)) => Err(RequestError::Setup(Failure { error, report: report(redacted(&url)) })),
            (Err(_), _) => {
                let shown = redacted_text(url.as_str());
                let error = url.into_url().err().map(|error| RequestError::reported(error, report(shown)));
                Err(error.expect("what cannot be parsed is no URL for reqwest either"))
            }
        };
        Self::of(client, request)
    }

    /// Continues with a request that was built elsewhere.
    pub(crate) fn from_request(client: Arc<Shared>, mut request: Request) -> Self {
        let subject = Subject { method: request.method().clone(), url: request.url().clone() };
        let timeout = request.timeout_mut().take();
        let built = match client.reqwest() {
            Ok(reqwest) => Ok((reqwest::RequestBuilder::from_parts(reqwest.clone(), request), subject)),
            Err(error) => {
                let report = subject.report(Phase::Permit, 0, Duration::ZERO);
                Err(RequestError::Setup(Failure { error, report }))
            }
        };
        let builder = Self::of(client, built);
        if timeout.is_some() { builder.timeout(timeout) } else { builder }
    }

    fn of(client: Arc<Shared>, request: Result<(reqwest::RequestBuilder, Subject), RequestError>) -> Self {
        let timeout = client.options.timeout;
        Self { client, request, timeout, idempotent: false, streaming: false }
    }

    fn map(mut self, change: impl FnOnce(reqwest::RequestBuilder) -> reqwest::RequestBuilder) -> Self {
        self.request = self.request.map(|(request, subject)| (change(request), subject));
        self
    }

    /// Adds a header.
    pub fn header<K, V>(self, key: K, value: V) -> Self
    where
        HeaderName: TryFrom<K>,
        <HeaderName as TryFrom<K>>::Error: Into<http::Error>,
        HeaderValue: TryFrom<V>,
        <HeaderValue as TryFrom<V>>::Error: Into<http::Error>,
    {
        self.map(|request| request.header(key, value))
    }

    /// Adds headers, and replaces those of the same name.
    pub fn headers(self, headers: HeaderMap) -> Self {
        self.map(|request| request.headers(headers))
    }

    /// Authenticates with a name and a password.
    pub fn basic_auth(self, username: impl fmt::Display, password: Option<impl fmt::Display>) -> Self {
        self.map(|request| request.basic_auth(username, password))
    }

    /// Authenticates with a token.
    pub fn bearer_auth(self, token: impl fmt::Display) -> Self {
        self.map(|request| request.bearer_auth(token))
    }

    /// Sets the body.
    pub fn body(self, body: impl Into<Body>) -> Self {
        self.map(|request| request.body(body))
    }

    /// Sets the body to this value as JSON.
    pub fn json<T: Serialize + ?Sized>(self, json: &T) -> Self {
        self.map(|request| request.json(json))
    }

    /// Sets the body to this value as a form.
    pub fn form<T: Serialize + ?Sized>(self, form: &T) -> Self {
        self.map(|request| request.form(form))
    }

    /// Appends to the query of the URL.
    pub fn query<T: Serialize + ?Sized>(self, query: &T) -> Self {
        self.map(|request| request.query(query))
    }

    /// Sets the body to this multipart form, which cannot be sent twice.
    #[cfg(feature = "multipart")]
    pub fn multipart(self, form: reqwest::multipart::Form) -> Self {
        self.map(|request| request.multipart(form))
    }

    /// Sets the version of HTTP.
    pub fn version(self, version: Version) -> Self {
        self.map(|request| request.version(version))
    }

    /// Sets the timeout of this call. Default: the client's; `None` for no timeout. With zero, nothing is sent.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.timeout = timeout.into();
        self
    }

    /// Declares that sending this request twice is the same as once, so the client may retry it.
    pub fn idempotent(mut self) -> Self {
        self.idempotent = true;
        self
    }

    /// Declares that the answer may be quiet for any length of time, like a long poll or a feed.
    ///
    /// The breaker then counts the call as healthy when its head is good, and looks no further. A caller that gives up
    /// says nothing about the origin, however long it had waited. A response of the type `text/event-stream` counts as
    /// a stream anyway. The timeouts are the same as for any other request.
    pub fn streaming(mut self) -> Self {
        self.streaming = true;
        self
    }

    /// Sends the request, and retries it as the client's policy says. Any status is `Ok`, as in reqwest.
    ///
    /// The call begins, and its time with it, when the returned future is first polled.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, the connection is abandoned, and permits, probe slot
    /// and unspent retry budget are back when the drop returns. It is unknown whether the server saw the request. The
    /// same holds for the response's body: dropping the response drops it.
    ///
    /// # Errors
    ///
    /// [`RequestError`] says which limit was reached, that the circuit is open, that the request is invalid, or how the
    /// network failed. A timeout while the body is read is an error of the read, and [`reqwest::Error::is_timeout`] is
    /// true for it.
    pub fn send(self) -> impl Future<Output = Result<Response, RequestError>> + Send + use<> {
        self.sent(false)
    }

    /// Sends a GET request and turns 4xx and 5xx into errors.
    pub(crate) fn send_for_success(self) -> impl Future<Output = Result<Response, RequestError>> + Send + use<> {
        self.sent(true)
    }

    fn sent(self, for_success: bool) -> impl Future<Output = Result<Response, RequestError>> + Send + use<> {
        let Self { client, request, timeout, idempotent, streaming } = self;
        let order = Order { idempotent, streaming, for_success };
        match built(request, &client.options.default_headers) {
            Ok((reqwest, request)) => Either::Left(send(client, reqwest, request, timeout, order)),
            Err(error) => Either::Right(ready(Err(error))),
        }
    }
}

impl fmt::Debug for RequestBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Neither headers nor query: they may be secret.
        let request = self.request.as_ref().map(|(_, subject)| subject);
        f.debug_struct("RequestBuilder")
            .field("request", &request)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

/// The request, if it is valid, and the client that sends it.
fn built(
    request: Result<(reqwest::RequestBuilder, Subject), RequestError>,
    default_headers: &DefaultHeaders,
) -> Result<(reqwest::Client, Request), RequestError> {
    let (request, subject) = request?;
    let (reqwest, request) = request.build_split();
    let mut request =
        request.map_err(|error| RequestError::reported(error, subject.report(Phase::Permit, 0, Duration::ZERO)))?;
    for (name, value) in &default_headers.0 {
        if let Entry::Vacant(vacant) = request.headers_mut().entry(name) {
            vacant.insert(value.clone());
        }
    }
    Ok((reqwest, request))
}
