//! What a client reports to its breakers about its calls: bodies, streams, keys and classes.

use std::time::Duration;

use cancel_safe_http_timeout::{
    BreakerConfig, CircuitBreaker, Class, RequestError, State, TimeoutClient, TimeoutClientBuilder,
};
use tokio::time::timeout;

use crate::server::{Server, drip, reply, with_header};

const LONG: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_millis(60);

fn client(change: impl FnOnce(TimeoutClientBuilder) -> TimeoutClientBuilder) -> TimeoutClient {
    let config = BreakerConfig::builder().open_for(Duration::from_millis(20), Duration::from_millis(20));
    change(TimeoutClient::builder().timeout(LONG).breaker(config.build().unwrap())).build().unwrap()
}

/// Answers by the path: `/stalls`, `/flows`, `/events` (quiet ones), `/hangs`, or with the status in the path.
fn server() -> Server {
    Server::start(|request, _| async move {
        match request.uri().path().rsplit('/').next() {
            Some("stalls") => drip(1, 1, LONG),
            Some("flows") => drip(100_000, 1_000, Duration::from_millis(1)),
            Some("events") => with_header(drip(1, 1, LONG), "content-type", "Text/Event-Stream; charset=utf-8"),
            Some("hangs") => {
                tokio::time::sleep(LONG).await;
                reply(200, "")
            }
            status => reply(status.and_then(|status| status.parse().ok()).unwrap_or(404), "answer"),
        }
    })
}

fn breaker(client: &TimeoutClient, server: &Server) -> CircuitBreaker {
    client.breaker(server.url("/")).unwrap()
}

/// One call that is cut when its caller has waited long enough, for the head or for a piece of the body.
async fn cut(request: cancel_safe_http_timeout::RequestBuilder) -> Result<(), RequestError> {
    if let Ok(response) = timeout(PATIENCE, request.send()).await {
        drop(timeout(PATIENCE, response?.chunk()).await);
    }
    Ok(())
}

#[tokio::test]
async fn bodies_that_stall_are_silence_as_heads_that_do_not_come_are() {
    for path in ["/stalls", "/hangs"] {
        let (client, server) = (client(|b| b), server());
        // An occasional head finishes nothing.
        let mut calls = 0;
        while breaker(&client, &server).state() == State::Closed {
            assert!(calls < 100, "{path}: {calls} calls of {PATIENCE:?} were cut, and it is closed");
            cut(client.get(server.url(path))).await.unwrap();
            drop(client.get(server.url("/flows")).send().await);
            calls += 1;
        }
        let metrics = breaker(&client, &server).metrics();
        assert_eq!((metrics.failures, metrics.cancelled), (0, calls));
    }
}

#[tokio::test]
async fn a_body_that_flows_may_be_dropped_at_any_time() {
    let (client, server) = (client(|b| b), server());
    for pieces in 0..30 {
        let mut response = client.get(server.url("/flows")).send().await.unwrap();
        for _ in 0..pieces % 4 {
            assert!(response.chunk().await.unwrap().is_some());
        }
    }
    let metrics = breaker(&client, &server).metrics();
    assert_eq!((metrics.state, metrics.calls, metrics.failures, metrics.cancelled), (State::Closed, 30, 0, 0));
}

#[tokio::test]
async fn streams_are_neutral_however_long_they_are_quiet() {
    let (client, server) = (client(|b| b), server());
    for _ in 0..20 {
        cut(client.get(server.url("/events"))).await.unwrap();
        cut(client.get(server.url("/stalls")).streaming()).await.unwrap();
        cut(client.get(server.url("/hangs")).streaming()).await.unwrap();
    }
    let metrics = breaker(&client, &server).metrics();
    assert_eq!((metrics.state, metrics.calls, metrics.failures), (State::Closed, 0, 0));
}

#[tokio::test]
async fn the_head_of_a_stream_is_a_good_probe() {
    let (client, server) = (client(|b| b), server());
    let trip = async || {
        while breaker(&client, &server).state() == State::Closed {
            client.get(server.url("/500")).send().await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    trip().await;
    let events = client.get(server.url("/events")).send().await.unwrap();
    assert_eq!(breaker(&client, &server).state(), State::Closed, "with its body still open");
    drop(events);
    trip().await;
    let feed = client.get(server.url("/stalls")).streaming().send().await.unwrap();
    assert_eq!(breaker(&client, &server).state(), State::Closed);
    drop(feed);
}

#[tokio::test]
async fn a_key_of_its_own_keeps_routes_apart() {
    let route = |request: &reqwest::Request| request.url().path().split('/').nth(1).unwrap_or_default().to_owned();
    let (client, server) = (client(|b| b.breaker_key(route)), server());
    for _ in 0..5 {
        client.get(server.url("/search/500")).send().await.unwrap();
    }
    let refused = client.get(server.url("/search/200")).send().await.unwrap_err();
    assert!(matches!(&refused, RequestError::CircuitOpen { origin, .. } if origin == "search"), "{refused}");
    assert_eq!(client.get(server.url("/orders/200")).send().await.unwrap().status(), 200);
    assert_eq!(client.open_origins(), ["search"]);
    assert_eq!(client.trips(), [("search".to_owned(), 1)]);
    client.breaker(server.url("/search/")).unwrap().reset();
    assert_eq!(client.get(server.url("/search/200")).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_class_of_its_own_decides_what_an_answer_says() {
    let classify = |response: &reqwest::Response| match response.status().as_u16() {
        404 => Class::Failure,
        429 => Class::Ignore,
        _ => Class::Success,
    };
    let (client, server) = (client(|b| b.classify(classify)), server());
    for path in ["/500", "/429"] {
        for _ in 0..30 {
            client.get(server.url(path)).send().await.unwrap().text().await.unwrap();
        }
    }
    let metrics = breaker(&client, &server).metrics();
    assert_eq!((metrics.state, metrics.calls, metrics.failures), (State::Closed, 30, 0));
    for _ in 0..5 {
        client.get(server.url("/404")).send().await.unwrap();
    }
    assert_eq!(breaker(&client, &server).state(), State::Open);
}

#[test]
fn a_key_or_a_class_without_a_breaker_is_an_error() {
    let keyed = TimeoutClient::builder().breaker_key(|_| String::new()).build();
    assert_eq!(keyed.unwrap_err().option(), Some("breaker_key"));
    let classified = TimeoutClient::builder().classify(|_| Class::Success).build();
    assert_eq!(classified.unwrap_err().option(), Some("classify"));
}

#[tokio::test]
async fn an_answer_that_get_with_timeout_turns_into_an_error_is_an_answer() {
    let server = Server::start(|_, _| async { reply(404, vec![b'x'; 1_000_000]) });
    let client = client(|builder| builder);
    for _ in 0..10 {
        let error = client.get_with_timeout(server.url("/"), None).await.unwrap_err();
        assert_eq!(error.status().map(|status| status.as_u16()), Some(404));
    }
    let metrics = breaker(&client, &server).metrics();
    assert_eq!((metrics.calls, metrics.failures, metrics.cancelled), (10, 0, 0), "{metrics:?}");
    assert_eq!(client.metrics().in_flight, 0);
}
