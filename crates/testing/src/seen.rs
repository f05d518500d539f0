//! What one run showed.
//!
//! Invariant: it records only what was seen; the search decides what that means.

use std::backtrace::Backtrace;

use crate::failure::Refusal;
use crate::site::Site;

/// What one run showed.
#[derive(Debug, Default)]
pub(crate) struct Visit {
    pub(crate) polls: usize,
    pub(crate) end: End,
    /// Where it last waited: the traces, not yet named, or the name that another process has found.
    pub(crate) traces: Vec<Backtrace>,
    pub(crate) site: Option<Site>,
    /// Where the rival waited.
    pub(crate) rival_traces: Vec<Backtrace>,
    /// How many task polls followed each pending.
    pub(crate) steps: Vec<usize>,
    /// Whether the operation had its own tasks.
    pub(crate) has_children: bool,
    /// How many tasks the setup left running.
    pub(crate) setup_tasks: usize,
    /// How many sockets the setup left open, if that is known.
    pub(crate) setup_sockets: usize,
    /// How many blocking jobs did not end.
    pub(crate) workers: usize,
    pub(crate) is_unsettled: bool,
    /// Whether the drop took longer than allowed.
    pub(crate) is_slow_drop: bool,
    /// Where the critical section torn by the code under test began.
    pub(crate) torn: Option<Site>,
    pub(crate) failure: Option<Refusal>,
}

/// How the operation ended in a run.
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
