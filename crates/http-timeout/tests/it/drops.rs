//! Drops beyond the plain HTTP/1 call of `cancel.rs`: over HTTP/2, of a hedged call, of the call that opens the
//! connection for others, and thousands of random drops.
//!
//! `CANCEL_SAFE_CAMPAIGN=full` tries 100,000 random schedules instead of 3,000.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cancel_safe_http_timeout::{BreakerConfig, Hedge, Retry, TimeoutClient, TimeoutClientBuilder};
use cancel_safe_testing::{Explore, Outcome};
use futures_util::future::join_all;
use tokio::runtime::Handle;

use crate::{
    hedge::{hedging, learn},
    http2::SlowNames,
    server::{Server, drip, eventually, reply},
};

const CRATE: &str = "http-timeout";

fn explore() -> Explore {
    Explore::new().paused_time(false).timeout(Duration::from_secs(600))
}

struct Rig {
    server: Server,
    client: TimeoutClient,
}

impl Rig {
    fn given_back(&self) -> Result<(), String> {
        given_back(&self.client, &self.server.url("/"))
    }
}

fn given_back(client: &TimeoutClient, url: &str) -> Result<(), String> {
    let metrics = client.metrics();
    let kept = metrics.retries_left.map_or(10.0, |left| left + metrics.retries as f64);
    let probes = client.breaker(url).map_or(0, |breaker| breaker.metrics().probes);
    let clean = (metrics.in_flight, metrics.waiting, probes) == (0, 0, 0) && kept >= 10.0;
    if clean { Ok(()) } else { Err(format!("{metrics:?}, {probes} probes")) }
}

fn over_http2(builder: TimeoutClientBuilder) -> TimeoutClient {
    builder.configure(|reqwest| reqwest.http2_prior_knowledge()).build().unwrap()
}

#[test]
fn a_call_over_http2_dropped_anywhere_gives_everything_back() {
    let report = explore().run(
        async || {
            let server = Server::start(|_, hit| async move {
                if hit == 0 { reply(503, vec![b'x'; 1_000]) } else { drip(3, 100, Duration::from_millis(1)) }
            });
            let retry = Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(3));
            let breaker = BreakerConfig::builder().consecutive_failures(100).build().unwrap();
            let client = TimeoutClient::builder().concurrency_per_host(1).retry(retry).breaker(breaker);
            Rig { server, client: over_http2(client) }
        },
        async |rig| {
            let upload = rig.client.put(rig.server.url("/")).body(vec![7; 200_000]);
            upload.send().await.unwrap().bytes().await.unwrap().len()
        },
        async |rig, outcome| match outcome {
            Outcome::Completed(300) | Outcome::Dropped { .. } => rig.given_back(),
            Outcome::Completed(length) => Err(format!("{length} bytes")),
        },
    );
    report.publish(CRATE, "send and read over HTTP/2, with a retry and its drain");
    report.assert_clean();
}

#[test]
fn the_call_that_connects_dropped_anywhere_leaves_those_that_wait_alone() {
    let report = explore().run(
        async || {
            let server = Server::start(|_, _| async { reply(200, "answer") });
            let names = Arc::new(SlowNames(server.address(), Duration::from_millis(5)));
            let client = TimeoutClient::builder().breaker(BreakerConfig::default());
            let client = client.configure(|reqwest| reqwest.http2_prior_knowledge().no_proxy().dns_resolver(names));
            let url = format!("http://slow.test:{}/", server.address().port());
            (Rig { server, client: client.build().unwrap() }, url, Arc::new(AtomicBool::new(false)))
        },
        async |(rig, url, failed)| {
            // The second waits for the connection that the first opens; only the first is dropped.
            let mut first = Box::pin(rig.client.get(url.as_str()).send());
            let polled = futures_util::poll!(&mut first).map(|response| response.is_ok());
            let (waiting, url, failed) = (rig.client.clone(), url.clone(), Arc::clone(failed));
            tokio::spawn(async move { failed.store(waiting.get(url).send().await.is_err(), Ordering::SeqCst) });
            tokio::task::yield_now().await;
            if polled.is_pending() {
                assert!(first.await.is_ok());
            }
        },
        async |(rig, url, failed), _| {
            // A third finds the connection, or opens it.
            rig.client.get(url.as_str()).send().await.map_err(|error| error.to_string())?;
            eventually(|| rig.client.metrics().in_flight == 0).await;
            match (failed.load(Ordering::SeqCst), rig.client.trips().is_empty()) {
                (false, true) => rig.given_back(),
                (failed, _) => Err(format!("the second call failed: {failed}; trips: {:?}", rig.client.trips())),
            }
        },
    );
    report.publish(CRATE, "connect for others over HTTP/2");
    report.assert_clean();
}

