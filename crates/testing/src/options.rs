//! The options of an exploration.
//!
//! Invariant: every option has a default and every bound is finite.

use std::time::Duration;

use crate::way::Way;

/// The options of [`Explore`](crate::Explore), whose setters document them.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) budgets: Vec<u32>,
    /// `None` is the default, which depends on the setup.
    pub(crate) ways: Option<Vec<Way>>,
    pub(crate) calls: usize,
    pub(crate) tasks: bool,
    pub(crate) waiting: bool,
    pub(crate) max_points: usize,
    pub(crate) max_polls: usize,
    pub(crate) timeout: Duration,
    pub(crate) paused_time: bool,
    pub(crate) hang_after: Duration,
    pub(crate) settle_for: Duration,
    /// `None` means no limit.
    pub(crate) drop_within: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            budgets: vec![0, 1, 2, 3],
            ways: None,
            calls: 1,
            tasks: true,
            waiting: false,
            max_points: 1_000,
            max_polls: 10_000,
            timeout: Duration::from_secs(120),
            paused_time: false,
            hang_after: Duration::from_secs(10),
            settle_for: Duration::from_millis(5),
            drop_within: None,
        }
    }
}
