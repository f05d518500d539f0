//! The common parts of every run: a directory, a runtime, a watch over critical sections, and an end.
//!
//! Invariant: no state of one run reaches another, and whatever the user's code does, a run ends with a [`Visit`].

use std::cell::Cell;
use std::pin::Pin;
use std::time::Duration;

use crate::failure::{FailureKind, Refusal};
use crate::options::Options;
use crate::runtime::{Fault, Stage, Watchdog};
use crate::scratch::Scratch;
use crate::seen::Visit;
use crate::torn::Watch;
use crate::world::{QUIET, World};

/// How many blocking jobs may need a thread of their own.
const MAX_WORKERS: usize = 16;

/// The bounds of an exploration, and what it has learned about its setup.
#[derive(Debug)]
pub(crate) struct Bounds<'a> {
    pub(crate) options: &'a Options,
    watchdog: Watchdog,
    /// How many blocking jobs do not end, or wait for each other. Each has its own thread.
    workers: Cell<usize>,
    quiet: Cell<Duration>,
    job_patience: Cell<Duration>,
}

/// The part of a run that did not end as it should.
#[derive(Debug)]
pub(crate) struct Broken {
    part: &'static str,
    fault: Fault,
}

impl Broken {
    pub(crate) fn at(part: &'static str) -> impl FnOnce(Fault) -> Self {
        move |fault| Self { part, fault }
    }

    pub(crate) fn is_hang(&self) -> bool {
        self.fault == Fault::Hung
    }
}

/// The result of a run: the check's verdict, or what kept the check from running.
pub(crate) type Ended = Result<Result<(), Refusal>, Broken>;

/// An operation in any wrapping.
pub(crate) type Running<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

impl<'a> Bounds<'a> {
    pub(crate) fn new(options: &'a Options) -> Self {
        Self {
            options,
            watchdog: Watchdog::new(options.hang_after),
            workers: Cell::new(0),
            quiet: Cell::new(QUIET),
            job_patience: Cell::new(Duration::MAX),
        }
    }

    /// Sets how long it must be quiet before a wait counts as endless.
    pub(crate) fn wait_at_least(&self, quiet: Duration) {
        self.quiet.set(self.quiet.get().max(quiet));
    }

    /// A runtime for a run.
    pub(crate) fn stage(&self) -> Stage<'_> {
        match Stage::new(self.options.paused_time, self.workers.get(), &self.watchdog, &self.quiet, &self.job_patience)
        {
            Ok(stage) => stage,
            Err(error) => panic!("no runtime could be built: {error}"),
        }
    }

    /// Does a run. `perform` is called once more for each blocking job that turns out to need a thread of its own.
    pub(crate) fn act<'s>(
        &'s self,
        scratch: Scratch,
        mut visit: Visit,
        mut perform: impl FnMut(Stage<'s>, &mut Visit) -> (Stage<'s>, Ended),
    ) -> Visit {
        let watch = Watch::begin();
        let (polls, end, site) = (visit.polls, visit.end, visit.site.clone());
        let (stage, ended) = loop {
            let (stage, ended) = perform(self.stage(), &mut visit);
            match ended {
                Err(Broken { fault: Fault::Occupied, .. }) if self.workers.get() < MAX_WORKERS => {
                    stage.abandon();
                    self.workers.set(self.workers.get() + 1);
                    // From the beginning, with one more thread.
                    visit = Visit { polls, end, site: site.clone(), ..Visit::default() };
                    scratch.empty();
                }
                ended => break (stage, ended),
            }
        };
        let limit = self.options.hang_after;
        visit.failure = match ended {
            Ok(Ok(())) => None,
            Ok(Err(mut refusal)) => {
                if let Some(section) = watch.torn_by_us() {
                    let hint = "; a scope would not: see Way::Scope)";
                    refusal.message += &format!(" (the drop has torn the critical section of {section}{hint}");
                }
                Some(refusal)
            }
            Err(Broken { part, fault: Fault::Panicked(message) }) => {
                Some(Refusal::new(FailureKind::Panic, format!("the {part} panicked: {message}")))
            }
            Err(Broken { part, fault: Fault::Hung }) => {
                let message = format!("the {part} did not end within hang_after({limit:?})");
                Some(Refusal::new(FailureKind::Hang, message))
            }
            Err(Broken { fault: Fault::Occupied, .. }) => {
                let message = format!("more than {MAX_WORKERS} blocking jobs do not end");
                Some(Refusal::new(FailureKind::Incomplete, message))
            }
        };
        if visit.failure.as_ref().is_some_and(|refusal| refusal.kind == FailureKind::Hang) {
            // Without waiting, because a blocking job may be what hangs.
            stage.abandon();
        } else {
            stage.finish();
        }
        drop(scratch);
        visit.workers = self.workers.get();
        visit.torn = watch.torn_by_code();
        visit
    }
}

/// Runs the setup on the runtime, then takes the runtime over.
pub(crate) async fn set_up<'a, S>(
    stage: &'a Stage<'a>,
    setup: impl Future<Output = S>,
    visit: &mut Visit,
) -> Result<(S, World<'a>), Broken> {
    let state = stage.watchdog.bound(setup).await.map_err(Broken::at("setup"))?;
    let world = World::enter(stage).await.ok_or(Broken { part: "setup", fault: Fault::Occupied })?;
    visit.setup_tasks = world.tasks_of_the_setup();
    Ok((state, world))
}
