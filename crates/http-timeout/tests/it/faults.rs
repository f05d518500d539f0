//! Peers that are silent, slow or gone, and callers that are wrong.

use std::{
    error::Error as _,
    time::{Duration, Instant},
};

use cancel_safe_http_timeout::{BreakerConfig, BreakerWindow, BuildError, Phase, RequestError, Retry, TimeoutClient};
use http_body_util::BodyExt as _;

use crate::server::{Server, drip, refused_url, reply};

const LONG: Duration = Duration::from_secs(20);

fn idle(millis: u64) -> TimeoutClient {
    TimeoutClient::builder().timeout(LONG).idle_timeout(Duration::from_millis(millis)).build().unwrap()
}

#[tokio::test]
async fn a_silent_peer_is_given_up_before_the_head_and_within_the_body() {
    let server = Server::start(|request, _| async move {
        if request.uri().path() == "/head" {
            std::future::pending::<()>().await;
        }
        drip(2, 10, LONG)
    });
    let client = idle(1_000);
    let started = Instant::now();
    let error = client.get(server.url("/head")).send().await.unwrap_err();
    assert!(matches!(error, RequestError::Timeout { phase: Phase::Response, attempts: 1, .. }), "{error:?}");
    let response = client.get(server.url("/body")).send().await.unwrap();
    let error = response.bytes().await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    let error = RequestError::from(error);
    assert!(matches!(error, RequestError::Timeout { phase: Phase::Body, attempts: 1, .. }), "{error:?}");
    assert!(started.elapsed() < LONG / 2);
    assert_eq!(client.metrics().in_flight, 0);
}

#[tokio::test]
async fn a_body_that_trickles_for_ever_ends_at_the_deadline() {
    let server = Server::start(|_, _| async { drip(100_000, 10, Duration::from_millis(2)) });
    let deadline = Duration::from_secs(1);
    let client = TimeoutClient::builder().timeout(deadline).build().unwrap();
    let started = Instant::now();
    let error = client.get(server.url("/")).send().await.unwrap().bytes().await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    assert!(started.elapsed() >= deadline && started.elapsed() < LONG / 2);
}

#[tokio::test]
async fn a_slow_consumer_is_not_taken_for_a_silent_peer() {
    let server = Server::start(|_, _| async { drip(4, 50_000, Duration::from_millis(10)) });
    let mut response = idle(3_000).get(server.url("/")).send().await.unwrap();
    let mut bytes = response.chunk().await.unwrap().unwrap().len();
    tokio::time::sleep(Duration::from_millis(3_500)).await;
    while let Some(chunk) = response.chunk().await.unwrap() {
        bytes += chunk.len();
    }
    assert_eq!(bytes, 200_000);
}

#[tokio::test]
async fn an_upload_that_progresses_outlives_the_idle_timeout() {
    // The server reads 32 MiB slowly: longer than the idle timeout in total, but never silent that long.
    const BYTES: u32 = 32 << 20;
    const WHOLE: Duration = Duration::from_secs(5);
    let server = Server::start(|request, _| async move {
        let (mut body, mut bytes, begun) = (request.into_body(), 0, tokio::time::Instant::now());
        while let Some(Ok(frame)) = body.frame().await {
            bytes += u32::try_from(frame.into_data().unwrap().len()).unwrap();
            tokio::time::sleep_until(begun + WHOLE.mul_f64(f64::from(bytes) / f64::from(BYTES))).await;
        }
        reply(200, bytes.to_string())
    });
    let started = Instant::now();
    let body = vec![7; BYTES as usize];
    let text = idle(3_000).put(server.url("/")).body(body).send().await.unwrap().text().await.unwrap();
    assert_eq!(text, BYTES.to_string());
    assert!(started.elapsed() > Duration::from_millis(3_000), "the upload was too quick to prove anything");
}

#[tokio::test]
async fn an_upload_that_nobody_takes_is_given_up() {
    let server = Server::start(|request, _| async move {
        let _unread = request;
        std::future::pending().await
    });
    let started = Instant::now();
    let error = idle(200).put(server.url("/")).body(vec![7; 32 << 20]).send().await.unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    assert!(started.elapsed() < LONG / 2);
}

#[tokio::test]
async fn a_slow_producer_is_not_taken_for_a_silent_peer() {
    let server = Server::start(|request, _| async move {
        reply(200, request.into_body().collect().await.unwrap().to_bytes().len().to_string())
    });
    let pieces = futures_util::stream::unfold(0, |sent| async move {
        tokio::time::sleep(Duration::from_millis(3_500)).await;
        (sent < 1).then_some((Ok::<_, std::io::Error>("piece"), sent + 1))
    });
    let request = idle(3_000).put(server.url("/")).body(reqwest::Body::wrap_stream(pieces));
    assert_eq!(request.send().await.unwrap().text().await.unwrap(), "5");
}

