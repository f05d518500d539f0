//! When a call is tried again, how often, and when it must not be.

use std::{
    io::Read as _,
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use cancel_safe_http_timeout::{Attempts, Retry, TimeoutClient};
use futures_util::{StreamExt as _, future::join_all};

use crate::server::{Server, refused_url, reply, with_header};

fn quick(retries: u32) -> Retry {
    Retry::attempts(retries + 1).backoff(Duration::from_millis(1), Duration::from_millis(2))
}

fn client(retry: Retry) -> TimeoutClient {
    TimeoutClient::builder().timeout(Duration::from_secs(20)).retry(retry).build().unwrap()
}

/// A server that reads a request, and hangs up without an answer.
fn hangs_up() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let hits = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&hits);
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let read = socket.and_then(|mut socket| socket.read(&mut [0; 4096]));
            if read.is_ok_and(|bytes| bytes > 0) {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        }
    });
    (url, hits)
}

#[tokio::test]
async fn an_idempotent_call_is_tried_again_and_its_attempts_are_told() {
    let server = Server::start(|_, hit| async move { reply(if hit < 2 { 503 } else { 200 }, "body") });
    let response = client(quick(3)).get(server.url("/")).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.extensions().get()), (200, Some(&Attempts(3))));
}

#[tokio::test]
async fn the_last_response_is_returned_as_it_is() {
    let server = Server::start(|_, hit| async move { reply(503, format!("try {hit}")) });
    let response = client(quick(2)).get(server.url("/")).send().await.unwrap();
    assert_eq!((response.status().as_u16(), response.text().await.unwrap().as_str()), (503, "try 2"));
}

#[tokio::test]
async fn a_post_reaches_a_failing_server_exactly_once() {
    let server = Server::start(|_, _| async { reply(503, "") });
    let client = client(quick(3));
    client.post(server.url("/")).body("pay").send().await.unwrap();
    assert_eq!(server.hits(), 1);
    let (url, hits) = hangs_up();
    assert!(client.post(&url).body("pay").send().await.is_err());
    assert_eq!(hits.load(Ordering::SeqCst), 1);
    // The same check catches a call that is declared idempotent: the server does not make it so.
    assert!(client.post(&url).body("pay").idempotent().send().await.is_err());
    assert_eq!(hits.load(Ordering::SeqCst), 1 + 4);
}

#[tokio::test]
async fn an_idempotency_key_allows_a_post_to_be_tried_again() {
    let server = Server::start(|_, _| async { reply(503, "") });
    client(quick(3)).post(server.url("/")).header("Idempotency-Key", "42").body("pay").send().await.unwrap();
    assert_eq!(server.hits(), 4);
}

#[tokio::test]
async fn a_post_that_provably_was_not_sent_is_tried_again() {
    let client = client(quick(3));
    let before = client.metrics().retries_left.unwrap();
    assert!(client.post(refused_url()).body("pay").send().await.unwrap_err().is_connect());
    let spent = before - client.metrics().retries_left.unwrap();
    assert_eq!(spent, 3.0);
}

#[tokio::test]
async fn a_stream_is_sent_once_because_it_cannot_be_sent_twice() {
    let server = Server::start(|_, _| async { reply(503, "") });
    let stream = futures_util::stream::iter([Ok::<_, std::io::Error>("once")]);
    let body = reqwest::Body::wrap_stream(stream);
    client(quick(3)).put(server.url("/")).body(body).send().await.unwrap();
    assert_eq!(server.hits(), 1);
}

#[tokio::test]
async fn a_dead_server_is_hit_no_more_than_the_budget_allows() {
    let server = Server::start(|_, _| async { reply(503, "") });
    let client = client(quick(3).budget(0.2).reserve(10));
    join_all((0..100).map(|_| client.get(server.url("/")).send())).await;
    let limit = 100 * 12 / 10 + 10;
    assert!(server.hits() <= limit, "{} hits for 100 calls, more than {limit}", server.hits());
    assert!(server.hits() > 105, "the budget was not used: {} hits", server.hits());
    // The check can fail: with a budget for everything there are four hits for each call.
    let before = server.hits();
    let generous = self::client(quick(3).budget(1.0).reserve(1_000));
    join_all((0..100).map(|_| generous.get(server.url("/")).send())).await;
    assert_eq!(server.hits() - before, 400);
}