#[test]
fn a_hedged_call_dropped_anywhere_gives_everything_back() {
    for http2 in [false, true] {
        let report = explore().run(
            async || {
                // The first after the quick ones takes a second, its copy some time, and the body comes in pieces.
                let server = Server::start(|request, hit| async move {
                    match request.uri().path() {
                        "/quick" => reply(200, "quick"),
                        _ if hit % 2 == 0 => std::future::pending().await,
                        _ => drip(3, 100, Duration::from_millis(1)),
                    }
                });
                let change = |builder: TimeoutClientBuilder| match http2 {
                    true => builder.configure(|reqwest| reqwest.http2_prior_knowledge()).concurrency(2),
                    false => builder.concurrency(2),
                };
                let rig = Rig { server, client: hedging(change) };
                learn(&rig.client, &rig.server.url("/quick")).await;
                if rig.server.hits() % 2 == 1 {
                    learn_one(&rig).await;
                }
                rig
            },
            async |rig| {
                // Noise may have cost the copy its token: then there is no copy, and the wait is cut here.
                let call =
                    async { rig.client.get(rig.server.url("/late")).send().await.unwrap().bytes().await.unwrap() };
                tokio::time::timeout(Duration::from_secs(2), call).await.map_or(0, |bytes| bytes.len())
            },
            async |rig, _| rig.given_back(),
        );
        report.publish(CRATE, if http2 { "hedged, over HTTP/2" } else { "hedged" });
        report.assert_clean();
    }
}

async fn learn_one(rig: &Rig) {
    rig.client.get(rig.server.url("/quick")).send().await.unwrap().bytes().await.unwrap();
}

/// A client with random mechanisms for a random schedule.
fn random_client(rng: &mut fastrand::Rng) -> TimeoutClient {
    let breaker = BreakerConfig::builder()
        .consecutive_failures(4)
        .open_for(Duration::from_millis(2), Duration::from_millis(4))
        .build()
        .unwrap();
    let builder = TimeoutClient::builder().concurrency(8).concurrency_per_host(6).breaker(breaker);
    let builder = match rng.u8(..3) {
        0 => builder.retry(Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(4))),
        1 => builder.hedge(Hedge::at_percentile(0.5).budget(1.0)),
        _ => builder,
    };
    if rng.bool() { over_http2(builder) } else { builder.build().unwrap() }
}

/// Sends, and uses the answer in one of the usual ways.
async fn random_use(client: &TimeoutClient, url: &str, way: u8, patience: Duration) {
    let request = if way.is_multiple_of(2) { client.get(url) } else { client.put(url).body(vec![7; 100_000]) };
    let used = async {
        let Ok(mut response) = request.send().await else { return };
        match way / 2 {
            0 => drop(response),
            1 => drop(response.chunk().await),
            2 => drop(response.bytes().await),
            // Held until the patience has ended.
            _ => {
                std::future::pending::<()>().await;
                drop(response);
            }
        }
    };
    // The patience is the schedule: it drops the call wherever it is.
    drop(tokio::time::timeout(patience, used).await);
}

#[tokio::test]
async fn random_drops_leave_permits_slots_budget_and_tasks_at_their_baseline() {
    let full = std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full");
    let schedules = if full { 100_000 } else { 3_000 };
    let seed = std::env::var("CANCEL_SAFE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    println!("CANCEL_SAFE_SEED={seed}, {schedules} schedules");
    let mut rng = fastrand::Rng::with_seed(seed);
    let server = Server::start(|_, hit| async move {
        match hit % 16 {
            0..3 => reply(503, vec![b'x'; 1_000]),
            3 => std::future::pending().await,
            4 => reply(200, ""),
            _ => drip(2, 100, Duration::from_millis(1)),
        }
    });
    let url = server.url("/");
    let baseline = Handle::current().metrics().num_alive_tasks();
    let mut tried = 0;
    while tried < schedules {
        let client = random_client(&mut rng);
        for _ in 0..4 {
            let calls = (0..25).map(|_| {
                let (way, patience) = (rng.u8(..8), Duration::from_micros(rng.u64(0..12_000)));
                random_use(&client, &url, way, patience)
            });
            tried += join_all(calls).await.len();
            if let Err(problem) = given_back(&client, &url) {
                panic!("seed {seed}, after {tried} schedules: {problem}");
            }
        }
        drop(client);
        // Connections are reqwest's tasks, and end with its client.
        eventually(|| Handle::current().metrics().num_alive_tasks() == baseline).await;
    }
    assert!(server.hits() > schedules / 10, "seed {seed}: {} requests arrived", server.hits());
}
