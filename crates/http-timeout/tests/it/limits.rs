//! Bounded load: permits, queues, bodies and the map of origins.

use std::time::{Duration, Instant};

use cancel_safe_http_timeout::{Attempts, BreakerConfig, BreakerMap, Phase, RequestError, Retry, TimeoutClient};
use futures_util::{StreamExt as _, future::join_all};

use crate::server::{Server, drip, eventually, reply, with_header};

#[tokio::test]
async fn permits_are_held_until_the_bodies_end() {
    let server = Server::start(|_, _| async { drip(3, 100, Duration::from_millis(5)) });
    let client = TimeoutClient::builder().concurrency(2).build().unwrap();
    let calls = (0..12).map(|_| async {
        let response = client.get(server.url("/")).send().await.unwrap();
        assert!(client.metrics().in_flight <= 2);
        assert_eq!(response.bytes().await.unwrap().len(), 300);
    });
    join_all(calls).await;
    assert_eq!(server.hits(), 12);
    assert_eq!(server.most_bodies(), 2);
    assert_eq!(client.metrics().in_flight, 0);
}

#[tokio::test]
async fn dropping_an_unread_response_gives_its_permit_back() {
    let server = Server::start(|_, _| async { drip(1_000, 1_000, Duration::from_millis(5)) });
    let client = TimeoutClient::builder().concurrency(1).build().unwrap();
    for _ in 0..3 {
        let response = client.get(server.url("/")).send().await.unwrap();
        assert_eq!(client.metrics().in_flight, 1);
        drop(response);
        assert_eq!(client.metrics().in_flight, 0);
    }
}

#[tokio::test]
async fn a_response_without_a_body_holds_no_permit() {
    let server = Server::start(|request, _| async move {
        match request.uri().path() {
            "/length" => reply(200, vec![b'x'; 100_000]),
            "/nothing" => reply(200, ""),
            status => reply(status[1..].parse().unwrap(), ""),
        }
    });
    let client = TimeoutClient::builder().concurrency(1).timeout(Duration::from_secs(10)).build().unwrap();
    let mut kept = Vec::new();
    for (method, path) in [("GET", "/204"), ("GET", "/304"), ("GET", "/nothing"), ("HEAD", "/204"), ("HEAD", "/length")]
    {
        let request = client.request(method.parse().unwrap(), server.url(path));
        kept.push(request.send().await.unwrap_or_else(|error| panic!("behind {} answers: {error}", kept.len())));
        assert_eq!(client.metrics().in_flight, 0, "{method} {path}");
    }
    for response in kept {
        assert!(response.bytes().await.unwrap().is_empty());
    }
}

#[tokio::test]
async fn one_host_cannot_take_what_others_need() {
    let slow = Server::start(|_, _| async { drip(1_000, 10, Duration::from_millis(20)) });
    let quick = Server::start(|_, _| async { reply(200, "ok") });
    let client = TimeoutClient::builder().concurrency(10).concurrency_per_host(2).build().unwrap();
    let hogs: Vec<_> = (0..20)
        .map(|_| {
            let request = client.get(slow.url("/"));
            tokio::spawn(async move { request.send().await.unwrap().bytes().await.unwrap() })
        })
        .collect();
    eventually(|| slow.hits() == 2 && client.metrics().waiting == 18).await;
    assert_eq!(client.get(quick.url("/")).send().await.unwrap().text().await.unwrap(), "ok");
    assert_eq!(slow.most_bodies(), 2);
    hogs.iter().for_each(tokio::task::JoinHandle::abort);
    join_all(hogs).await;
    let metrics = client.metrics();
    assert_eq!((metrics.in_flight, metrics.waiting), (0, 0));
}

