//! When no item starts, although there are slots and items.
//!
//! Invariant: a run that waits as a whole goes on by itself, with one item first, so that a limit that is still there is
//! met once and not by all.

use std::{
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::Instant;

use crate::{error::TaskError, timer::Timer};

/// So many deferrals in a row, if no more than half as many items run at once, and the run waits as a whole.
const LEAST_DEFERRALS: u32 = 16;
/// The first wait after them. It doubles up to the shortest time that was asked for.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The others follow the first item after a pause when it has ended, at the latest after this time.
const OTHERS_FOLLOW_AFTER: Duration = Duration::from_secs(1);

/// Whether items may start.
#[derive(Debug)]
pub(crate) struct Gate {
    state: State,
    timer: Timer,
    /// How many attempts were started so far: their numbers.
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
    /// The number of the next attempt when it began, and how many before it are still running.
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

    /// Becomes ready when an item may start, and says whether a pause has just ended.
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

    /// An item takes its slot.
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

    /// No item starts before this time, or a later one that was said before.
    pub(crate) fn close(&mut self, until: Instant) -> Instant {
        let until = match self.state {
            State::Closed { until: before } => before.max(until),
            State::Open | State::OneFirst { .. } => until,
        };
        self.state = State::Closed { until };
        until
    }

    /// An attempt has ended, and not by deferring its item.
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

    /// An attempt has deferred its item, while so many run. Returns for how long the run as a whole should wait: items
    /// that are all told the same need not all ask again.
    pub(crate) fn attempt_deferred(&mut self, number: u64, wait: Duration, running: usize) -> Option<Duration> {
        self.let_others_follow(number);
        let from = self.launched;
        let begun = || Streak { deferrals: 0, from, elders: running + 1, shortest: wait, wait: FIRST_WAIT };
        let streak = self.streak.get_or_insert_with(begun);
        streak.deferrals = streak.deferrals.saturating_add(1);
        streak.shortest = streak.shortest.min(wait);
        // Not before what ran when the streak began has ended: it may be about to succeed.
        streak.elders -= usize::from(number < streak.from && streak.elders > 0);
        if streak.deferrals < self.enough || streak.elders > 0 || streak.shortest.is_zero() {
            return None;
        }
        let wait = streak.wait.min(streak.shortest);
        streak.wait = streak.wait.saturating_mul(2);
        Some(wait)
    }
}
