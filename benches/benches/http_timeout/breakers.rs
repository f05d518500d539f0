//! The breaker beside its peers: what a call costs, and which of the faults that their users meet each of them has.
//!
//! Invariant: all are told the same: to open at five failures in a row, or at half of at least five calls where they know
//! no such rule; to stay open for 50 ms (2 s where callers wait longer than that); and to let one probe in.

use std::{
    error::Error as StdError,
    fmt,
    future::{Future, pending, ready},
    hint::black_box,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use cancel_safe_http_timeout::{BreakerConfig, BreakerError, CircuitBreaker};
use circuitbreaker_rs::{BreakerError as RsError, CircuitBreaker as Rs, DefaultPolicy};
use criterion::Criterion;
use failsafe::{Config, Error as FailsafeError, backoff, failure_policy, futures::CircuitBreaker as _};
use layered::{Execute, Service as _, Stack as _};
use recloser::{AsyncRecloser, Error as RecloserError, Recloser};
use seatbelt::{
    RecoveryInfo, ResilienceContext,
    breaker::{Breaker as Seatbelt, HalfOpenMode},
};
use tokio::{
    sync::{Mutex, Semaphore},
    time::{sleep, timeout},
};
use tower_resilience_circuitbreaker::{CircuitBreakerLayer, SlidingWindowType};
use tower_service::Service as _;

const OPEN: Duration = Duration::from_millis(50);

/// For the callee that hangs, whose callers wait for longer.
const LONG: Duration = Duration::from_secs(2);

/// More than the jitter of any of them.
const DUE: Duration = Duration::from_millis(70);

const LEASE: Duration = Duration::from_millis(200);

#[derive(Clone, Copy, Debug)]
struct Sick;

impl fmt::Display for Sick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sick")
    }
}

impl StdError for Sick {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Well,
    Failed,
    Refused,
}

type Call = Pin<Box<dyn Future<Output = Result<(), Sick>> + Send>>;
type Called = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// One breaker to compare.
struct Contestant {
    name: &'static str,
    call: Arc<dyn Fn(Call) -> Called + Send + Sync>,
}

impl Contestant {
    fn new(name: &'static str, call: impl Fn(Call) -> Called + Send + Sync + 'static) -> Self {
        Self { name, call: Arc::new(call) }
    }

    async fn succeed(&self) -> Outcome {
        (self.call)(Box::pin(ready(Ok(())))).await
    }

    async fn fail(&self) -> Outcome {
        (self.call)(Box::pin(ready(Err(Sick)))).await
    }

    /// Calls until one is refused; how many were not, up to `most`.
    async fn trip(&self, most: u32) -> u32 {
        for failures in 0..most {
            if self.fail().await == Outcome::Refused {
                return failures;
            }
        }
        most
    }
}

fn ours(open: Duration) -> CircuitBreaker {
    let config = BreakerConfig::builder().open_for(open, open).jitter(0.0).lease(LEASE);
    CircuitBreaker::new(config.build().expect("the options are in their range"))
}

fn recloser(open: Duration) -> AsyncRecloser {
    AsyncRecloser::from(Recloser::custom().error_rate(0.5).closed_len(5).half_open_len(1).open_wait(open).build())
}

fn rs(open: Duration) -> Rs<DefaultPolicy, Sick> {
    let builder = circuitbreaker_rs::BreakerBuilder::<DefaultPolicy, Sick>::default();
    builder.failure_threshold(0.5).min_throughput(5).cooldown(open).probe_interval(1).consecutive_failures(5).build()
}

