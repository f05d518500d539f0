//! What one run showed.
//!
//! Invariant: it is told as it was seen; what it means is said by the search.

use std::backtrace::Backtrace;

use crate::failure::Refusal;
use crate::site::Site;

/// What one run showed.
#[derive(Debug, Default)]
pub(crate) struct Visit {
    pub(crate) polls: usize,
    pub(crate) end: End,
    /// Where it waited last: the traces, not yet named, or the name that another process has found.
    pub(crate) traces: Vec<Backtrace>,
    pub(crate) site: Option<Site>,
    /// Where the rival waited.
    pub(crate) rival_traces: Vec<Backtrace>,
    /// How many polls of tasks followed each pending.
    pub(crate) steps: Vec<usize>,
    /// Whether the operation had tasks of its own.
    pub(crate) has_children: bool,
    /// How many tasks the setup left running.
    pub(crate) setup_tasks: usize,
    /// How many sockets the setup left open, where that is known.
    pub(crate) setup_sockets: usize,
    /// How many blocking jobs did not end.
    pub(crate) workers: usize,
    pub(crate) is_unsettled: bool,
    /// Whether the drop took longer than it may.
    pub(crate) is_slow_drop: bool,
    /// Where the critical section began that the code under test has torn.
    pub(crate) torn: Option<Site>,
    pub(crate) failure: Option<Refusal>,
}

/// How the operation ended in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum End {
    /// Before the point, by its own panic or because nothing woke it.
    #[default]
    Failed,
    /// Before the point, with its result.
    Completed,
    /// At the point.
    Dropped,
}
