//! How fast items have finished recently.
//!
//! Invariant: only a finished item changes the rate, so it stands still while one slow item runs. It follows a change
//! of speed as soon as the window holds only the new speed.

use std::time::Duration;

use tokio::time::Instant;

/// The window for the rate, once it holds enough items.
const WINDOW: Duration = Duration::from_secs(20);
/// With fewer items than this in the window, it reaches further back.
const LEAST_ITEMS: u64 = 4;
/// How many steps are remembered. Two steps are at least this part of the window apart, which is also the precision.
const STEPS: usize = 16;
const STEP: Duration = Duration::from_millis(2_000);

/// How many items had finished after this much working time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Step {
    worked: Duration,
    items: u64,
}

/// A window over the last items. Small and flat, because each published progress has a copy.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Rate {
    /// When the working time began, or would have begun without the pauses.
    begun: Option<Instant>,
    halted: Option<Instant>,
    steps: [Step; STEPS],
    /// How many steps are remembered, the oldest first.
    length: usize,
    last: Step,
}

impl Rate {
    pub(crate) fn begun(now: Instant) -> Self {
        Self { begun: Some(now), length: 1, ..Self::default() }
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.begun.is_some()
    }

    /// Stops the working time.
    pub(crate) fn halt(&mut self, now: Instant) {
        self.halted = self.halted.or(Some(now));
    }

    pub(crate) fn go_on(&mut self, now: Instant) {
        if let (Some(begun), Some(halted)) = (self.begun, self.halted.take()) {
            self.begun = Some(begun + now.saturating_duration_since(halted));
        }
    }

    /// Notes how many items in all have finished by now.
    pub(crate) fn count(&mut self, now: Instant, items: u64) {
        let Some(begun) = self.begun else { return };
        if items <= self.last.items {
            return;
        }
        let worked = self.halted.unwrap_or(now).saturating_duration_since(begun);
        self.last = Step { worked, items };
        if worked.saturating_sub(self.steps[self.length - 1].worked) >= STEP {
            if self.length == STEPS {
                self.forget_first();
            }
            self.steps[self.length] = self.last;
            self.length += 1;
        }
        // The first step is the youngest that is old enough.
        while self.length > 1
            && worked.saturating_sub(self.steps[1].worked) >= WINDOW
            && items - self.steps[1].items >= LEAST_ITEMS
        {
            self.forget_first();
        }
    }

    fn forget_first(&mut self) {
        self.steps.copy_within(1..self.length, 0);
        self.length -= 1;
    }

    pub(crate) fn per_second(&self) -> f64 {
        let seconds = self.last.worked.saturating_sub(self.steps[0].worked).as_secs_f64();
        if seconds > 0.0 { (self.last.items - self.steps[0].items) as f64 / seconds } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Finishes items one after the other, each after a time, and returns what the rate is then.
    fn after(rate: &mut Rate, now: &mut Instant, items: &mut u64, each: Duration, count: u64) -> f64 {
        for _ in 0..count {
            *now += each;
            *items += 1;
            rate.count(*now, *items);
        }
        rate.per_second()
    }

    #[test]
    fn a_minute_after_any_change_of_speed_the_rate_is_the_new_one() {
        let times = [1u64, 10, 100, 1_000, 10_000].map(Duration::from_millis);
        for before in times {
            for behind in times {
                let (mut now, mut items) = (Instant::now(), 0);
                let mut rate = Rate::begun(now);
                let minutes = |of: Duration, n: u32| u64::from(n) * 60_000 / of.as_millis() as u64;
                after(&mut rate, &mut now, &mut items, before, minutes(before, 10));
                let seen = after(&mut rate, &mut now, &mut items, behind, minutes(behind, 1));
                let truth = 1.0 / behind.as_secs_f64();
                assert!((seen / truth - 1.0).abs() < 0.1, "{before:?}, then {behind:?}: {seen} instead of {truth}");
            }
        }
    }

    #[test]
    fn half_a_minute_after_a_slow_down_the_rate_is_no_longer_that_of_before() {
        let (mut now, mut items) = (Instant::now(), 0);
        let mut rate = Rate::begun(now);
        after(&mut rate, &mut now, &mut items, Duration::from_millis(1), 1_000);
        let seen = after(&mut rate, &mut now, &mut items, Duration::from_millis(100), 300);
        assert!((seen / 10.0 - 1.0).abs() < 0.1, "{seen} instead of 10");
    }

    #[test]
    fn the_rate_stands_still_while_nothing_is_finished_and_does_not_count_a_pause() {
        let (mut now, mut items) = (Instant::now(), 0);
        let mut rate = Rate::begun(now);
        let before = after(&mut rate, &mut now, &mut items, Duration::from_millis(100), 1_000);
        now += Duration::from_secs(600);
        rate.count(now, items);
        assert_eq!(rate.per_second(), before);
        let mut paused = rate;
        paused.halt(now - Duration::from_secs(600));
        paused.go_on(now);
        let behind = after(&mut paused, &mut now, &mut items, Duration::from_millis(100), 10);
        assert!((behind / before - 1.0).abs() < 0.01, "{before}, after the pause {behind}");
    }

    #[test]
    fn items_that_come_in_heaps_have_the_rate_of_the_heaps() {
        let (mut now, mut items) = (Instant::now(), 0);
        let mut rate = Rate::begun(now);
        for _ in 0..100 {
            now += Duration::from_secs(10);
            items += 64;
            rate.count(now, items);
            assert!((rate.per_second() / 6.4 - 1.0).abs() < 0.01);
        }
    }
}