fn all(open: Duration) -> Vec<Contestant> {
    let breaker = ours(open);
    let ours = Contestant::new("cancel-safe-http-timeout", move |call| {
        let breaker = breaker.clone();
        Box::pin(async move {
            match breaker.call(call).await {
                Ok(()) => Outcome::Well,
                Err(BreakerError::Open(_)) => Outcome::Refused,
                Err(_) => Outcome::Failed,
            }
        })
    });
    let policy = failure_policy::consecutive_failures(5, backoff::constant(open));
    let breaker = Config::new().failure_policy(policy).build();
    let failsafe = Contestant::new("failsafe 1.3", move |call| {
        let breaker = breaker.clone();
        Box::pin(async move {
            match breaker.call(call).await {
                Ok(()) => Outcome::Well,
                Err(FailsafeError::Rejected) => Outcome::Refused,
                Err(FailsafeError::Inner(_)) => Outcome::Failed,
            }
        })
    });
    let breaker = recloser(open);
    let recloser = Contestant::new("recloser 1.4", move |call| {
        let breaker = breaker.clone();
        Box::pin(async move {
            match breaker.call(call).await {
                Ok(()) => Outcome::Well,
                Err(RecloserError::Rejected) => Outcome::Refused,
                Err(RecloserError::Inner(_)) => Outcome::Failed,
            }
        })
    });
    let breaker = Arc::new(rs(open));
    let rs = Contestant::new("circuitbreaker-rs 0.1.1", move |call| {
        let breaker = Arc::clone(&breaker);
        Box::pin(async move {
            match breaker.call_async(|| call).await {
                Ok(()) => Outcome::Well,
                Err(RsError::Operation(_)) => Outcome::Failed,
                Err(_) => Outcome::Refused,
            }
        })
    });
    vec![ours, failsafe, recloser, rs, seatbelt(open), tower_resilience(open)]
}

fn seatbelt(open: Duration) -> Contestant {
    let context = ResilienceContext::<Mutex<Option<Call>>, Result<(), Option<Sick>>>::new(tick::Clock::new_tokio());
    let stack = (
        Seatbelt::layer("breaker", &context)
            .recovery_with(|result, _| if result.is_ok() { RecoveryInfo::never() } else { RecoveryInfo::retry() })
            .rejected_input(|_, _| Err(None))
            .failure_threshold(0.5)
            .min_throughput(5)
            .break_duration(open)
            .half_open_mode(HalfOpenMode::quick()),
        Execute::new(async |call: Mutex<Option<Call>>| match call.into_inner() {
            Some(call) => call.await.map_err(Some),
            None => Ok(()),
        }),
    );
    let breaker = Arc::new(stack.into_service());
    Contestant::new("seatbelt 0.11", move |call| {
        let breaker = Arc::clone(&breaker);
        Box::pin(async move {
            match breaker.execute(Mutex::new(Some(call))).await {
                Ok(()) => Outcome::Well,
                Err(None) => Outcome::Refused,
                Err(Some(Sick)) => Outcome::Failed,
            }
        })
    })
}

fn tower_resilience(open: Duration) -> Contestant {
    let layer = CircuitBreakerLayer::builder().consecutive_failures(5).wait_duration_in_open(open);
    let layer = layer.permitted_calls_in_half_open(1).build().expect("the options are in their range");
    let breaker = layer.layer_fn(tower::service_fn(|call: Call| call));
    Contestant::new("tower-resilience 0.14", move |call| {
        let mut breaker = breaker.clone();
        Box::pin(async move {
            match breaker.call(call).await {
                Ok(()) => Outcome::Well,
                Err(error) if error.is_circuit_open() => Outcome::Refused,
                Err(_) => Outcome::Failed,
            }
        })
    })
}

/// What each breaker does where its users met a fault, as a table.
pub(crate) fn faults() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    // One of them needs a runtime to create its clock.
    let _inside = runtime.enter();
    println!(
        "| | probes of 1,000 | probe cut | probe panics | probe hangs | stale results | hang, cut at 100 ms | left after 1 ms | failures after 100,000 successes |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for make in 0..all(OPEN).len() {
        let fresh = || all(OPEN).swap_remove(make);
        let row = runtime.block_on(async {
            [
                probes_at_once(fresh()).await,
                after_a_probe(fresh(), Probe::Cut).await,
                after_a_probe(fresh(), Probe::Panics).await,
                after_a_probe(fresh(), Probe::Hangs).await,
                stale_results(fresh()).await,
                hangs(all(LONG).swap_remove(make)).await,
                quick_cancels(fresh()).await,
                failures_after_successes(fresh()).await,
            ]
        });
        println!("| {} | {} |", fresh().name, row.join(" | "));
    }
}

