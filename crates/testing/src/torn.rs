//! Critical sections of `cancel-safe-guard` that are torn during a run.
//!
//! Invariant: a torn section counts against the run on whose thread it was dropped, never against another one; a
//! section that the exploration itself drops counts against nothing.

use std::cell::RefCell;

use cancel_safe_guard::{Torn, observe_torn};

use crate::site::Site;

thread_local! {
    static RUN: RefCell<Option<Run>> = const { RefCell::new(None) };
}

/// What was torn in the run on this thread: the first section of each kind, which is the innermost.
#[derive(Debug, Default)]
struct Run {
    by_code: Option<Site>,
    by_us: Option<Site>,
    /// Whether drops at this moment are made by the exploration.
    ours: bool,
}

/// Watches this thread while a run lasts.
#[derive(Debug)]
pub(crate) struct Watch(());

impl Watch {
    pub(crate) fn begin() -> Self {
        // In addition to the hook, which belongs to the program under test.
        observe_torn(notice);
        RUN.set(Some(Run::default()));
        Self(())
    }

    /// The section that was torn by the code under test.
    pub(crate) fn torn_by_code(&self) -> Option<Site> {
        RUN.with_borrow(|run| run.as_ref()?.by_code.clone())
    }

    /// The section that was torn by the drop at the point.
    pub(crate) fn torn_by_us(&self) -> Option<Site> {
        RUN.with_borrow(|run| run.as_ref()?.by_us.clone())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        RUN.set(None);
    }
}

/// While this lives, a section torn on this thread counts as torn by the exploration.
#[derive(Debug)]
pub(crate) struct Ours {
    before: bool,
}

impl Ours {
    pub(crate) fn begin() -> Self {
        Self { before: set_ours(true) }
    }

    /// Changes nothing until [`panics`] is called.
    pub(crate) fn if_panics() -> Self {
        let before = RUN.with_borrow(|run| run.as_ref().is_some_and(|run| run.ours));
        Self { before }
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        set_ours(self.before);
    }
}

/// The exploration is about to panic in the middle of a poll.
pub(crate) fn panics() {
    set_ours(true);
}

fn set_ours(ours: bool) -> bool {
    RUN.with_borrow_mut(|run| run.as_mut().is_some_and(|run| std::mem::replace(&mut run.ours, ours)))
}

fn notice(torn: &Torn) {
    let notice = |run: &RefCell<Option<Run>>| {
        if let Some(run) = run.borrow_mut().as_mut() {
            let first = if run.ours { &mut run.by_us } else { &mut run.by_code };
            first.get_or_insert_with(|| Site::new(torn.location.file().replace('\\', "/"), torn.location.line()));
        }
    };
    // Other threads end too, and may tear a section when their thread-locals are already gone.
    RUN.try_with(notice).unwrap_or_default();
}
