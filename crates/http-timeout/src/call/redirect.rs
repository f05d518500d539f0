//! Where a redirect leads, and what of the request goes there.
//!
//! Invariant: what was left out of a request because it crossed to another origin never comes back, wherever the next
//! redirect leads.

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
    header::{
        AUTHORIZATION, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LENGTH, CONTENT_LOCATION, CONTENT_TYPE, COOKIE,
        HOST, LOCATION, PROXY_AUTHORIZATION, REFERER, TRANSFER_ENCODING, WWW_AUTHENTICATE,
    },
};
use reqwest::Request;
use url::Url;

/// Headers of a body, which go with it.
const OF_THE_BODY: [HeaderName; 6] =
    [CONTENT_TYPE, CONTENT_LENGTH, CONTENT_ENCODING, CONTENT_LANGUAGE, CONTENT_LOCATION, TRANSFER_ENCODING];

/// What no other origin may be told. `host` is no secret, but names the wrong one there.
const SECRETS: [HeaderName; 5] = [AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION, WWW_AUTHENTICATE, HOST];

/// The same, of names that no standard knows.
const MORE_SECRETS: [&str; 3] = ["cookie2", "x-api-key", "private-token"];

/// How a client follows redirects.
#[derive(Clone, Debug)]
pub(crate) struct Redirects {
    /// The most of one attempt; with zero, a redirect is a response as any other.
    pub(crate) most: u32,
    /// What another origin is not told, beside what is marked as sensitive.
    pub(crate) sensitive: Vec<HeaderName>,
    /// Those of them that reqwest adds by itself to each request, so that leaving them out does not help.
    pub(crate) added: Vec<HeaderName>,
    pub(crate) referer: bool,
}

/// A redirect that is not followed: where it leads, and why.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) to: Url,
    pub(crate) problem: &'static str,
}

impl Default for Redirects {
    fn default() -> Self {
        let more = MORE_SECRETS.map(HeaderName::from_static);
        Self { most: 10, sensitive: SECRETS.into_iter().chain(more).collect(), added: Vec::new(), referer: true }
    }
}

impl Redirects {
    /// Takes from what reqwest shows of `client` how it adds headers, because it does not tell otherwise.
    pub(crate) fn observe(&mut self, client: &reqwest::Client) {
        let shown = format!("{client:?}");
        self.referer = shown.contains("referer: true");
        let Some((_, headers)) = shown.split_once("default_headers: {") else { return };
        // As in `{"accept": "*/*", "authorization": Sensitive}`. A name that is found by mistake costs an empty header.
        let marked = headers.match_indices(": Sensitive");
        let marked = marked.filter_map(|(at, _)| headers[..at].rsplit('"').nth(1)?.parse::<HeaderName>().ok());
        self.sensitive.extend(marked);
        let is_added = |name: &&HeaderName| headers.contains(&format!("\"{name}\": "));
        self.added = self.sensitive.iter().filter(is_added).cloned().collect();
    }

    /// The request that follows `request`, which had this answer after so many redirects; `None` if the answer leads
    /// nowhere. `body_is_gone` if the body of `request` was a stream and was sent.
    pub(crate) fn next(
        &self,
        request: &Request,
        body_is_gone: bool,
        (status, headers): (StatusCode, &HeaderMap),
        followed: u32,
    ) -> Option<Result<Request, Refused>> {
        let to = target(request.url(), status, headers).filter(|_| self.most > 0)?;
        let refused = |to: Url, problem| Some(Err(Refused { to, problem }));
        if followed >= self.most {
            return refused(to, "there were too many before it");
        }
        if !matches!(to.scheme(), "http" | "https") {
            return refused(to, "it leads to a scheme that is neither http nor https");
        }
        let method = method_after(status, request.method());
        let with_body = method.is_none();
        if with_body && body_is_gone {
            return refused(to, "it asks for the body again, which was a stream and cannot be sent twice");
        }
        let mut next = request.try_clone()?;
        if let Some(method) = method {
            *next.method_mut() = method;
            *next.body_mut() = None;
            OF_THE_BODY.iter().for_each(|name| drop(next.headers_mut().remove(name)));
        }
        let crosses = to.origin() != request.url().origin();
        if crosses {
            self.forget_secrets(next.headers_mut());
        }
        self.set_referer(next.headers_mut(), request.url(), &to, crosses);
        *next.url_mut() = to;
        Some(Ok(next))
    }

    fn forget_secrets(&self, headers: &mut HeaderMap) {
        let marked = headers.iter().filter(|(_, value)| value.is_sensitive()).map(|(name, _)| name.clone());
        let names: Vec<HeaderName> = marked.chain(self.sensitive.iter().cloned()).collect();
        names.iter().for_each(|name| drop(headers.remove(name)));
        // reqwest adds its own only where there is none.
        self.added.iter().for_each(|name| drop(headers.insert(name, HeaderValue::from_static(""))));
    }

    fn set_referer(&self, headers: &mut HeaderMap, from: &Url, to: &Url, crosses: bool) {
        if !self.referer {
            return;
        }
        headers.remove(REFERER);
        if from.scheme() == "https" && to.scheme() == "http" {
            return;
        }
        let mut referer = without_credentials(from.clone());
        referer.set_fragment(None);
        if crosses {
            // A query may hold a token.
            referer.set_query(None);
        }
        if let Ok(referer) = HeaderValue::try_from(referer.as_str()) {
            headers.insert(REFERER, referer);
        }
    }
}

/// Where the answer leads; `None` if it is no redirect or names no place.
fn target(from: &Url, status: StatusCode, headers: &HeaderMap) -> Option<Url> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return None;
    }
    let location = std::str::from_utf8(headers.get(LOCATION)?.as_bytes()).ok()?;
    // Credentials in a location are not the caller's.
    from.join(location).ok().map(without_credentials)
}

/// The method that such an answer changes `method` to, without the body; `None` if both stay.
fn method_after(status: StatusCode, method: &Method) -> Option<Method> {
    match status {
        StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND if *method == Method::POST => Some(Method::GET),
        StatusCode::SEE_OTHER if *method == Method::HEAD => Some(Method::HEAD),
        StatusCode::SEE_OTHER => Some(Method::GET),
        _ => None,
    }
}

fn without_credentials(mut url: Url) -> Url {
    // Both setters refuse only URLs that cannot have credentials.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}
