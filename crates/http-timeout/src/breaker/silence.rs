//! Silence: what calls that were cut had waited since the callee last finished an answer.
//!
//! A call that its caller gave up tells two things, and only by how long it had lasted. That it was short tells that the
//! caller was in a hurry; that it was long tells that the callee was quiet. One such call proves little, so they are
//! added up.
//!
//! Invariant: no silence is longer than the time since the first of its calls began, nor than the sum of what they
//! waited: neither a hundred calls cut at once nor two cut an hour apart make a long one.

use super::window::Nanos;

/// A call that was cut sooner has not waited: no callee is expected to answer that fast.
pub(crate) const SHORTEST: Nanos = 20_000_000;

/// A closed circuit does not open on fewer cut calls than this, however long they had waited.
pub(crate) const FEWEST: u32 = 5;

/// The calls that were cut since something was heard.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Silence {
    began: Nanos,
    waited: Nanos,
    pub(crate) cuts: u32,
}

impl Silence {
    pub(crate) const NONE: Self = Self { began: Nanos::MAX, waited: 0, cuts: 0 };

    /// Adds a call that had waited from `began` for as long as `waited`.
    pub(crate) fn add(&mut self, began: Nanos, waited: Nanos) {
        self.began = self.began.min(began);
        self.waited = self.waited.saturating_add(waited);
        self.cuts = self.cuts.saturating_add(1);
    }

    /// How long it has lasted.
    pub(crate) fn length(&self, now: Nanos) -> Nanos {
        now.saturating_sub(self.began).min(self.waited)
    }
}
