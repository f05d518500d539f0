//! Notices the redirects that reqwest follows, because its errors do not tell at which stop a request failed.
//!
//! Invariant: a hop is noted in the same poll in which the policy runs, so it is never another request's.

use std::{
    cell::RefCell,
    future::{Future, poll_fn},
    pin::pin,
};

use reqwest::redirect::Policy;
use url::Url;

/// As many as reqwest follows by itself.
const MAX_REDIRECTS: usize = 10;

thread_local! {
    static HOP: RefCell<Option<Url>> = const { RefCell::new(None) };
}

/// Follows like reqwest's own policy, and leaves a note.
pub(crate) fn policy() -> Policy {
    Policy::custom(|attempt| {
        // The first of the previous URLs is where the request began.
        if attempt.previous().len() > MAX_REDIRECTS {
            return attempt.error("too many redirects");
        }
        HOP.set(Some(attempt.url().clone()));
        attempt.follow()
    })
}

/// Awaits `response`, and keeps in `hop` where redirects have led it so far.
pub(crate) async fn noticed<F: Future>(response: F, hop: &mut Option<Url>) -> F::Output {
    let mut response = pin!(response);
    poll_fn(|cx| {
        HOP.set(None);
        let polled = response.as_mut().poll(cx);
        if let Some(next) = HOP.take() {
            *hop = Some(next);
        }
        polled
    })
    .await
}
