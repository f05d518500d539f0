//! Every operation dropped at every await: permits, probe slots and retry budget are returned at once.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use cancel_safe_http_timeout::{BreakerConfig, CircuitBreaker, RequestError, Retry, State, TimeoutClient};
use cancel_safe_testing::{Explore, Outcome};
use futures_util::StreamExt as _;
use http::StatusCode;

use crate::server::{Server, drip, reply, with_header};

const CRATE: &str = "http-timeout";

struct Rig {
    server: Server,
    client: TimeoutClient,
}

/// Uses the system's clock, because the server has its own thread; and allows enough time for a slow machine, because
/// each run makes a server and a client.
fn explore() -> Explore {
    Explore::new().paused_time(false).timeout(Duration::from_secs(600))
}

/// A client with every mechanism on, and a server that fails at first.
fn rig() -> Rig {
    let server = Server::start(|_, hit| async move {
        if hit == 0 { reply(503, vec![b'x'; 1_000]) } else { drip(3, 100, Duration::from_millis(1)) }
    });
    let retry = Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(3));
    let client = TimeoutClient::builder()
        .timeout(Duration::from_secs(20))
        .concurrency(2)
        .concurrency_per_host(1)
        .retry(retry)
        .breaker(BreakerConfig::builder().consecutive_failures(100).build().unwrap())
        .build()
        .unwrap();
    Rig { server, client }
}

/// Checks what a dropped or finished call must have given back.
fn given_back(rig: &Rig) -> Result<(), String> {
    let metrics = rig.client.metrics();
    // Ten retries at the start; only a retry that was made may have used one.
    let kept = metrics.retries_left.unwrap_or_default() + metrics.retries as f64;
    let clean = (metrics.in_flight, metrics.waiting) == (0, 0) && kept >= 10.0;
    if clean { Ok(()) } else { Err(format!("{metrics:?}")) }
}

#[test]
fn a_call_dropped_anywhere_gives_everything_back() {
    let report = explore().run(
        async || rig(),
        async |rig| {
            let response = rig.client.get(rig.server.url("/")).send().await.unwrap();
            response.bytes().await.unwrap().len()
        },
        async |rig, outcome| {
            if let Outcome::Completed(length) = outcome {
                assert_eq!(length, 300);
            }
            given_back(rig)
        },
    );
    report.publish(CRATE, "send and read");
    report.assert_clean();
}

#[test]
fn get_with_timeout_dropped_anywhere_gives_everything_back() {
    let report = explore().run(
        async || rig(),
        async |rig| rig.client.get_with_timeout(rig.server.url("/"), Some(Duration::from_secs(20))).await.is_ok(),
        async |rig, _| given_back(rig),
    );
    report.publish(CRATE, "get_with_timeout");
    report.assert_clean();
}

#[test]
fn a_request_that_was_built_elsewhere_dropped_anywhere_gives_everything_back() {
    let report = explore().run(
        async || rig(),
        async |rig| {
            let request = reqwest::Request::new(http::Method::GET, rig.server.url("/").parse().unwrap());
            rig.client.execute(request).await.unwrap().bytes().await.unwrap().len()
        },
        async |rig, outcome| match outcome {
            Outcome::Completed(300) | Outcome::Dropped { .. } => given_back(rig),
            Outcome::Completed(length) => Err(format!("{length} bytes")),
        },
    );
    report.publish(CRATE, "execute");
    report.assert_clean();
}

#[test]
fn get_many_dropped_anywhere_gives_everything_back() {
    let report = explore().run(
        async || rig(),
        async |rig| {
            let urls = vec![rig.server.url("/"); 3];
            let mut answers = rig.client.get_many(urls, Duration::from_secs(20)).ordered();
            while let Some(fetched) = answers.next().await {
                fetched.result.unwrap().bytes().await.unwrap();
            }
        },
        async |rig, _| given_back(rig),
    );
    report.publish(CRATE, "get_many");
    report.assert_clean();
}

/// A server that redirects to another one, in whose half-open circuit the call is the only probe.
struct Way {
    first: Server,
    last: Server,
    client: TimeoutClient,
}

