//! Overtime: how long a due scope waits for the sections inside it. Invariant: when the overtime is over, the scope
//! polls its future once more before it drops it.

use std::panic::catch_unwind;
use std::pin::{Pin, pin};
use std::task::Context;

use tokio::runtime::Handle;
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::hold::Bound;

pub(crate) struct Overtime {
    /// When the scope was found to be due.
    since: Instant,
    alarm: Alarm,
    /// Whether the alarm has rung, so that the future is polled for the last time.
    is_last_call: bool,
}

enum Alarm {
    Unset,
    Set(Pin<Box<Sleep>>),
    /// The runtime has no timer.
    Impossible,
}

impl Overtime {
    pub(crate) fn begin() -> Self {
        Self { since: Instant::now(), alarm: Alarm::Unset, is_last_call: false }
    }

    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// Whether the scope has waited for `bound`. If not, it will be woken at that time; without a timer, never.
    pub(crate) fn is_over(&mut self, bound: Bound, cx: &mut Context<'_>) -> bool {
        self.alarm.set(bound.end(self.since));
        let Alarm::Set(sleep) = &mut self.alarm else { return false };
        if pin!(unconstrained(sleep.as_mut())).poll(cx).is_pending() {
            self.is_last_call = false;
            return false;
        }
        if self.is_last_call {
            return true;
        }
        // A section whose grace ends now was woken in the same instant as this scope, but a future between the two may
        // not have polled it yet. It should end by itself, with an error that its own code can handle.
        self.is_last_call = true;
        cx.waker().wake_by_ref();
        false
    }
}

impl Alarm {
    fn set(&mut self, end: Instant) {
        match self {
            Self::Set(sleep) if sleep.deadline() != end => sleep.as_mut().reset(end),
            // Outside a runtime there is no timer now, but there may be one at the next poll.
            Self::Unset if Handle::try_current().is_ok() => {
                // It panics in a runtime without a timer, and there is no other way to find out. So far a token's scope
                // needs no timer, so it must not begin to panic because a section inside it is late.
                *self = catch_unwind(|| sleep_until(end)).map_or(Self::Impossible, |sleep| Self::Set(Box::pin(sleep)));
            }
            Self::Unset | Self::Set(_) | Self::Impossible => {}
        }
    }
}
