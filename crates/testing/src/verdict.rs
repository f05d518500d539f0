//! Whether a call is cancel safe, in the sense of tokio's documentation.
//!
//! Invariant: the verdict is `Safe` only if nothing at all went wrong in the exploration.

use std::fmt;

use crate::failure::FailureKind;
use crate::plan::Question;
use crate::report::Report;
use crate::site::Site;

/// The verdict of [`Explore::cancel_safe`](crate::Explore::cancel_safe) on a call.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The call was dropped at any point and called again, and returned what undisturbed calls return.
    Safe,
    /// The call was dropped and called again, and returned something else, or never ended even when it was awaited
    /// undisturbed.
    #[non_exhaustive]
    NotSafe {
        /// The number of pendings before the drop.
        point: usize,
        /// The await at which it was dropped; `None` at point 0, or where no line table names it.
        site: Option<Site>,
        /// The results and the observation of the undisturbed calls, as `Debug` prints them.
        undisturbed: String,
        /// What was seen instead.
        seen: String,
    },
    /// The call was dropped again and again, each time after it had been woken, and never ended. Nothing is lost, but
    /// nothing is kept either: a `sleep` starts afresh each time. In a `select!` loop, keep such a future and poll it
    /// by reference.
    #[non_exhaustive]
    Starves {
        /// The number of pendings of each call before its drop.
        point: usize,
        /// The await at which the calls were dropped.
        site: Option<Site>,
    },
    /// No verdict is possible.
    #[non_exhaustive]
    Unjudged {
        /// The reason: undisturbed calls that differ, a panic, or a bound that was exceeded.
        reason: String,
    },
}

impl Report {
    /// Returns the verdict of [`Explore::cancel_safe`](crate::Explore::cancel_safe); [`Verdict::Unjudged`] for other
    /// explorations.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        Verdict::of(self)
    }

    /// Panics unless the [verdict](Report::verdict) is [`Verdict::Safe`].
    ///
    /// # Panics
    ///
    /// If the call is not safe, starves, or could not be judged.
    #[track_caller]
    pub fn assert_safe(&self) {
        let verdict = self.verdict();
        assert!(verdict == Verdict::Safe, "{verdict}\n{self}");
    }
}

impl Verdict {
    fn of(report: &Report) -> Self {
        if report.question != Question::CancelSafe {
            return Self::Unjudged { reason: "only Explore::cancel_safe judges".to_owned() };
        }
        let find = |kind| report.failures().iter().find(|failure| failure.refusal.kind == kind);
        if let Some(failure) = find(FailureKind::Unsteady) {
            return Self::Unjudged { reason: format!("undisturbed runs differ: {}", failure.message()) };
        }
        if let Some(failure) = find(FailureKind::NotSafe) {
            let (undisturbed, seen) = failure.refusal.evidence.clone().unwrap_or_default();
            return Self::NotSafe { point: failure.point(), site: failure.site().cloned(), undisturbed, seen };
        }
        if let Some(failure) = find(FailureKind::Starved) {
            return Self::Starves { point: failure.point(), site: failure.site().cloned() };
        }
        match report.failures() {
            [] => Self::Safe,
            [first, ..] => Self::Unjudged { reason: first.message().to_owned() },
        }
    }

    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Safe => "safe",
            Self::NotSafe { .. } => "not safe",
            Self::Starves { .. } => "starves",
            Self::Unjudged { .. } => "unjudged",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |site: &Option<Site>| site.as_ref().map_or_else(String::new, |site| format!(" at {site}"));
        match self {
            Self::Safe => f.write_str("cancel safe"),
            Self::NotSafe { point, site, undisturbed, seen } => write!(
                f,
                "not cancel safe: dropped{} (point {point}) and called again, it gave {seen}; undisturbed, {undisturbed}",
                at(site)
            ),
            Self::Starves { point, site } => {
                write!(f, "starves: dropped{} at its pending {point} each time, it never ends", at(site))
            }
            Self::Unjudged { reason } => write!(f, "unjudged: {reason}"),
        }
    }
}