async fn way() -> Way {
    const OPEN: Duration = Duration::from_millis(1);
    let last = Server::start(|_, _| async { drip(3, 100, Duration::from_millis(1)) });
    let location = last.url("/");
    let first = Server::start(move |_, _| {
        let mut reply = with_header(drip(3, 100, Duration::from_millis(1)), "location", &location);
        *reply.status_mut() = StatusCode::TEMPORARY_REDIRECT;
        async move { reply }
    });
    let breaker = BreakerConfig::builder().consecutive_failures(5).open_for(OPEN, OPEN);
    let client = TimeoutClient::builder()
        .concurrency(2)
        .concurrency_per_host(1)
        .retry(Retry::attempts(3))
        .breaker(breaker.jitter(0.0).build().unwrap())
        .build()
        .unwrap();
    let breaker = client.breaker(last.url("/")).unwrap();
    for _ in 0..5 {
        breaker.try_acquire().unwrap().failure();
    }
    tokio::time::sleep(OPEN * 2).await;
    Way { first, last, client }
}

#[test]
fn a_redirected_call_dropped_anywhere_gives_everything_back_at_every_origin() {
    let report = explore().run(
        way,
        async |way| {
            let response = way.client.put(way.first.url("/")).body(vec![7; 10_000]).send().await.unwrap();
            response.bytes().await.unwrap().len()
        },
        async |way, outcome| {
            let metrics = way.client.metrics();
            let kept = metrics.retries_left.unwrap_or_default() + metrics.retries as f64;
            let breaker = |server: &Server| way.client.breaker(server.url("/")).unwrap().metrics();
            let (first, last) = (breaker(&way.first), breaker(&way.last));
            let clean = (metrics.in_flight, metrics.waiting) == (0, 0) && kept >= 10.0;
            match outcome {
                Outcome::Completed(300) | Outcome::Dropped { .. }
                    if clean && (first.probes, last.probes) == (0, 0) && first.failures == 0 =>
                {
                    Ok(())
                }
                outcome => Err(format!("{outcome:?}: {metrics:?} {first:?} {last:?}")),
            }
        },
    );
    report.publish(CRATE, "redirects");
    report.assert_clean();
}

#[tokio::test]
async fn calls_dropped_at_random_moments_leave_nothing_behind() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let server = Server::start(|_, hit| async move {
        // In bursts, so that a caller that waits for the answers meets three in a row, however slow the machine is.
        if hit % 40 < 10 { reply(503, vec![b'x'; 1_000]) } else { drip(2, 100, Duration::from_millis(1)) }
    });
    let breaker = BreakerConfig::builder()
        .consecutive_failures(3)
        .min_calls(5)
        .failure_rate(0.3)
        .open_for(Duration::from_millis(2), Duration::from_millis(4));
    let client = TimeoutClient::builder()
        .concurrency(8)
        .concurrency_per_host(6)
        .retry(Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(4)))
        .breaker(breaker.build().unwrap())
        .build()
        .unwrap();
    // While the breaker is open a round reaches no server, so requests are counted, and rounds are bounded.
    for _ in 0..20_000 {
        if server.hits() >= 600 && !client.trips().is_empty() {
            break;
        }
        let calls = (0..50).map(|n| {
            let call = client.get(server.url("/"));
            let patience = if n == 0 { Duration::from_secs(5) } else { Duration::from_micros(rng.u64(0..15_000)) };
            tokio::time::timeout(patience, async move { call.send().await?.bytes().await.map_err(RequestError::from) })
        });
        futures_util::future::join_all(calls).await;
        let metrics = client.metrics();
        let kept = metrics.retries_left.unwrap() + metrics.retries as f64;
        assert!((metrics.in_flight, metrics.waiting) == (0, 0) && kept >= 10.0, "seed {seed}: {metrics:?}");
        assert_eq!(client.breaker(server.url("/")).unwrap().metrics().probes, 0, "seed {seed}");
    }
    assert!(!client.trips().is_empty(), "seed {seed}: the breaker never opened, so no probe was dropped");
}

#[test]
fn a_call_dropped_in_the_queue_leaves_it() {
    let report = explore().run(
        async || {
            let server = Server::start(|_, _| async { reply(200, "unread") });
            let client = TimeoutClient::builder().concurrency(1).build().unwrap();
            let held = client.get(server.url("/")).send().await.unwrap();
            (Rig { server, client }, held)
        },
        async |(rig, _held)| {
            rig.client.get(rig.server.url("/")).timeout(Duration::from_millis(20)).send().await.unwrap_err()
        },
        async |(rig, _held), outcome| {
            let metrics = rig.client.metrics();
            let clean = (metrics.in_flight, metrics.waiting) == (1, 0);
            if clean { Ok(()) } else { Err(format!("{outcome:?}: {metrics:?}")) }
        },
    );
    report.publish(CRATE, "wait for a permit");
    report.assert_clean();
}

