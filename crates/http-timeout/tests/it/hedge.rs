//! A late answer, and the copy that overtakes it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use cancel_safe_http_timeout::{Attempts, BreakerConfig, Hedge, Retry, State, TimeoutClient, TimeoutClientBuilder};
use futures_util::{StreamExt as _, stream};
use http::Method;

use crate::server::{Server, reply};

const LONG: Duration = Duration::from_secs(60);

pub(crate) fn hedging(change: impl FnOnce(TimeoutClientBuilder) -> TimeoutClientBuilder) -> TimeoutClient {
    let builder = TimeoutClient::builder().timeout(LONG).attempt_timeout(LONG).idle_timeout(LONG);
    change(builder.hedge(Hedge::at_percentile(0.95).budget(0.05)).breaker(BreakerConfig::default())).build().unwrap()
}

/// Lets the client learn the usual time, and save up for a copy or two.
pub(crate) async fn learn(client: &TimeoutClient, url: &str) {
    for _ in 0..48 {
        client.get(url).send().await.unwrap().bytes().await.unwrap();
    }
}

#[tokio::test]
async fn answers_that_are_very_late_are_overtaken_by_copies_within_the_budget() {
    // One request in fifty takes two seconds; its copy is another request. The rest take long enough that noise does
    // not matter.
    let server = Server::start(|_, hit| async move {
        tokio::time::sleep(Duration::from_millis(if hit % 50 == 49 { 2_000 } else { 5 })).await;
        reply(200, "quick")
    });
    let client = hedging(|builder| builder);
    let (calls, mut waited) = (500, 0);
    for _ in 0..calls {
        let started = Instant::now();
        let response = client.get(server.url("/")).send().await.unwrap();
        assert_eq!(response.text().await.unwrap(), "quick");
        assert_eq!(client.metrics().in_flight, 0, "the loser's permit came back with the answer");
        waited += u32::from(started.elapsed() >= Duration::from_millis(1_900));
    }
    assert!(waited <= 3, "{waited} of 10 calls waited for an answer that was very late");
    assert!(client.metrics().hedges <= 25, "{} copies", client.metrics().hedges);
    assert!(server.hits() <= calls + 25, "{} requests for {calls} calls", server.hits());
    assert_eq!(client.breaker(server.url("/")).unwrap().state(), State::Closed);
}

#[tokio::test]
async fn where_every_answer_is_slow_no_copy_is_sent() {
    let server = Server::start(|_, _| async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        reply(200, "slow")
    });
    let client = hedging(|builder| builder);
    let calls = stream::iter(0..120).map(|_| client.get(server.url("/")).send());
    let slow = calls.buffer_unordered(20).filter(|result| std::future::ready(result.is_ok())).count().await;
    assert_eq!(slow, 120);
    // On a busy machine a request may take twice the usual time, but not as a rule.
    assert!(client.metrics().hedges <= 2, "{} copies", client.metrics().hedges);
}

#[tokio::test]
async fn a_server_that_becomes_slow_for_all_is_not_given_more_to_do() {
    let is_slow = Arc::new(AtomicBool::new(false));
    let slow = Arc::clone(&is_slow);
    let server = Server::start(move |_, _| {
        let pause = if slow.load(Ordering::SeqCst) { 300 } else { 0 };
        async move {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            reply(200, "")
        }
    });
    let client = hedging(|builder| builder);
    for _ in 0..8 {
        learn(&client, &server.url("/")).await;
    }
    let (hits, before) = (server.hits(), client.metrics().hedges);
    is_slow.store(true, Ordering::SeqCst);
    let calls = stream::iter(0..200).map(|_| client.get(server.url("/")).send());
    assert_eq!(calls.buffer_unordered(40).filter(|result| std::future::ready(result.is_ok())).count().await, 200);
    let copies = client.metrics().hedges - before;
    assert!(copies <= 10, "{copies} copies, {} requests", server.hits() - hits);
}

#[tokio::test]
async fn a_request_that_is_not_safe_is_sent_once() {
    let posts = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&posts);
    let server = Server::start(move |request, _| {
        let is_post = request.method() == Method::POST;
        seen.fetch_add(usize::from(is_post), Ordering::SeqCst);
        async move {
            tokio::time::sleep(Duration::from_millis(if is_post { 200 } else { 0 })).await;
            reply(200, "")
        }
    });
    let client = hedging(|builder| builder);
    learn(&client, &server.url("/")).await;
    let before = client.metrics().hedges;
    for _ in 0..5 {
        let response = client.post(server.url("/")).body("once").send().await.unwrap();
        assert_eq!(response.extensions().get(), Some(&Attempts(1)));
    }
    assert_eq!((posts.load(Ordering::SeqCst), client.metrics().hedges), (5, before));
}

#[test]
fn hedge_excludes_retry_and_names_what_is_wrong_with_it() {
    let both = TimeoutClient::builder().retry(Retry::attempts(2)).hedge(Hedge::at_percentile(0.9)).build();
    assert_eq!(both.unwrap_err().option(), Some("hedge"));
    for wrong in [Hedge::at_percentile(1.0), Hedge::at_percentile(f64::NAN), Hedge::at_percentile(0.9).budget(2.0)] {
        assert_eq!(TimeoutClient::builder().hedge(wrong).build().unwrap_err().option(), Some("hedge"));
    }
}

#[tokio::test]
async fn a_copy_waits_for_no_permit_and_the_first_may_still_win() {
    let server = Server::start(|_, hit| async move {
        if hit >= 48 {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        reply(200, "body")
    });
    let client = hedging(|builder| builder.concurrency_per_host(1));
    learn(&client, &server.url("/")).await;
    let response = client.get(server.url("/")).send().await.unwrap();
    assert_eq!((server.hits(), response.extensions().get()), (49, Some(&Attempts(1))));
    assert_eq!(client.metrics().in_flight, 1);
}