#[tokio::test]
async fn a_call_ends_at_its_deadline_whatever_the_retries() {
    let server = Server::start(|request, _| async move {
        if request.uri().path() == "/hang" {
            std::future::pending::<()>().await;
        }
        reply(503, "")
    });
    let slow = Retry::attempts(51).reserve(1_000).backoff(Duration::from_millis(400), Duration::from_secs(50));
    let client = TimeoutClient::builder()
        .timeout(Duration::from_secs(2))
        .attempt_timeout(Duration::from_millis(600))
        .retry(slow)
        .build()
        .unwrap();
    for path in ["/hang", "/error"] {
        let started = Instant::now();
        let result = client.get(server.url(path)).send().await;
        assert!(result.map_or_else(|error| error.is_timeout(), |response| response.status() == 503));
        // Fifty retries would take a quarter of an hour.
        assert!(started.elapsed() < Duration::from_secs(20), "{path} took {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn retry_after_is_honoured_in_seconds_and_as_a_date() {
    // A date has whole seconds.
    let in_two_seconds = SystemTime::now() + Duration::from_secs(2);
    let date = httpdate::fmt_http_date(in_two_seconds);
    let not_before = httpdate::parse_http_date(&date).unwrap();
    let past = SystemTime::UNIX_EPOCH;
    for (value, least_millis, not_before) in [
        (date.as_str(), 0, not_before),
        ("1", 1_000, past),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, past),
        ("soon", 0, past),
    ] {
        let asked = value.to_owned();
        let server = Server::start(move |_, hit| {
            let again = with_header(reply(503, ""), "retry-after", &asked);
            async move { if hit == 0 { again } else { reply(200, "") } }
        });
        let started = Instant::now();
        let response = client(quick(1)).get(server.url("/")).send().await.unwrap();
        assert_eq!(response.extensions().get(), Some(&Attempts(2)), "{value}");
        let waited = started.elapsed();
        assert!(waited >= Duration::from_millis(least_millis), "{value}: came back after {waited:?}");
        assert!(SystemTime::now() >= not_before, "{value}: came back after {waited:?}");
    }
}

#[tokio::test]
async fn a_retry_after_above_the_cap_is_returned_at_once() {
    let seconds = |cap| quick(3).retry_after_cap(Duration::from_secs(cap));
    for (value, retry) in [
        ("31", quick(3)),
        ("99999999999999999999999999", seconds(1_000_000)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", quick(3)),
        ("1", seconds(0)),
        ("0", seconds(0)),
    ] {
        let server =
            Server::start(move |_, _| async move { with_header(reply(429, "slow down"), "retry-after", value) });
        let response = client(retry).get(server.url("/")).send().await.unwrap();
        assert_eq!(response.extensions().get(), Some(&Attempts(1)), "{value}");
        assert_eq!(response.text().await.unwrap(), "slow down", "the body is untouched");
    }
}

#[tokio::test]
async fn an_unread_error_is_drained_so_that_its_connection_serves_the_retry() {
    let server = Server::start(|_, hit| async move { reply(if hit < 5 { 500 } else { 200 }, vec![b'x'; 30_000]) });
    let response = client(quick(5)).get(server.url("/")).send().await.unwrap();
    assert_eq!(response.extensions().get(), Some(&Attempts(6)));
    assert_eq!(server.connections(), 1);
}

#[tokio::test]
async fn ordered_answers_do_not_block_an_earlier_retry() {
    // The first URL fails at first and comes back when the others have been answered and wait for it, permits in hand.
    let server = Server::start(|request, hit| async move {
        reply(if request.uri().path() == "/first" && hit < 4 { 503 } else { 200 }, "ok")
    });
    let retry = Retry::attempts(10).backoff(Duration::from_millis(20), Duration::from_millis(40)).reserve(100);
    let client = TimeoutClient::builder().concurrency(3).concurrency_per_host(2).retry(retry).build().unwrap();
    let urls = ["/first", "/b", "/c", "/d", "/e"].map(|path| server.url(path));
    let answers: Vec<_> = client
        .get_many(urls, Duration::from_secs(10))
        .ordered()
        .then(|fetched| async move { (fetched.index, fetched.result.unwrap().text().await.unwrap()) })
        .collect()
        .await;
    assert_eq!(answers.len(), 5);
}
