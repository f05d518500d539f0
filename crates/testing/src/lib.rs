//! Drops a future at every await point, deterministically, and checks what is left behind.

mod drive;
mod explore;
mod report;
mod runtime;
mod search;
mod site;
mod tracer;

pub use crate::explore::{Explore, Outcome, Way};
pub use crate::report::{Failure, Report};
pub use crate::site::Site;
