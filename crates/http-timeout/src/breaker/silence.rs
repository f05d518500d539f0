//! Silence: how long cut calls had waited since the callee last finished an answer.
//!
//! A call that its caller gave up tells something only by its length. A short one shows that the caller was in a hurry;
//! a long one shows that the callee was quiet. One such call proves little, so they are added up.
//!
//! Invariant: no silence is longer than the time since its first call began, nor longer than the sum of the waits:
//! neither a hundred calls cut at once nor two calls cut an hour apart make a long one.

use super::window::Nanos;

/// A call cut sooner than this has not waited, because no callee is expected to answer that fast.
pub(crate) const SHORTEST: Nanos = 20_000_000;

/// A closed circuit does not open on fewer cut calls than this, however long they had waited.
pub(crate) const FEWEST: u32 = 5;

/// The calls cut since the callee was last heard.
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
