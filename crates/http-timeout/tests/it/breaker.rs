//! The breaker around futures, on paused time: the mistakes of other breakers.

use std::{
    future::pending,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cancel_safe_http_timeout::{
    BreakerConfig, BreakerConfigBuilder, BreakerError, BreakerWindow, CircuitBreaker, Class, State,
};
use tokio::{sync::Semaphore, time::timeout};

const OPEN: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(60);
const LEASE: Duration = Duration::from_secs(3);

fn config() -> BreakerConfigBuilder {
    BreakerConfig::builder().open_for(OPEN, LONGEST).jitter(0.0).lease(LEASE)
}

fn breaker(config: BreakerConfigBuilder) -> CircuitBreaker {
    CircuitBreaker::new(config.build().unwrap())
}

async fn fail(breaker: &CircuitBreaker) {
    assert!(breaker.call(async { Err::<(), _>("sick") }).await.is_err());
}

async fn succeed(breaker: &CircuitBreaker) {
    breaker.call(async { Ok::<_, ()>(()) }).await.unwrap();
}

/// Trips it with failures in a row, and waits until it lets a probe in.
async fn due(config: BreakerConfigBuilder) -> CircuitBreaker {
    let breaker = breaker(config);
    for _ in 0..5 {
        fail(&breaker).await;
    }
    assert_eq!(breaker.state(), State::Open);
    tokio::time::advance(OPEN).await;
    breaker
}

#[tokio::test(start_paused = true)]
async fn of_a_thousand_calls_only_the_probes_reach_the_backend() {
    for probes in [1, 3] {
        let breaker = due(config().probes(probes)).await;
        let (reached, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
        let calls: Vec<_> = (0..1_000)
            .map(|_| {
                let (breaker, reached, gate) = (breaker.clone(), Arc::clone(&reached), Arc::clone(&gate));
                tokio::spawn(async move {
                    let call = async {
                        reached.fetch_add(1, Ordering::SeqCst);
                        gate.acquire().await.map(drop)
                    };
                    breaker.call(call).await.is_ok()
                })
            })
            .collect();
        while breaker.metrics().rejected < 1_000 - u64::from(probes) {
            tokio::task::yield_now().await;
        }
        assert_eq!(reached.load(Ordering::SeqCst), probes as usize);
        assert_eq!(breaker.metrics().probes, probes);
        gate.add_permits(probes as usize);
        let mut succeeded = 0;
        for call in calls {
            succeeded += u32::from(call.await.unwrap());
        }
        assert_eq!((succeeded, breaker.state()), (probes, State::Closed));
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_probe_gives_its_slot_back_at_once() {
    let breaker = due(config()).await;
    for _ in 0..10 {
        let cut = timeout(Duration::from_millis(1), breaker.call(pending::<Result<(), ()>>())).await;
        assert!(cut.is_err(), "the probe was refused: {cut:?}");
        assert_eq!((breaker.state(), breaker.metrics().probes), (State::HalfOpen, 0));
    }
    succeed(&breaker).await;
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_panics_opens_again_and_the_next_one_is_let_in() {
    let breaker = due(config().backoff(1.0)).await;
    let probe = breaker.clone();
    let panicked =
        tokio::spawn(
            async move { probe.call(async { if true { panic!("on purpose") } else { Ok::<(), ()>(()) } }).await },
        );
    assert!(panicked.await.unwrap_err().is_panic());
    assert_eq!(breaker.state(), State::Open);
    tokio::time::advance(OPEN).await;
    succeed(&breaker).await;
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_hung_probe_fails_at_the_end_of_its_lease_and_its_late_result_is_ignored() {
    let breaker = due(config()).await;
    let hung = breaker.try_acquire().unwrap();
    tokio::time::advance(LEASE / 3).await;
    let refused = breaker.try_acquire().unwrap_err();
    assert_eq!(refused.retry_after, LEASE - LEASE / 3);
    tokio::time::advance(refused.retry_after).await;
    assert_eq!((breaker.state(), breaker.metrics().probes, breaker.metrics().trips), (State::Open, 0, 2));
    // The wait is counted from the end of the lease, whenever that is noticed, and it has grown.
    tokio::time::advance(OPEN).await;
    assert_eq!(breaker.try_acquire().unwrap_err().retry_after, OPEN);
    tokio::time::advance(OPEN).await;
    let next = breaker.try_acquire().unwrap();
    hung.success();
    assert_eq!((breaker.state(), breaker.metrics().probes), (State::HalfOpen, 1));
    next.success();
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_hung_probe_that_nobody_noticed_costs_no_more_than_its_wait() {
    let breaker = due(config()).await;
    let hung = breaker.try_acquire().unwrap();
    tokio::time::advance(LEASE + OPEN * 2).await;
    breaker.try_acquire().unwrap().success();
    drop(hung);
    assert_eq!((breaker.state(), breaker.metrics().trips), (State::Closed, 2));
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_starts_late_has_a_lease_of_its_own() {
    let breaker = due(config().probes(2)).await;
    breaker.try_acquire().unwrap().success();
    tokio::time::advance(2 * LEASE).await;
    let second = breaker.try_acquire().unwrap();
    let refused = breaker.try_acquire().unwrap_err();
    assert_eq!(refused.retry_after, LEASE);
    second.success();
    assert_eq!(breaker.state(), State::Closed);
}

#[tokio::test(start_paused = true)]
async fn results_from_before_the_trip_change_nothing_after_it() {
    let breaker = breaker(config());
    let stale: Vec<_> = (0..40).map(|_| breaker.try_acquire().unwrap()).collect();
    for _ in 0..5 {
        fail(&breaker).await;
    }
    tokio::time::advance(OPEN).await;
    let probe = breaker.try_acquire().unwrap();
    for (i, permit) in stale.into_iter().enumerate() {
        match i % 4 {
            0 => permit.success(),
            1 => permit.failure(),
            2 => permit.ignore(),
            _ => drop(permit),
        }
        assert_eq!((breaker.state(), breaker.metrics().probes), (State::HalfOpen, 1));
    }
    probe.success();
    let metrics = breaker.metrics();
    assert_eq!((metrics.state, metrics.calls, metrics.failures, metrics.trips), (State::Closed, 0, 0, 1));
}

#[tokio::test(start_paused = true)]
async fn a_count_window_slides_after_a_million_successes() {
    let window = config().window(BreakerWindow::Count(100)).min_calls(100).consecutive_failures(None);
    let breaker = breaker(window);
    for _ in 0..1_000_000 {
        succeed(&breaker).await;
    }
    for failures in 1..=50 {
        assert_eq!(breaker.state(), State::Closed, "after {failures} failures");
        fail(&breaker).await;
    }
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn a_time_window_forgets_what_is_older_than_itself() {
    let breaker = breaker(config().consecutive_failures(None));
    for _ in 0..1_000 {
        succeed(&breaker).await;
    }
    tokio::time::advance(Duration::from_secs(9)).await;
    assert_eq!(breaker.metrics().calls, 1_000);
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(breaker.metrics().calls, 0);
    for _ in 0..20 {
        assert_eq!(breaker.state(), State::Closed);
        fail(&breaker).await;
    }
    assert_eq!(breaker.state(), State::Open);
    assert_eq!(breaker.metrics().failure_rate(), Some(1.0), "the window that tripped it can still be read");
}

#[tokio::test(start_paused = true)]
async fn slow_calls_trip_it_and_so_do_cancelled_ones_that_were_slow() {
    let slow = Duration::from_secs(2);
    for cancelled in [false, true] {
        let breaker = breaker(config().consecutive_failures(None).slow_call(slow, 0.5));
        for i in 0..20 {
            assert_eq!(breaker.state(), State::Closed, "after {i} calls");
            let permit = breaker.try_acquire().unwrap();
            if i % 2 == 1 {
                tokio::time::advance(slow).await;
            }
            if cancelled && i % 2 == 1 {
                drop(permit)
            } else {
                permit.success()
            }
            // Only calls in the window of ten seconds count: keep all of them there.
            if i == 7 {
                assert_eq!(breaker.metrics().slow_calls, 4);
            }
        }
        // 20 s passed, so the window never held 20 calls; with a wider one it trips.
        assert_eq!(breaker.state(), State::Closed);
    }
    for cancelled in [false, true] {
        let wide = BreakerWindow::Time(Duration::from_secs(100));
        let breaker = breaker(config().window(wide).consecutive_failures(None).slow_call(slow, 0.5));
        for i in 0..20 {
            assert_eq!(breaker.state(), State::Closed, "after {i} calls");
            let permit = breaker.try_acquire().unwrap();
            if i % 2 == 1 {
                tokio::time::advance(slow).await;
            }
            if cancelled && i % 2 == 1 { drop(permit) } else { permit.success() }
        }
        assert_eq!(breaker.state(), State::Open);
    }
}

#[tokio::test(start_paused = true)]
async fn the_wait_grows_to_its_cap_and_starts_again_after_recovery() {
    let breaker = due(config().open_for(OPEN, OPEN * 3)).await;
    for wait in [OPEN * 2, OPEN * 3, OPEN * 3] {
        fail(&breaker).await;
        assert_eq!(breaker.try_acquire().unwrap_err().retry_after, wait);
        tokio::time::advance(wait).await;
    }
    succeed(&breaker).await;
    for _ in 0..5 {
        fail(&breaker).await;
    }
    assert_eq!(breaker.try_acquire().unwrap_err().retry_after, OPEN);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_breakers_do_not_recover_in_step() {
    let mut waits = Vec::new();
    for _ in 0..1_000 {
        let breaker = breaker(config().jitter(0.2));
        for _ in 0..5 {
            fail(&breaker).await;
        }
        waits.push(breaker.try_acquire().unwrap_err().retry_after);
    }
    waits.sort();
    waits.dedup();
    assert!(waits.len() > 900, "only {} different waits", waits.len());
    let (first, last) = (waits[0], *waits.last().unwrap());
    assert!(first >= OPEN.mul_f64(0.8) && last <= OPEN.mul_f64(1.2), "{first:?} to {last:?}");
    assert!(last - first > OPEN / 4, "{first:?} to {last:?}");
}

#[tokio::test(start_paused = true)]
async fn isolate_refuses_and_reset_admits_whatever_the_state() {
    let breaker = due(config()).await;
    let probe = breaker.try_acquire().unwrap();
    breaker.isolate();
    tokio::time::advance(OPEN * 100).await;
    assert!(breaker.call(async { Ok::<_, ()>(()) }).await.unwrap_err().is_open());
    probe.success();
    assert_eq!(breaker.state(), State::Isolated);
    breaker.reset();
    succeed(&breaker).await;
    assert_eq!((breaker.state(), breaker.metrics().calls), (State::Closed, 1));
}

#[tokio::test(start_paused = true)]
async fn the_hook_is_told_every_change_and_may_use_the_breaker() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&told);
    let breaker = due(config().on_transition(move |change| list.lock().unwrap().push((change.from, change.to)))).await;
    succeed(&breaker).await;
    breaker.isolate();
    breaker.isolate();
    breaker.reset();
    let changes = [
        (State::Closed, State::Open),
        (State::Open, State::HalfOpen),
        (State::HalfOpen, State::Closed),
        (State::Closed, State::Isolated),
        (State::Isolated, State::Closed),
    ];
    assert_eq!(*told.lock().unwrap(), changes);
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_panics_loses_no_slot() {
    let breaker = due(config().on_transition(|change| assert!(change.to != State::HalfOpen, "on purpose"))).await;
    let probe = breaker.clone();
    assert!(tokio::spawn(async move { probe.call(async { Ok::<_, ()>(()) }).await }).await.unwrap_err().is_panic());
    assert_eq!(breaker.metrics().probes, 0);
}

#[tokio::test]
async fn the_classifier_decides_and_an_unpolled_call_asks_nothing() {
    let breaker = breaker(config());
    for _ in 0..10 {
        let result = breaker.call_with(|_| Class::Ignore, async { Err::<(), _>("nothing to do with it") }).await;
        assert!(matches!(result, Err(BreakerError::Inner("nothing to do with it"))));
        drop(breaker.call(async { Err::<(), _>("never polled") }));
    }
    let metrics = breaker.metrics();
    assert_eq!((metrics.state, metrics.calls, metrics.cancelled), (State::Closed, 0, 0));
}
