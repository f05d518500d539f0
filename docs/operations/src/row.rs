//! One line of the page: an operation, what its documentation says, and how to find out.
//!
//! Invariant: no measured verdict is written down here; it comes from an exploration.

use std::time::Duration;

use cancel_safe_testing::{Explore, Report};

/// The section of `tokio::select!` that lists operations of all kinds.
pub(crate) const SELECT: &str = "macro.select.html#cancellation-safety";

/// Where an operation comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    Tokio,
    TokioUtil,
    FuturesUtil,
    FuturesChannel,
}

impl From {
    pub(crate) const ALL: [Self; 4] = [Self::Tokio, Self::TokioUtil, Self::FuturesUtil, Self::FuturesChannel];

    pub(crate) fn package(self) -> &'static str {
        match self {
            Self::Tokio => "tokio",
            Self::TokioUtil => "tokio-util",
            Self::FuturesUtil => "futures-util",
            Self::FuturesChannel => "futures-channel",
        }
    }
}

/// What the documentation says about a dropped call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Says {
    Safe,
    NotSafe,
    /// A message is not sent, and is lost if it was moved.
    NotSent,
    /// Nothing is lost but the place in a queue; `tokio::select!` counts that as not safe.
    Place,
    Nothing,
}

/// An operation and its exploration.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) from: From,
    /// The operation's name in its documentation.
    pub(crate) name: &'static str,
    /// How it was called, where that matters.
    pub(crate) how: &'static str,
    /// Its page, relative to the crate's documentation.
    pub(crate) page: &'static str,
    pub(crate) says: Says,
    /// The package and page that say it, if not the operation's own.
    pub(crate) said_at: Option<(From, &'static str)>,
    pub(crate) instead: &'static str,
    /// What a reader has to know beyond the verdicts. If the verdicts differ, there must be a note.
    pub(crate) note: &'static str,
    pub(crate) judge: fn() -> Report,
}

/// The operations of one table.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) title: &'static str,
    pub(crate) rows: Vec<Row>,
}

impl Row {
    pub(crate) fn tokio(name: &'static str, page: &'static str, judge: fn() -> Report) -> Self {
        Self::new(From::Tokio, name, page, judge)
    }

    pub(crate) fn tokio_util(name: &'static str, page: &'static str, judge: fn() -> Report) -> Self {
        Self::new(From::TokioUtil, name, page, judge)
    }

    pub(crate) fn futures(name: &'static str, page: &'static str, judge: fn() -> Report) -> Self {
        Self::new(From::FuturesUtil, name, page, judge)
    }

    pub(crate) fn futures_channel(name: &'static str, page: &'static str, judge: fn() -> Report) -> Self {
        Self::new(From::FuturesChannel, name, page, judge)
    }

    fn new(from: From, name: &'static str, page: &'static str, judge: fn() -> Report) -> Self {
        Self { from, name, how: "", page, says: Says::Nothing, said_at: None, instead: "", note: "", judge }
    }

    pub(crate) fn how(mut self, how: &'static str) -> Self {
        self.how = how;
        self
    }

    pub(crate) fn says(mut self, says: Says) -> Self {
        self.says = says;
        self
    }

    /// Sets the verdict of a page other than the operation's own.
    pub(crate) fn said_at(mut self, says: Says, from: From, page: &'static str) -> Self {
        (self.says, self.said_at) = (says, Some((from, page)));
        self
    }

    pub(crate) fn instead(mut self, instead: &'static str) -> Self {
        self.instead = instead;
        self
    }

    pub(crate) fn note(mut self, note: &'static str) -> Self {
        self.note = note;
        self
    }

    /// The first cell.
    pub(crate) fn title(&self) -> String {
        if self.how.is_empty() { format!("`{}`", self.name) } else { format!("`{}`, {}", self.name, self.how) }
    }
}

/// For operations that take a unit of tokio's budget and call another one that takes a unit too: with one unit for each
/// poll they make no progress at all, which says nothing about production.
pub(crate) const TWO_UNITS: [u32; 2] = [2, 3];

/// An exploration of `calls` results in which timers cost nothing.
pub(crate) fn on_paused_time(calls: usize) -> Explore {
    Explore::new().paused_time(true).calls(calls)
}

/// An exploration in which sockets, processes and signals take their time.
pub(crate) fn in_real_time(calls: usize) -> Explore {
    Explore::new().calls(calls).hang_after(Duration::from_secs(3))
}