#[tokio::test]
async fn the_queue_for_permits_is_bounded() {
    let server = Server::start(|_, _| async { drip(1_000, 10, Duration::from_millis(20)) });
    let client = TimeoutClient::builder().concurrency(1).max_waiting(2).build().unwrap();
    let running = client.get(server.url("/")).send().await.unwrap();
    let waiting: Vec<_> = (0..2).map(|_| tokio::spawn(client.get(server.url("/")).send())).collect();
    eventually(|| client.metrics().waiting == 2).await;
    let refused = client.get(server.url("/")).send().await.unwrap_err();
    assert!(matches!(refused, RequestError::Overloaded { limit: 2, .. }), "{refused:?}");
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
    join_all(waiting).await;
    assert_eq!(client.metrics().waiting, 0);
    drop(running);
    assert_eq!(client.metrics().in_flight, 0);
}

#[tokio::test]
async fn the_queue_of_one_host_takes_no_place_in_that_of_others() {
    let slow = Server::start(|_, _| async { drip(1_000, 10, Duration::from_millis(20)) });
    let other = Server::start(|_, _| async { drip(3, 10, Duration::from_millis(20)) });
    let client = TimeoutClient::builder().concurrency(2).concurrency_per_host(1).max_waiting(3).build().unwrap();
    let hogs: Vec<_> = (0..4).map(|_| tokio::spawn(client.get(slow.url("/")).send())).collect();
    eventually(|| client.metrics().waiting == 3).await;
    let refused = client.get(slow.url("/")).send().await.unwrap_err();
    assert!(matches!(refused, RequestError::Overloaded { limit: 3, .. }), "{refused:?}");
    // One runs and three wait, regardless of waiting calls elsewhere.
    let calls = (0..4).map(|_| async {
        assert_eq!(client.get(other.url("/")).send().await.unwrap().bytes().await.unwrap().len(), 30);
    });
    join_all(calls).await;
    hogs.iter().for_each(tokio::task::JoinHandle::abort);
    drop(join_all(hogs).await);
    let metrics = client.metrics();
    assert_eq!((metrics.in_flight, metrics.waiting), (0, 0));
}

#[tokio::test]
async fn waiting_for_a_permit_ends_at_the_deadline() {
    let server = Server::start(|_, _| async { reply(200, "unread") });
    let client = TimeoutClient::builder().concurrency(1).build().unwrap();
    let held = client.get(server.url("/")).send().await.unwrap();
    let late = client.get(server.url("/")).timeout(Duration::from_millis(50)).send().await.unwrap_err();
    assert!(matches!(late, RequestError::Timeout { phase: Phase::Permit, attempts: 0, .. }), "{late:?}");
    drop(held);
    assert_eq!(server.hits(), 1);
}

#[tokio::test]
async fn waiting_for_a_permit_is_not_idle_time() {
    let server = Server::start(|_, _| async { reply(200, "unread") });
    let client = TimeoutClient::builder().concurrency(1).idle_timeout(Duration::from_secs(3)).build().unwrap();
    let held = client.get(server.url("/")).send().await.unwrap();
    let waiting = tokio::spawn(client.get(server.url("/")).send());
    eventually(|| client.metrics().waiting == 1).await;
    tokio::time::sleep(Duration::from_millis(3_500)).await;
    drop(held);
    assert!(waiting.await.unwrap().is_ok(), "the wait for the permit was counted as silence");
}

#[tokio::test]
async fn a_body_over_the_cap_is_an_error_whether_announced_or_not() {
    let server = Server::start(|request, _| async move {
        match request.uri().path() {
            "/announced" => reply(200, vec![0; 2_000_000]),
            "/exact" => reply(200, vec![0; 1_000_000]),
            _ => drip(20, 100_000, Duration::ZERO),
        }
    });
    let client = TimeoutClient::builder().max_body(1_000_000).build().unwrap();
    for path in ["/announced", "/streamed"] {
        let response = client.get(server.url(path)).send().await.unwrap();
        let error = RequestError::from(response.bytes().await.unwrap_err());
        assert!(matches!(error, RequestError::BodyTooLarge { limit: 1_000_000, .. }), "{path}: {error:?}");
        assert_eq!(client.metrics().in_flight, 0);
    }
    let whole = client.get(server.url("/exact")).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(whole.len(), 1_000_000);
}

