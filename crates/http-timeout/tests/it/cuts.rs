//! Calls that their callers cut, on paused time: how long they lasted decides what they say about the callee.

use std::{cell::Cell, future::pending, time::Duration};

use cancel_safe_http_timeout::{
    BreakerConfig, BreakerConfigBuilder, BreakerMap, BreakerWindow, CircuitBreaker, Class, State,
};
use tokio::time::{Instant, advance, sleep, timeout};

const MINUTE: Duration = Duration::from_secs(60);

fn ms(time: u64) -> Duration {
    Duration::from_millis(time)
}

fn breaker(change: impl FnOnce(BreakerConfigBuilder) -> BreakerConfigBuilder) -> CircuitBreaker {
    CircuitBreaker::new(change(BreakerConfig::builder().jitter(0.0)).build().unwrap())
}

/// A callee that takes `time`, or hangs, and callers that wait for it no longer than their patience.
#[derive(Default)]
struct Callee {
    time: Cell<Option<Duration>>,
    reached: Cell<u32>,
}

impl Callee {
    fn taking(time: Duration) -> Self {
        Self { time: Cell::new(Some(time)), reached: Cell::new(0) }
    }

    /// Makes one call; returns whether the breaker let it through.
    async fn call(&self, breaker: &CircuitBreaker, patience: Duration) -> bool {
        let call = async {
            self.reached.set(self.reached.get() + 1);
            match self.time.get() {
                Some(time) => sleep(time).await,
                None => pending().await,
            }
            Ok::<_, ()>(())
        };
        !matches!(timeout(patience, breaker.call(call)).await, Ok(Err(_)))
    }

    /// Makes calls one after another for `time`; a refused caller asks again after 100 ms. Returns true if none was
    /// refused.
    async fn call_for(&self, breaker: &CircuitBreaker, patience: Duration, time: Duration) -> bool {
        let (end, mut never_refused) = (Instant::now() + time, true);
        while Instant::now() < end {
            if !self.call(breaker, patience).await {
                never_refused = false;
                sleep(ms(100)).await;
            }
        }
        never_refused
    }
}