/// Brings the breaker to the state open, with a probe due.
async fn due(breaker: &Contestant) {
    breaker.trip(100_000).await;
    sleep(DUE).await;
}

/// How many of a thousand calls reach the callee at once when one probe is due.
async fn probes_at_once(breaker: Contestant) -> String {
    due(&breaker).await;
    let (reached, gate) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
    let calls: Vec<_> = (0..1_000)
        .map(|_| {
            let (reached, gate) = (Arc::clone(&reached), Arc::clone(&gate));
            tokio::spawn((breaker.call)(Box::pin(async move {
                reached.fetch_add(1, SeqCst);
                gate.acquire().await.map(drop).map_err(|_| Sick)
            })))
        })
        .collect();
    sleep(DUE).await;
    gate.add_permits(1_000);
    for call in calls {
        call.await.expect("no call panics");
    }
    reached.load(SeqCst).to_string()
}

#[derive(Clone, Copy, Debug)]
enum Probe {
    Cut,
    Panics,
    Hangs,
}

/// How long it takes after a lost probe until a healthy callee is used again.
async fn after_a_probe(breaker: Contestant, probe: Probe) -> String {
    breaker.trip(100_000).await;
    let mut hung = Vec::new();
    // Three in a row, because some have a slot to lose.
    for _ in 0..3 {
        sleep(DUE).await;
        match probe {
            Probe::Cut => drop(timeout(Duration::from_millis(5), (breaker.call)(Box::pin(pending()))).await),
            Probe::Panics => {
                let call = (breaker.call)(Box::pin(async { panic!("on purpose") }));
                drop(tokio::spawn(call).await);
            }
            Probe::Hangs => hung.push(tokio::spawn((breaker.call)(Box::pin(pending())))),
        }
    }
    sleep(DUE).await;
    let began = Instant::now();
    let mut after = "never (5 s)".to_owned();
    while began.elapsed() < Duration::from_secs(5) {
        if breaker.succeed().await == Outcome::Well {
            after = format!("{} ms", began.elapsed().as_millis());
            break;
        }
        sleep(Duration::from_millis(1)).await;
    }
    hung.iter().for_each(tokio::task::JoinHandle::abort);
    after
}

/// Whether calls that began before the trip, and succeed while a probe is running, close the circuit.
async fn stale_results(breaker: Contestant) -> String {
    let gate = Arc::new(Semaphore::new(0));
    let held = |gate: &Arc<Semaphore>| {
        let gate = Arc::clone(gate);
        tokio::spawn((breaker.call)(Box::pin(async move { gate.acquire().await.map(drop).map_err(|_| Sick) })))
    };
    let stale: Vec<_> = (0..20).map(|_| held(&gate)).collect();
    sleep(Duration::from_millis(5)).await;
    due(&breaker).await;
    let probing = Arc::new(Semaphore::new(0));
    let probe = held(&probing);
    sleep(Duration::from_millis(5)).await;
    gate.add_permits(20);
    for call in stale {
        call.await.expect("no call panics");
    }
    // The one probe is still running: whoever gets in now was let in by a result from before the trip.
    let outcome = breaker.succeed().await;
    probing.add_permits(1);
    drop(probe.await);
    if outcome == Outcome::Well { "close it" } else { "ignored" }.to_owned()
}

/// How many calls of ten seconds reach a callee that hangs, if each is cut after 100 ms. About a hundred is all of them.
async fn hangs(breaker: Contestant) -> String {
    let (began, mut reached) = (Instant::now(), 0);
    while began.elapsed() < Duration::from_secs(10) {
        match timeout(Duration::from_millis(100), (breaker.call)(Box::pin(pending()))).await {
            Err(_) => reached += 1,
            Ok(_) => sleep(Duration::from_millis(20)).await,
        }
    }
    reached.to_string()
}

