//! Drop guards, cancel scopes with critical sections, and a reaper that finishes what its caller dropped.

mod critical;
mod guard;
mod ledger;
mod reaper;
mod scope;
mod stack;

pub use critical::{Torn, critical, critical_for, on_torn, torn_sections};
pub use guard::{Guard, try_commit_cancel};
pub use reaper::{Deferred, Drain, Reaper, Shield};
pub use scope::{Cancelled, Elapsed, cancellation_point, remaining, timeout, timeout_at, with_token};
