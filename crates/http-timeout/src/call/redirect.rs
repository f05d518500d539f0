//! Where a redirect leads, and which parts of the request go there.
//!
//! Invariant: a header that was left out because a request crossed to another origin never comes back, wherever the
//! next redirect leads.

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

/// Headers that no other origin may get. `host` is no secret, but would name the wrong host there.
const SECRETS: [HeaderName; 5] = [AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION, WWW_AUTHENTICATE, HOST];

/// The same, with non-standard names.
const MORE_SECRETS: [&str; 3] = ["cookie2", "x-api-key", "private-token"];

/// How a client follows redirects.
#[derive(Clone, Debug)]
pub(crate) struct Redirects {
    /// The most redirects of one attempt; with zero, a redirect is a response like any other.
    pub(crate) most: u32,
    /// Headers that another origin does not get, besides those marked as sensitive.
    pub(crate) sensitive: Vec<HeaderName>,
    /// Those that reqwest adds to each request by itself, so that leaving them out does not help.
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
    /// Reads from the debug output of `client` which headers it adds, because reqwest does not show that otherwise.
    pub(crate) fn observe(&mut self, client: &reqwest::Client) {
        let shown = format!("{client:?}");
        self.referer = shown.contains("referer: true");
        let Some((_, headers)) = shown.split_once("default_headers: {") else { return };
        // As in `{"accept": "*/*", "authorization": Sensitive}`. A name found by mistake only costs an empty header.
        let marked = headers.match_indices(": Sensitive");
        let marked = marked.filter_map(|(at, _)| headers[..at].rsplit('"').nth(1)?.parse::<HeaderName>().ok());
        self.sensitive.extend(marked);
        let is_added = |name: &&HeaderName| headers.contains(&format!("\"{name}\": "));
        self.added = self.sensitive.iter().filter(is_added).cloned().collect();
    }

    /// The request that follows `request`, which got this answer after `followed` redirects; `None` if the answer leads
    /// nowhere. `body_is_gone` says that the body of `request` was a stream and was sent.
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
        // reqwest adds its own value only if there is none.
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
    // Credentials in a location do not come from the caller.
    from.join(location).ok().map(without_credentials)
}

/// The method to which such an answer changes `method`, dropping the body; `None` if both stay.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn request(url: &str) -> Request {
        Request::new(Method::GET, url.parse().expect("a URL"))
    }

    /// The headers of the request that follows `from` to `to`.
    fn followed(rules: &Redirects, request: &Request, to: &str) -> Request {
        let headers = HeaderMap::from_iter([(LOCATION, HeaderValue::try_from(to).expect("a header"))]);
        let next = rules.next(request, false, (StatusCode::FOUND, &headers), 0);
        next.expect("a redirect").expect("one that may be followed")
    }

    #[test]
    fn a_referer_is_told_less_to_others_and_nothing_in_the_clear() {
        for (from, to, referer) in [
            ("https://a.test/x?q=1#f", "https://a.test/y", Some("https://a.test/x?q=1")),
            ("https://me:pw@a.test/x?q=1", "/y", Some("https://a.test/x?q=1")),
            ("https://a.test/x?q=1", "https://b.test/", Some("https://a.test/x")),
            ("https://a.test/x?q=1", "https://a.test:444/", Some("https://a.test/x")),
            ("http://a.test/x?q=1", "https://a.test/", Some("http://a.test/x")),
            ("https://a.test/x?q=1", "http://a.test/", None),
        ] {
            let next = followed(&Redirects::default(), &request(from), to);
            let told = next.headers().get(REFERER).map(|value| value.to_str().expect("ASCII"));
            assert_eq!(told, referer, "{from} to {to}");
        }
    }

    #[test]
    fn a_step_down_to_http_crosses_origins_and_forgets_the_last_referer() {
        let mut request = request("https://a.test/");
        request.headers_mut().insert(AUTHORIZATION, HeaderValue::from_static("secret"));
        request.headers_mut().insert(REFERER, HeaderValue::from_static("https://before.test/"));
        let next = followed(&Redirects::default(), &request, "http://a.test/");
        assert!(next.headers().is_empty(), "{:?}", next.headers());
    }

    #[test]
    fn credentials_in_a_location_are_not_sent() {
        let next = followed(&Redirects::default(), &request("http://a.test/"), "http://me:pw@a.test/x#part");
        assert_eq!(next.url().as_str(), "http://a.test/x#part");
    }

    #[test]
    fn what_reqwest_shows_of_its_headers_is_understood() {
        let mut marked = HeaderValue::from_static("secret");
        marked.set_sensitive(true);
        let headers = HeaderMap::from_iter([
            (AUTHORIZATION, HeaderValue::from_static("secret")),
            (HeaderName::from_static("x-marked"), marked),
            (HeaderName::from_static("x-open"), HeaderValue::from_static("\"x-api-key\" : Sensitive")),
        ]);
        let client = reqwest::Client::builder().default_headers(headers).build().expect("a client");
        let mut rules = Redirects::default();
        rules.observe(&client);
        assert!(rules.referer);
        let mut added: Vec<_> = rules.added.iter().map(HeaderName::as_str).collect();
        added.sort_unstable();
        assert_eq!(added, ["authorization", "x-marked"]);
        let next = followed(&rules, &request("http://a.test/"), "http://b.test/");
        assert_eq!(next.headers()[AUTHORIZATION], "");
        let silent = reqwest::Client::builder().referer(false).build().expect("a client");
        rules.observe(&silent);
        assert!(!rules.referer);
    }
}