/// 16 MiB of zeros, in 16 KiB.
const ZEROS: &[u8] = include_bytes!("zeros.gz");

#[tokio::test]
async fn a_body_that_is_small_on_the_wire_ends_at_the_cap_all_the_same() {
    let server = Server::start(|request, _| async move {
        let status = if request.uri().path() == "/fails" { 503 } else { 200 };
        with_header(reply(status, ZEROS), "content-encoding", "gzip")
    });
    let url = server.url("/");
    let capped = |bytes: u64| {
        let retry = Retry::attempts(2).backoff(Duration::from_millis(1), Duration::from_millis(1));
        TimeoutClient::builder().max_body(bytes).retry(retry).build().unwrap()
    };
    let whole = capped(16 << 20).get(&url).send().await.unwrap().bytes().await.unwrap();
    assert_eq!(whole.len(), 16 << 20);
    let client = capped(1 << 20);
    let mut response = client.get(&url).send().await.unwrap();
    let (mut read, mut failure) = (0, None);
    while failure.is_none() {
        match response.chunk().await {
            Ok(chunk) => read += chunk.expect("the cap comes before the end").len(),
            Err(error) => failure = Some(RequestError::from(error)),
        }
    }
    assert!(matches!(failure, Some(RequestError::BodyTooLarge { .. })), "{failure:?}");
    assert!(read <= 1 << 20, "{read} bytes");
    let fetched = client.get_many([&url], None).next().await.unwrap().result;
    assert!(fetched.as_ref().is_err_and(RequestError::is_body_too_large), "{fetched:?}");
    // An unwanted body is not read to its end either.
    let failed = client.get(server.url("/fails")).send().await.unwrap();
    assert_eq!((failed.status().as_u16(), failed.extensions().get()), (503, Some(&Attempts(2))));
    drop(failed);
    assert_eq!(client.metrics().in_flight, 0);
}

#[tokio::test]
async fn a_response_whose_body_has_failed_keeps_no_connection() {
    let server = Server::start(|request, _| async move {
        match request.uri().path() {
            "/large" => drip(100_000, 1_000, Duration::from_millis(1)),
            _ => drip(2, 1_000, Duration::from_secs(600)),
        }
    });
    let client = TimeoutClient::builder().max_body(10_000).idle_timeout(Duration::from_millis(50)).build().unwrap();
    let mut failed = Vec::new();
    for path in ["/large", "/silent"] {
        let mut response = client.get(server.url(path)).send().await.unwrap();
        while response.chunk().await.is_ok_and(|chunk| chunk.is_some()) {}
        failed.push(response);
    }
    // The permits are free, so the calls that held them must be over, although the responses are still here.
    eventually(|| (client.metrics().in_flight, server.bodies()) == (0, 0)).await;
    drop(failed);
}

#[tokio::test]
async fn get_many_can_be_collected_beyond_the_limit_whatever_the_size_of_the_bodies() {
    let server = Server::start(|request, _| async move {
        if request.uri().path() == "/0" { reply(200, vec![b'x'; 3_000_000]) } else { drip(3, 100_000, Duration::ZERO) }
    });
    let client = TimeoutClient::builder().concurrency(4).concurrency_per_host(2).build().unwrap();
    let urls: Vec<_> = (0..15).map(|i| server.url(&format!("/{i}"))).collect();
    let (one, other) = (client.get_many(&urls, None).collect(), client.get_many(&urls, None).ordered().collect());
    let all: (Vec<_>, Vec<_>) = tokio::join!(one, other);
    assert_eq!(client.metrics().in_flight, 0);
    assert!(server.most_bodies() <= 2, "{} at a time", server.most_bodies());
    assert!(all.1.iter().map(|fetched| fetched.index).eq(0..15));
    for fetched in all.0.into_iter().chain(all.1) {
        let response = fetched.result.unwrap();
        assert_eq!(response.url().as_str(), fetched.url);
        let length = response.bytes().await.unwrap().len();
        assert_eq!(length, if fetched.index == 0 { 3_000_000 } else { 300_000 });
    }
}