#[test]
fn a_call_dropped_while_it_reads_what_it_does_not_want_gives_everything_back() {
    let report = explore().budgets([1]).run(
        async || {
            let server = Server::start(|_, hit| async move {
                let mut reply = drip(3, 100, Duration::from_millis(1));
                *reply.status_mut() = if hit == 0 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
                reply
            });
            let retry = Retry::attempts(2).backoff(Duration::from_millis(1), Duration::from_millis(3));
            Rig { server, client: TimeoutClient::builder().retry(retry).build().unwrap() }
        },
        async |rig| {
            let response = rig.client.get(rig.server.url("/")).send().await.unwrap();
            response.bytes().await.unwrap().len()
        },
        async |rig, outcome| match outcome {
            Outcome::Completed(300) | Outcome::Dropped { .. } => given_back(rig),
            Outcome::Completed(length) => Err(format!("{length} bytes")),
        },
    );
    report.publish(CRATE, "drain before a retry");
    report.assert_clean();
}

/// Only the drop ends these calls: there is no deadline and no idle timeout.
#[test]
fn calls_without_any_limit_dropped_anywhere_give_everything_back() {
    let report = explore().run(
        async || {
            let server = Server::start(|_, _| async { drip(3, 100, Duration::from_millis(1)) });
            let client = TimeoutClient::builder().timeout(None).attempt_timeout(None).idle_timeout(None);
            Rig { server, client: client.concurrency_per_host(1).build().unwrap() }
        },
        async |rig| {
            let first = rig.client.get(rig.server.url("/")).send().await.unwrap();
            // The origin has one permit, which the first body holds to its end.
            let second = rig.client.get(rig.server.url("/")).send();
            let (first, second) = tokio::join!(first.bytes(), second);
            first.unwrap().len() + second.unwrap().bytes().await.unwrap().len()
        },
        async |rig, outcome| {
            let metrics = rig.client.metrics();
            match (outcome, metrics.in_flight, metrics.waiting) {
                (Outcome::Completed(600) | Outcome::Dropped { .. }, 0, 0) => Ok(()),
                (outcome, ..) => Err(format!("{outcome:?}: {metrics:?}")),
            }
        },
    );
    report.publish(CRATE, "calls without limits");
    report.assert_clean();
}

/// A breaker that is due for its one probe.
async fn due() -> CircuitBreaker {
    let open_for = Duration::from_millis(1);
    let breaker = CircuitBreaker::new(BreakerConfig::builder().open_for(open_for, open_for).build().unwrap());
    for _ in 0..5 {
        assert!(breaker.call(async { Err::<(), _>(()) }).await.is_err());
    }
    tokio::time::sleep(open_for * 2).await;
    breaker
}

#[test]
fn a_probe_dropped_anywhere_gives_its_slot_back() {
    let report = Explore::new().run(
        due,
        async |breaker| {
            let call = async {
                tokio::task::yield_now().await;
                tokio::time::sleep(Duration::from_millis(5)).await;
                Ok::<_, ()>(())
            };
            breaker.call(call).await
        },
        async |breaker, outcome| match (outcome, breaker.metrics()) {
            (Outcome::Completed(_), metrics) if metrics.state == State::Closed => Ok(()),
            (Outcome::Dropped { .. }, metrics) if metrics.probes == 0 => match breaker.try_acquire() {
                Ok(permit) => {
                    permit.success();
                    if breaker.state() == State::Closed { Ok(()) } else { Err("it did not recover".to_owned()) }
                }
                Err(open) => Err(format!("the next probe was refused: {open}")),
            },
            (outcome, metrics) => Err(format!("{outcome:?}: {metrics:?}")),
        },
    );
    report.publish(CRATE, "probe");
    report.assert_clean();
}

/// The broken twin: a common kind of breaker, which takes the probe's slot before the await and frees it after.
struct Leaky {
    probing: AtomicBool,
}

impl Leaky {
    async fn call<T>(&self, call: impl Future<Output = T>) -> Option<T> {
        if self.probing.swap(true, Ordering::SeqCst) {
            return None;
        }
        let result = call.await;
        self.probing.store(false, Ordering::SeqCst);
        Some(result)
    }
}

#[test]
fn a_breaker_that_leaks_its_slot_is_caught() {
    let report = Explore::new().run(
        async || Leaky { probing: AtomicBool::new(false) },
        async |breaker| breaker.call(tokio::time::sleep(Duration::from_millis(5))).await,
        async |breaker, _| breaker.call(async {}).await.ok_or_else(|| "the next probe was refused".to_owned()),
    );
    assert!(!report.is_clean(), "the leak went unseen");
}