#[tokio::test(start_paused = true)]
async fn callers_that_leave_early_never_open_a_healthy_callee() {
    for (time, patience) in [(ms(50), ms(5)), (ms(5), ms(1)), (ms(300), ms(19))] {
        let (breaker, callee) = (breaker(|c| c), Callee::taking(time));
        assert!(callee.call_for(&breaker, patience, MINUTE).await, "{patience:?}");
        let metrics = breaker.metrics();
        assert_eq!((metrics.state, metrics.trips, metrics.failures), (State::Closed, 0, 0));
        assert!(metrics.cancelled > 1_000, "{metrics:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn callers_that_cut_before_the_usual_answer_never_open_it() {
    for warm_up in [1, 5, 100] {
        let (breaker, callee) = (breaker(|c| c), Callee::taking(ms(100)));
        for _ in 0..warm_up {
            assert!(callee.call(&breaker, ms(500)).await);
        }
        assert!(callee.call_for(&breaker, ms(80), MINUTE).await, "after {warm_up} answers");
    }
}

#[tokio::test(start_paused = true)]
async fn one_long_answer_moves_the_usual_time_by_an_eighth() {
    let (breaker, callee) = (breaker(|c| c), Callee::taking(ms(100)));
    for _ in 0..50 {
        assert!(callee.call(&breaker, ms(500)).await);
    }
    callee.time.set(Some(ms(900)));
    assert!(callee.call(&breaker, ms(2_000)).await);
    // Of 100 ms and 900 ms: 200 ms.
    assert!(callee.call_for(&breaker, ms(198), MINUTE).await);
    assert!(!callee.call_for(&breaker, ms(202), MINUTE).await);
}

#[tokio::test(start_paused = true)]
async fn what_was_ready_at_once_is_no_usual_answer() {
    let (breaker, callee) = (breaker(|c| c), Callee::taking(ms(100)));
    for _ in 0..1_000 {
        breaker.call(async { Ok::<_, ()>("cached") }).await.unwrap();
    }
    assert!(callee.call(&breaker, ms(500)).await);
    for _ in 0..1_000 {
        breaker.call(async { Ok::<_, ()>("cached") }).await.unwrap();
    }
    assert!(callee.call_for(&breaker, ms(80), MINUTE).await);
}

#[tokio::test(start_paused = true)]
async fn a_hang_is_found_in_a_second_whatever_was_heard_before() {
    for answers in [0, 1, 1_000] {
        let (breaker, callee) = (breaker(|c| c), Callee::taking(ms(10)));
        for _ in 0..answers {
            assert!(callee.call(&breaker, ms(100)).await);
        }
        callee.time.set(None);
        let began = Instant::now();
        while breaker.state() == State::Closed {
            assert!(callee.call(&breaker, ms(100)).await);
        }
        assert_eq!(began.elapsed(), ms(1_000), "after {answers} answers");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hung_callee_of_impatient_callers_is_left_alone() {
    let (breaker, callee) = (breaker(|c| c), Callee::default());
    callee.call_for(&breaker, ms(100), Duration::from_secs(5)).await;
    let early = callee.reached.replace(0);
    callee.call_for(&breaker, ms(100), MINUTE).await;
    assert!(early <= 15, "{early} calls until it opened");
    assert!(callee.reached.get() <= 30, "{} calls reached it", callee.reached.get());
    assert!(breaker.metrics().trips >= 3, "{:?}", breaker.metrics());
}

#[tokio::test(start_paused = true)]
async fn a_callee_that_recovers_is_used_again_within_one_open_period() {
    let (breaker, callee) = (breaker(|c| c), Callee::default());
    callee.call_for(&breaker, ms(100), MINUTE * 3).await;
    callee.time.set(Some(ms(10)));
    let began = Instant::now();
    while breaker.state() != State::Closed {
        callee.call_for(&breaker, ms(100), ms(100)).await;
    }
    assert!(began.elapsed() <= MINUTE + ms(200), "{:?}", began.elapsed());
    assert!(callee.call_for(&breaker, ms(100), MINUTE).await);
}

#[tokio::test(start_paused = true)]
async fn an_answer_ends_the_silence_and_an_ignored_result_does_not() {
    let answered = breaker(|c| c);
    for _ in 0..20 {
        for _ in 0..9 {
            assert!(Callee::default().call(&answered, ms(100)).await);
        }
        answered.try_acquire().unwrap().success();
    }
    assert_eq!(answered.state(), State::Closed);

    let ignored = breaker(|c| c);
    for i in 0..10 {
        assert_eq!(ignored.state(), State::Closed, "after {i} cuts");
        assert!(Callee::default().call(&ignored, ms(100)).await);
        _ = ignored.call_with(|_| Class::Ignore, async { Ok::<_, ()>(()) }).await;
    }
    assert_eq!(ignored.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn calls_cut_together_waited_no_longer_than_the_first_of_them() {
    let breaker = breaker(|c| c);
    // A hundred calls of 100 ms each, cut at once: 100 ms of silence, not ten seconds.
    for round in 0..9 {
        let permits: Vec<_> = (0..100).map(|_| breaker.try_acquire().unwrap()).collect();
        advance(ms(100)).await;
        drop(permits);
        assert_eq!(breaker.state(), State::Closed, "after {} ms", round * 100 + 100);
    }
    let permits: Vec<_> = (0..100).map(|_| breaker.try_acquire().unwrap()).collect();
    advance(ms(100)).await;
    drop(permits);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn rare_cuts_do_not_make_the_time_between_them_silent() {
    let breaker = breaker(|c| c);
    // Each waited 30 ms, once a minute: after half an hour that is 0.9 s, and only then it is too much.
    for i in 0..33 {
        assert_eq!(breaker.state(), State::Closed, "after {i} cuts");
        assert!(Callee::default().call(&breaker, ms(30)).await);
        advance(MINUTE).await;
    }
    assert!(Callee::default().call(&breaker, ms(30)).await);
    assert_eq!(breaker.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn four_cut_calls_are_too_few_and_what_they_waited_before_an_answer_does_not_count() {
    let few = breaker(|c| c);
    for _ in 0..4 {
        assert!(Callee::default().call(&few, ms(10_000)).await);
    }
    assert_eq!(few.state(), State::Closed);
    assert!(Callee::default().call(&few, ms(20)).await);
    assert_eq!(few.state(), State::Open);

    let clipped = breaker(|c| c);
    let long: Vec<_> = (0..50).map(|_| clipped.try_acquire().unwrap()).collect();
    let answered = clipped.try_acquire().unwrap();
    advance(ms(20_000)).await;
    answered.success();
    advance(ms(900)).await;
    drop(long);
    assert_eq!(clipped.state(), State::Closed, "they waited 900 ms since the last answer");
}

#[tokio::test(start_paused = true)]
async fn a_call_cut_late_is_a_failure() {
    // The threshold of the slow-call rule, its own threshold, and without either the client's attempt timeout.
    let slow = breaker(|c| c.slow_call(ms(500), 1.0).min_calls(20).silence(None));
    let own = breaker(|c| c.late_after(ms(500)).silence(None));
    for breaker in [slow, own] {
        for _ in 0..100 {
            assert!(Callee::default().call(&breaker, ms(499)).await);
        }
        assert_eq!(breaker.metrics().failures, 0);
        for i in 1..=5 {
            assert_eq!(breaker.state(), State::Closed);
            assert!(Callee::default().call(&breaker, ms(500)).await);
            assert_eq!(breaker.metrics().failures, i);
        }
        assert_eq!(breaker.state(), State::Open);
    }
    let default = breaker(|c| c.silence(None));
    for _ in 0..5 {
        assert!(Callee::default().call(&default, ms(29_999)).await);
    }
    assert_eq!(default.state(), State::Closed);
    for _ in 0..5 {
        assert!(Callee::default().call(&default, ms(30_000)).await);
    }
    assert_eq!(default.state(), State::Open);
}

/// Open by failures, and due for a probe.
async fn due(change: impl FnOnce(BreakerConfigBuilder) -> BreakerConfigBuilder) -> CircuitBreaker {
    let breaker = breaker(change);
    for _ in 0..5 {
        breaker.try_acquire().unwrap().failure();
    }
    assert_eq!(breaker.state(), State::Open);
    advance(Duration::from_secs(5)).await;
    breaker
}

#[tokio::test(start_paused = true)]
async fn half_the_silence_or_a_lease_opens_a_half_open_circuit_again() {
    for (lease, cuts) in [(None, 5), (Some(ms(300)), 3), (Some(ms(10_000)), 5)] {
        let breaker = due(|c| if let Some(lease) = lease { c.lease(lease) } else { c }).await;
        for i in 0..cuts {
            assert_ne!((i, breaker.state()), (1, State::Open), "{lease:?}");
            assert!(Callee::default().call(&breaker, ms(100)).await, "probe {i} with {lease:?}");
        }
        let metrics = breaker.metrics();
        assert_eq!((metrics.state, metrics.trips), (State::Open, 2), "{lease:?}");
        assert_eq!(breaker.try_acquire().unwrap_err().retry_after, Duration::from_secs(10), "the wait has doubled");
    }
}

#[tokio::test(start_paused = true)]
async fn hung_probes_do_not_pile_up() {
    let breaker = due(|c| c.lease(ms(1_000))).await;
    let mut hung = Vec::new();
    for _ in 0..600 {
        hung.extend(breaker.try_acquire());
        advance(ms(1_000)).await;
    }
    assert!(hung.len() <= 15, "{} probes hang", hung.len());
    assert_eq!(breaker.metrics().trips as usize, hung.len() + 1);
}

#[tokio::test(start_paused = true)]
async fn some_of_the_probes_may_suffice() {
    let breaker = due(|c| c.probes(5).probes_needed(3)).await;
    let probes: Vec<_> = (0..5).map(|_| breaker.try_acquire().unwrap()).collect();
    assert!(breaker.try_acquire().is_err());
    for (i, probe) in probes.into_iter().enumerate() {
        assert_eq!(breaker.state(), State::HalfOpen, "before result {i}");
        if i % 2 == 1 { probe.failure() } else { probe.success() }
    }
    assert_eq!(breaker.state(), State::Closed);

    let breaker = due(|c| c.probes(5).probes_needed(3)).await;
    for i in 0..3 {
        assert_ne!(breaker.state(), State::Closed, "before failure {i}");
        breaker.try_acquire().unwrap().failure();
    }
    assert_eq!(breaker.state(), State::Open, "two are left of which three would have to succeed");
}

#[tokio::test(start_paused = true)]
async fn a_success_may_complete_the_minimum() {
    for window in [BreakerWindow::Count(5), BreakerWindow::Time(Duration::from_secs(10))] {
        let rules = |c: BreakerConfigBuilder| c.window(window).min_calls(5).consecutive_failures(None);
        let failing = breaker(rules);
        for fails in [true, true, true, false, false] {
            assert_eq!(failing.state(), State::Closed);
            let permit = failing.try_acquire().unwrap();
            if fails { permit.failure() } else { permit.success() }
        }
        assert_eq!((failing.metrics().failure_rate(), failing.state()), (Some(0.6), State::Open));

        let slow = breaker(|c| rules(c).failure_rate(None).slow_call(ms(100), 0.5));
        for is_slow in [true, true, true, false, false] {
            assert_eq!(slow.state(), State::Closed);
            let permit = slow.try_acquire().unwrap();
            advance(if is_slow { ms(100) } else { ms(1) }).await;
            permit.success();
        }
        assert_eq!((slow.metrics().slow_calls, slow.state()), (3, State::Open));

        let well = breaker(rules);
        for fails in [true, true, false, false, false, false, false, true, true] {
            let permit = well.try_acquire().unwrap();
            if fails { permit.failure() } else { permit.success() }
        }
        assert_eq!(well.state(), State::Closed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_success_may_complete_the_minimum_after_the_window_has_slid() {
    let breaker = breaker(|c| c.min_calls(20).consecutive_failures(None));
    let call = |fails: bool| {
        let permit = breaker.try_acquire().unwrap();
        if fails { permit.failure() } else { permit.success() }
    };
    (0..20).for_each(|_| call(false));
    advance(ms(5_000)).await;
    (0..12).for_each(|_| call(true));
    call(false);
    assert_eq!(breaker.state(), State::Closed, "12 of 33");
    // The first successes leave the window: 12 failures of 13, and seven successes complete the minimum at 60 %.
    advance(ms(5_000)).await;
    for i in 0..7 {
        assert_eq!((breaker.state(), breaker.metrics().calls), (State::Closed, 13 + i));
        call(false);
    }
    assert_eq!(breaker.state(), State::Open);
}

#[test]
fn a_map_forgets_closed_breakers_before_open_ones() {
    for names in [1, 8, 63] {
        let map: BreakerMap<String> = BreakerMap::new(BreakerConfig::default(), 64);
        for name in 0..names {
            for _ in 0..5 {
                map.get(&format!("dead {name}")).try_acquire().unwrap().failure();
            }
        }
        for name in 0..1_000 {
            map.get(&format!("well {name}")).try_acquire().unwrap().success();
            assert!(map.len() <= 64);
        }
        assert_eq!(map.open().len(), names);
    }
}

#[tokio::test(start_paused = true)]
async fn a_map_of_open_breakers_forgets_one_at_a_time_and_those_long_due_first() {
    let map: BreakerMap<u32> = BreakerMap::new(BreakerConfig::builder().jitter(0.0).build().unwrap(), 16);
    let fail = |name: u32| (0..5).for_each(|_| map.get(&name).try_acquire().unwrap().failure());
    (0..16).for_each(fail);
    fail(16);
    assert_eq!((map.len(), map.open().len()), (16, 16));
    // Open for 5 s, and not asked for a minute after that: it knows no more than a closed one would.
    advance(Duration::from_secs(65)).await;
    (20..30).for_each(fail);
    assert!((20..30).all(|name| map.open().contains(&name)));
}