#[tokio::test]
async fn a_body_that_get_many_cannot_have_whole_is_the_error_of_its_url() {
    let server = Server::start(|request, _| async move {
        match request.uri().path() {
            "/large" => drip(20, 100_000, Duration::ZERO),
            "/endless" => drip(100_000, 1, Duration::from_millis(5)),
            _ => reply(200, "ok"),
        }
    });
    let client = TimeoutClient::builder().max_body(1_000_000).build().unwrap();
    let urls = ["/large", "/endless", "/"].map(|path| server.url(path));
    let all: Vec<_> =
        client.get_many(urls, Duration::from_secs(2)).ordered().map(|fetched| fetched.result).collect().await;
    assert!(matches!(&all[0], Err(error) if error.is_body_too_large()), "{:?}", all[0]);
    assert!(matches!(&all[1], Err(RequestError::Timeout { phase: Phase::Body, .. })), "{:?}", all[1]);
    assert!(all[2].is_ok(), "{:?}", all[2]);
}

#[tokio::test]
async fn get_many_dropped_midway_leaves_nothing_in_flight() {
    let server = Server::start(|_, _| async { reply(200, "ok") });
    let client = TimeoutClient::builder().concurrency(4).build().unwrap();
    // An endless list: only the requested part of it is consumed.
    let mut answers = client.get_many(std::iter::repeat(server.url("/")), Duration::from_secs(10));
    for _ in 0..10 {
        let fetched = answers.next().await.unwrap();
        assert_eq!(fetched.result.unwrap().text().await.unwrap(), "ok");
    }
    drop(answers);
    let metrics = client.metrics();
    assert_eq!((metrics.in_flight, metrics.waiting), (0, 0));
    assert!(server.hits() <= 14, "{} requests for 10 answers", server.hits());
}

#[test]
fn ten_thousand_origins_stay_within_the_bound() {
    let client = TimeoutClient::builder().max_origins(1_000).breaker(BreakerConfig::default()).build().unwrap();
    let held = client.breaker("http://held.test/").unwrap();
    held.isolate();
    for host in 0..10_000 {
        client.breaker(format!("http://host-{host}.test/")).unwrap();
        assert!(client.metrics().origins <= 1_000);
    }
    assert!(client.metrics().origins >= 800, "it forgot more than it had to");
    assert_eq!(client.open_origins(), ["http://held.test"], "a breaker in use was forgotten");
    let breakers = BreakerMap::new(BreakerConfig::default(), 100);
    let clones: Vec<_> = (0..200).map(|key: u64| breakers.get(&key)).collect();
    assert!(breakers.len() <= 100 && clones.len() == 200, "the bound holds even when all are in use");
}

#[tokio::test]
async fn an_open_origin_costs_others_nothing_and_its_own_callers_no_wait() {
    let healthy = Server::start(|_, _| async { reply(200, "ok") });
    let client = TimeoutClient::builder().concurrency(1).breaker(BreakerConfig::default()).build().unwrap();
    let sick = crate::server::refused_url();
    for _ in 0..5 {
        assert!(client.get(&sick).send().await.unwrap_err().is_connect());
    }
    let held = client.get(healthy.url("/")).send().await.unwrap();
    let started = Instant::now();
    match client.get(&sick).send().await.unwrap_err() {
        RequestError::CircuitOpen { origin, retry_after, .. } => {
            assert_eq!(format!("{origin}/"), sick);
            assert!(retry_after > Duration::ZERO && retry_after <= Duration::from_secs(6), "{retry_after:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(started.elapsed() < Duration::from_secs(5), "it waited for a permit to be refused");
    assert_eq!(held.text().await.unwrap(), "ok");
}
