//! The gate that keeps items from starting although there are free slots.
//!
//! Invariant: a run that waits as a whole resumes by itself, with one item first, so that a limit that still holds is
//! hit once and not by all items.

use std::{
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::Instant;

use crate::{error::TaskError, timer::Timer};

/// After this many deferrals in a row, or twice as many as run at once if that is more, the run waits as a whole.
const LEAST_DEFERRALS: u32 = 16;
/// The first wait after them. It doubles up to the shortest requested time.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// After a pause, the other items follow when the first one has ended, or after this time at the latest.
const OTHERS_FOLLOW_AFTER: Duration = Duration::from_secs(1);

/// Whether items may start.
#[derive(Debug)]
pub(crate) struct Gate {
    state: State,
    timer: Timer,
    /// How many attempts have started so far. It numbers them.
    launched: u64,
    enough: u32,
    streak: Option<Streak>,
}

#[derive(Clone, Copy, Debug)]
enum State {
    Open,
    Closed {
        until: Instant,
    },
    /// One item goes first: an attempt of this number or a later one.
    OneFirst {
        number: u64,
        has_gone: bool,
        others_from: Instant,
    },
}

/// Deferrals in a row: no other attempt has ended since the first of them.
#[derive(Debug)]
struct Streak {
    deferrals: u32,
    /// The number of the next attempt when the streak began, and how many earlier attempts are still running.
    from: u64,
    elders: usize,
    shortest: Duration,
    wait: Duration,
}

impl Gate {
    pub(crate) fn new(concurrency: usize) -> Self {
        let enough = u32::try_from(concurrency).unwrap_or(u32::MAX).saturating_mul(2).max(LEAST_DEFERRALS);
        Self { state: State::Open, timer: Timer::default(), launched: 0, enough, streak: None }
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed { .. })
    }

    /// Becomes ready when an item may start, and returns whether a pause has just ended.
    #[inline]
    pub(crate) fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, TaskError>> {
        if let State::Open = self.state { Poll::Ready(Ok(false)) } else { self.poll_held(cx) }
    }

    fn poll_held(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, TaskError>> {
        let (now, was_closed) = (Instant::now(), self.is_closed());
        if let State::Closed { until } = self.state {
            ready!(self.poll_until(until, now, cx))?;
            let others_from = now + OTHERS_FOLLOW_AFTER;
            self.state = State::OneFirst { number: self.launched, has_gone: false, others_from };
        }
        if let State::OneFirst { has_gone: true, others_from, .. } = self.state {
            ready!(self.poll_until(others_from, now, cx))?;
            self.state = State::Open;
        }
        Poll::Ready(Ok(was_closed))
    }

    fn poll_until(&mut self, until: Instant, now: Instant, cx: &mut Context<'_>) -> Poll<Result<(), TaskError>> {
        if until <= now {
            return Poll::Ready(Ok(()));
        }
        self.timer.set(until)?;
        self.timer.poll(cx).map(Ok)
    }

    /// Notes that an item takes its slot.
    #[inline]
    pub(crate) fn item_starts(&mut self) {
        if let State::OneFirst { has_gone, .. } = &mut self.state {
            *has_gone = true;
        }
    }

    /// Numbers an attempt.
    #[inline]
    pub(crate) fn launch(&mut self) -> u64 {
        let number = self.launched;
        self.launched += 1;
        number
    }

    /// Starts no item before this time, or before a later time given earlier. Returns the later one.
    pub(crate) fn close(&mut self, until: Instant) -> Instant {
        let until = match self.state {
            State::Closed { until: before } => before.max(until),
            State::Open | State::OneFirst { .. } => until,
        };
        self.state = State::Closed { until };
        until
    }

    /// Notes that an attempt has ended without deferring its item.
    #[inline]
    pub(crate) fn attempt_ended(&mut self, number: u64) {
        self.streak = None;
        self.let_others_follow(number);
    }

    fn let_others_follow(&mut self, ended: u64) {
        if let State::OneFirst { number, .. } = self.state
            && ended >= number
        {
            self.state = State::Open;
        }
    }

    /// Notes that an attempt has deferred its item while `running` items run. Returns how long the run as a whole
    /// should wait: if all items get the same answer, they need not all ask again.
    pub(crate) fn attempt_deferred(&mut self, number: u64, wait: Duration, running: usize) -> Option<Duration> {
        self.let_others_follow(number);
        let from = self.launched;
        let begun = || Streak { deferrals: 0, from, elders: running + 1, shortest: wait, wait: FIRST_WAIT };
        let streak = self.streak.get_or_insert_with(begun);
        streak.deferrals = streak.deferrals.saturating_add(1);
        streak.shortest = streak.shortest.min(wait);
        // Not before the attempts that ran when the streak began have ended: one may be about to succeed.
        streak.elders -= usize::from(number < streak.from && streak.elders > 0);
        if streak.deferrals < self.enough || streak.elders > 0 || streak.shortest.is_zero() {
            return None;
        }
        let wait = streak.wait.min(streak.shortest);
        streak.wait = streak.wait.saturating_mul(2);
        Some(wait)
    }
}
