//! Places in a source file, and the await that a recorded place belongs to.
//!
//! Invariant: positions are spelt as rustc spells them in line tables: lines and columns from 1, columns in bytes. A
//! place that cannot be attributed with certainty is not attributed, and the reason is given.

use std::fmt;

/// A line and a column of a source file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub struct Position {
    /// From 1.
    pub line: u32,
    /// From 1, in bytes; 0 if the column is unknown, because the line tables of some systems have none.
    pub column: u32,
}

impl Position {
    /// A position as rustc spells it.
    #[must_use]
    pub const fn new(line: u32, column: u32) -> Self {
        Self { line, column }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.column {
            0 => write!(f, "{}", self.line),
            column => write!(f, "{}:{column}", self.line),
        }
    }
}

/// A part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: Position,
    pub(crate) end: Position,
}

impl Extent {
    /// Whether it contains the position; for a position without a column, whether it contains a part of the line.
    fn contains(&self, at: Position) -> bool {
        if at.column == 0 {
            return (self.start.line..=self.end.line).contains(&at.line);
        }
        (self.start..=self.end).contains(&at)
    }

    /// The order of nesting: if two extents contain the same position, the one that starts later is inside the other.
    fn depth(&self) -> (Position, std::cmp::Reverse<Position>) {
        (self.start, std::cmp::Reverse(self.end))
    }
}

/// What waits.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum AwaitKind {
    /// `.await`
    Await,
    /// A macro that awaits all its arms, by its name: `select`, `select_biased`, `join` or `try_join`.
    Macro(String),
}

impl fmt::Display for AwaitKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Await => f.write_str("await"),
            Self::Macro(name) => write!(f, "{name}!"),
        }
    }
}

/// A place where a future waits.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Await {
    /// Where rustc places it: at the word `await`, or at the beginning of the macro's path.
    pub position: Position,
    /// Whether it is an `.await` or a macro.
    pub kind: AwaitKind,
    /// The function it is in, as `Type::name`, `name` or, in a macro of the crate, `name!`; empty outside of all.
    pub function: String,
    /// Whether that function is `pub` without a restriction, or implements a trait.
    pub public: bool,
    /// From the beginning of the awaited expression to the await.
    pub(crate) extent: Extent,
}

/// A body of code.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) extent: Extent,
    /// Whether it can await.
    pub(crate) is_async: bool,
}

/// The contents of one source file.
#[derive(Debug, Default)]
pub(crate) struct Source {
    /// In the order of their positions, none twice.
    pub(crate) awaits: Vec<Await>,
    /// Bodies of functions, closures and async blocks.
    pub(crate) bodies: Vec<Body>,
    /// What is compiled for tests only.
    pub(crate) tests: Vec<Extent>,
}

/// Why a recorded place belongs to no await.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// It is in the body of a function or closure that is not async.
    NotAsync,
    /// Several awaits share the line, and no column was recorded.
    SharedLine,
    /// There is no await in the source: an async body was inside an ordinary call, which polled or dropped something;
    /// or a procedural macro has written the await; or the source has changed since it was built.
    NoAwait,
}

impl Reason {
    /// One word for machines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotAsync => "not-async",
            Self::SharedLine => "shared-line",
            Self::NoAwait => "no-await",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAsync => "in code that is not async, such as a poll function written by hand",
            Self::SharedLine => "several awaits share the line, and the line tables have no columns",
            Self::NoAwait => {
                "no await here: a call that polls by itself, an await that a macro writes, or source changed since"
            }
        })
    }
}

/// The owner of a recorded place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The await of this index.
    Await(usize),
    /// Code that is compiled for tests only.
    Test,
    /// No known owner.
    Unknown(Reason),
}

impl Source {
    /// Finds the owner of a place. If several awaits share a line, the column decides. A place that is not an await
    /// itself, such as a polled closure, belongs to the awaited expression around it.
    pub(crate) fn owner(&self, at: Position) -> Owner {
        if self.tests.iter().any(|tests| tests.contains(at)) {
            return Owner::Test;
        }
        let on_line: Vec<usize> = (0..self.awaits.len()).filter(|&i| self.awaits[i].position.line == at.line).collect();
        if let Some(&exact) = on_line.iter().find(|&&i| self.awaits[i].position == at) {
            return Owner::Await(exact);
        }
        let is_async = self.innermost(at, |_| true).is_none_or(|body| self.bodies[body].is_async);
        match on_line[..] {
            // A closure on the same line is another place, unless it is part of the awaited expression.
            [only] if at.column == 0 || is_async => return Owner::Await(only),
            [_, _, ..] if at.column == 0 => return Owner::Unknown(Reason::SharedLine),
            _ => {}
        }
        // An async block may be run by another task than the one that awaits around it.
        let body = self.innermost(at, |body| body.is_async);
        let around = (0..self.awaits.len())
            .filter(|&i| self.awaits[i].extent.contains(at))
            .filter(|&i| self.innermost(self.awaits[i].position, |body| body.is_async) == body)
            .max_by_key(|&i| self.awaits[i].extent.depth());
        if let Some(around) = around {
            return Owner::Await(around);
        }
        Owner::Unknown(if is_async { Reason::NoAwait } else { Reason::NotAsync })
    }

    fn innermost(&self, at: Position, wanted: impl Fn(&Body) -> bool) -> Option<usize> {
        (0..self.bodies.len())
            .filter(|&i| wanted(&self.bodies[i]) && self.bodies[i].extent.contains(at))
            .max_by_key(|&i| self.bodies[i].extent.depth())
    }
}