#[tokio::test]
async fn without_a_total_timeout_the_attempt_timeout_still_holds() {
    let server = Server::start(|_, _| std::future::pending());
    let client = TimeoutClient::builder().timeout(None).attempt_timeout(Duration::from_millis(50)).build().unwrap();
    let error = client.get(server.url("/")).send().await.unwrap_err();
    assert!(matches!(error, RequestError::Timeout { phase: Phase::Response, .. }), "{error:?}");
    let forever = TimeoutClient::new(Duration::MAX, usize::MAX);
    assert!(forever.get(refused_url()).send().await.unwrap_err().is_connect(), "no overflow, no panic");
}

#[tokio::test]
async fn a_refused_connection_is_a_network_error_without_secrets() {
    let url = refused_url().replace("http://", "http://user:hunter2@") + "path?token=hunter2#hunter2";
    let error = TimeoutClient::new(LONG, 1).get(&url).send().await.unwrap_err();
    assert!(matches!(error, RequestError::Network(_)) && error.is_connect(), "{error:?}");
    let mut shown = format!("{error:?} {error}");
    let mut source = error.source();
    while let Some(cause) = source {
        shown += &format!(" {cause}");
        source = cause.source();
    }
    assert!(!shown.contains("hunter2") && shown.contains("/path"), "{shown}");
}

#[tokio::test]
async fn a_wrong_request_is_an_error_value() {
    let client = TimeoutClient::new(LONG, 1);
    for url in ["", "no url", "http://", "ftp:relative", "file:///etc/passwd"] {
        let error = client.get(url).send().await.unwrap_err();
        assert!(error.is_invalid_request(), "{url}: {error:?}");
        assert!(client.get_with_timeout(url, None).await.is_err());
    }
    let error = client.get("http://localhost/").header("bad header", "x").send().await.unwrap_err();
    assert!(error.is_invalid_request(), "{error:?}");
    assert!(client.breaker("no url").is_none());
}

#[test]
fn a_wrong_option_is_an_error_that_names_it() {
    let option = |result: Result<TimeoutClient, BuildError>| result.unwrap_err().option().unwrap();
    let new = TimeoutClient::builder;
    assert_eq!(option(new().timeout(Duration::ZERO).build()), "timeout");
    assert_eq!(option(new().idle_timeout(Duration::ZERO).build()), "idle_timeout");
    assert_eq!(option(new().concurrency(0).build()), "concurrency");
    assert_eq!(option(new().concurrency(usize::MAX).build()), "concurrency");
    assert_eq!(option(new().concurrency_per_host(0).build()), "concurrency_per_host");
    assert_eq!(option(new().max_origins(0).build()), "max_origins");
    assert_eq!(option(new().retry(Retry::attempts(2).budget(f64::NAN)).build()), "retry");
    assert_eq!(option(new().propagate_deadline("no header").build()), "propagate_deadline");
    assert_eq!(option(new().sensitive_headers(["x-fine", "no header"]).build()), "sensitive_headers");
    assert_eq!(option(new().permit_timeout(Duration::ZERO).build()), "permit_timeout");
    let own = reqwest::Client::new();
    assert_eq!(option(new().reqwest(own).connect_timeout(LONG).build()), "connect_timeout");

    let new = BreakerConfig::builder;
    let wrong = [
        (new().failure_rate(0.0), "failure_rate"),
        (new().failure_rate(f64::NAN), "failure_rate"),
        (new().failure_rate(None).consecutive_failures(None), "failure_rate"),
        (new().consecutive_failures(0), "consecutive_failures"),
        (new().slow_call(LONG, 1.5), "slow_call"),
        (new().window(BreakerWindow::Count(0)), "window"),
        (new().window(BreakerWindow::Count(10)).min_calls(11), "min_calls"),
        (new().window(BreakerWindow::Time(Duration::ZERO)), "window"),
        (new().probes(0), "probes"),
        (new().probes(70_000), "probes"),
        (new().probes(3).probes_needed(4), "probes_needed"),
        (new().probes_needed(0), "probes_needed"),
        (new().lease(Duration::ZERO), "lease"),
        (new().silence(Duration::from_millis(99)), "silence"),
        (new().late_after(Duration::ZERO), "late_after"),
        (new().open_for(LONG, LONG / 2), "open_for"),
        (new().open_for(Duration::ZERO, Duration::ZERO), "open_for"),
        (new().backoff(0.5), "backoff"),
        (new().jitter(2.0), "jitter"),
    ];
    for (builder, name) in wrong {
        assert_eq!(builder.build().unwrap_err().option(), Some(name));
    }
}