/// Whether the next caller of a healthy callee is refused after a hundred callers have left after a millisecond each.
async fn quick_cancels(breaker: Contestant) -> String {
    for _ in 0..100 {
        let slow = Box::pin(async { Ok(sleep(Duration::from_millis(50)).await) });
        drop(timeout(Duration::from_millis(1), (breaker.call)(slow)).await);
    }
    if breaker.succeed().await == Outcome::Well { "used" } else { "refused" }.to_owned()
}

/// How many failures it takes to open it after a hundred thousand successes.
async fn failures_after_successes(breaker: Contestant) -> String {
    for _ in 0..100_000 {
        breaker.succeed().await;
    }
    match breaker.trip(200_000).await {
        200_000 => "more than 200,000".to_owned(),
        failures => failures.to_string(),
    }
}

/// Polls a ready future once.
fn now<F: Future>(call: F) -> F::Output {
    match pin!(call).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("the call is ready, and the circuit closed"),
    }
}

/// A closed call around a ready future, with each breaker.
pub(crate) fn calls(c: &mut Criterion) {
    let mut group = c.benchmark_group("call, closed");
    let answer = || async { Ok::<_, Sick>(black_box(1)) };
    let breaker = ours(OPEN);
    group.bench_function("cancel-safe-http-timeout", |b| b.iter(|| black_box(now(breaker.call(answer())).is_ok())));
    let config = BreakerConfig::builder().slow_call(Duration::from_secs(1), 0.5);
    let breaker = CircuitBreaker::new(config.build().expect("the options are in their range"));
    group.bench_function("cancel-safe-http-timeout, slow-call rule", |b| {
        b.iter(|| black_box(now(breaker.call(answer())).is_ok()));
    });
    let policy = failure_policy::consecutive_failures(5, backoff::constant(OPEN));
    let breaker = Config::new().failure_policy(policy).build();
    group.bench_function("failsafe, consecutive failures", |b| {
        b.iter(|| black_box(now(breaker.call(answer())).is_ok()))
    });
    let policy =
        failure_policy::success_rate_over_time_window(0.5, 20, Duration::from_secs(10), backoff::constant(OPEN));
    let breaker = Config::new().failure_policy(policy).build();
    group.bench_function("failsafe, success rate", |b| b.iter(|| black_box(now(breaker.call(answer())).is_ok())));
    let breaker = recloser(OPEN);
    group.bench_function("recloser", |b| b.iter(|| black_box(now(breaker.call(answer())).is_ok())));
    let breaker = rs(OPEN);
    group.bench_function("circuitbreaker-rs", |b| b.iter(|| black_box(now(breaker.call_async(answer)).is_ok())));

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let clock = runtime.block_on(async { tick::Clock::new_tokio() });
    let context = ResilienceContext::<(), Result<i32, Sick>>::new(clock);
    let stack = (
        Seatbelt::layer("breaker", &context)
            .recovery_with(|result, _| if result.is_ok() { RecoveryInfo::never() } else { RecoveryInfo::retry() })
            .rejected_input(|(), _| Err(Sick)),
        Execute::new(async |()| Ok::<_, Sick>(black_box(1))),
    );
    let breaker = stack.into_service();
    group.bench_function("seatbelt", |b| b.iter(|| black_box(now(breaker.execute(())).is_ok())));

    for (name, slow) in [("tower-resilience", false), ("tower-resilience, slow-call rule", true)] {
        let layer = CircuitBreakerLayer::builder().sliding_window_type(SlidingWindowType::CountBased);
        let layer = if slow { layer.slow_call_duration_threshold(Duration::from_secs(1)) } else { layer };
        let layer = layer.build().expect("the options are in their range");
        let mut breaker = layer.layer_fn(tower::service_fn(|()| ready(Ok::<_, Sick>(black_box(1)))));
        group.bench_function(name, |b| b.iter(|| black_box(now(breaker.call(())).is_ok())));
    }
    group.finish();
}
