//! Drops a future at every await point, deterministically, and checks what is left behind.

mod crash;
mod drive;
mod explore;
mod report;
mod runtime;
mod scratch;
mod search;
mod site;
mod tracer;
mod visit;

pub use crate::explore::{Explore, Outcome, Way};
pub use crate::report::{Failure, Report};
pub use crate::scratch::scratch_dir;
pub use crate::site::Site;
