//! The question of an exploration, and the address of one run that helps to answer it.
//!
//! Invariant: the address that a failure prints parses back to exactly the same run.

use std::fmt;
use std::str::FromStr;

use crate::way::Way;

/// The environment variable that names one run, as `point:way:budget`; every exploration in the process then does just
/// that one.
pub(crate) const ONLY: &str = "CANCEL_SAFE_ONLY";

/// The question, which determines the runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    /// What is left behind?
    Run,
    /// Is a call that was dropped and called again as good as one that was not?
    CancelSafe,
    /// What waits for an operation that is alive but not polled?
    Suspended,
}

/// What happens once the point has been reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) enum Then {
    /// The operation is dropped.
    #[default]
    Drop,
    /// Only for calls: every call is dropped at its `point`-th pending, not only one of them.
    DropEach,
    /// Only for suspended operations: it is polled on after the rival has ended.
    Resume,
}

/// One run: the operation is stopped after `point` pendings, and `step` task polls after that, under this budget.
/// Ordered simplest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Plan {
    pub(crate) budget: Option<u32>,
    pub(crate) step: usize,
    pub(crate) then: Then,
    pub(crate) point: usize,
    pub(crate) way: Way,
}

impl Plan {
    pub(crate) fn new(budget: Option<u32>, point: usize, way: Way) -> Self {
        Self { budget, step: 0, then: Then::Drop, point, way }
    }

    /// Whether `.only(..)` can express it; other plans need the environment variable.
    pub(crate) fn is_plain(&self) -> bool {
        self.step == 0 && self.then == Then::Drop
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.then {
            Then::Drop => "",
            Then::DropEach => "each-",
            Then::Resume => "resumed-",
        })?;
        write!(f, "{}", self.point)?;
        if self.step > 0 {
            write!(f, "+{}", self.step)?;
        }
        write!(f, ":{}:", self.way)?;
        match self.budget {
            None => f.write_str("natural"),
            Some(units) => write!(f, "{units}"),
        }
    }
}

impl FromStr for Plan {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse(text).ok_or_else(|| {
            format!(
                "{ONLY} is {text:?}, but has to look like 3:settled:natural or 3:settled:2 (as failures print it: also \
                 3+2:…, each-3:… and resumed-3:…)"
            )
        })
    }
}

fn parse(text: &str) -> Option<Plan> {
    let mut parts = text.split(':');
    let (Some(point), Some(way), Some(budget), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
        return None;
    };
    let (then, point) = match point.split_once('-') {
        None => (Then::Drop, point),
        Some(("each", point)) => (Then::DropEach, point),
        Some(("resumed", point)) => (Then::Resume, point),
        Some(_) => return None,
    };
    let (point, step) = match point.split_once('+') {
        None => (point, 0),
        Some((point, step)) => (point, step.parse().ok()?),
    };
    let way = Way::ALL.into_iter().find(|it| it.to_string() == way)?;
    let budget = if budget == "natural" { None } else { Some(budget.parse().ok()?) };
    Some(Plan { budget, step, then, point: point.parse().ok()?, way })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_back() {
        for then in [Then::Drop, Then::DropEach, Then::Resume] {
            for way in Way::ALL {
                for (budget, step) in [(None, 0), (Some(2), 0), (None, 7), (Some(1), 30)] {
                    let plan = Plan { budget, step, then, point: 12, way };
                    assert_eq!(plan.to_string().parse(), Ok(plan));
                }
            }
        }
    }

    #[test]
    fn what_names_no_run_is_told() {
        for text in ["", "3", "3:settled", "3:gently:1", "x:eager:1", "3+:eager:1", "all-3:eager:1", "3:eager:1:2"] {
            let error = text.parse::<Plan>().unwrap_err();
            assert!(error.contains(&format!("{text:?}")) && error.contains("3:settled:natural"), "{error}");
        }
    }
}
