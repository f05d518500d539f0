//! The runtime around the operation, run one task poll at a time.
//!
//! Invariant: between two calls of this room no task runs and no blocking job begins; so the n-th task poll is the same
//! in each run, and can be a point.

use std::cell::RefCell;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::mpsc;
use std::task::Poll;
use std::time::{Duration, Instant};

use crate::runtime::{Fault, Gate, Stage, Told};
use crate::sockets;
use crate::tracer::Tracer;
use crate::turns::{Step, Turns};

/// How long the thread waits for blocking jobs before it lets tasks run meanwhile: a job may wait for a task.
const STILL: Duration = Duration::from_millis(20);

/// The time that one round of waiting for tasks lets pass, both in real time and on tokio's clock.
const ROUND: Duration = Duration::from_micros(500);

/// The most task polls in one rest. Tasks that wake themselves for ever would never come to rest.
const POLLS_PER_REST: usize = 1_000;

/// After this many task polls, blocking jobs are let through although tasks are still ready, because some tasks spin
/// for ever.
const POLLS_PER_DRAIN: usize = 64;

/// How long everything must stand still, in real time, before a wait counts as endless. Threads that tokio does not
/// know may still wake something. After one such wait, an exploration is less patient with the next.
pub(crate) const QUIET: Duration = Duration::from_millis(200);
const QUIET_AGAIN: u32 = 2;

/// What is known of the blocking jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Jobs {
    /// Tasks have run since, and may have submitted some.
    Unknown,
    /// They have been let through the gate, but not all have ended.
    Running,
    /// All have ended.
    Done,
}

/// How a wait for the operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Went {
    /// The operation has been woken.
    Woken,
    /// The requested number of tasks was polled.
    Stepped,
}

/// When to give up a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// When the hang limit is over.
    Limit,
    /// As soon as it is known that nothing can happen any more, if that can be known.
    Known,
    /// As soon as nothing can happen without time passing.
    Rest,
}

/// The runtime as seen by the driver that runs on it.
#[derive(Debug)]
pub(crate) struct World<'a> {
    stage: &'a Stage<'a>,
    turns: Turns,
    gate: RefCell<Option<Gate>>,
    baseline: usize,
}

impl<'a> World<'a> {
    /// Takes the runtime over after the setup, and waits for the setup's blocking jobs. Must be called on the runtime.
    /// `None` means that one of these jobs does not end.
    pub(crate) async fn enter(stage: &'a Stage<'a>) -> Option<Self> {
        let baseline = stage.alive_tasks();
        let turns = Turns::begin();
        let gate = Gate::close();
        let world = Self { stage, turns, gate: RefCell::new(Some(gate)), baseline };
        let has_closed = world.gate.borrow().as_ref().is_some_and(|gate| gate.held().wait(world.worker_after()));
        // A new turn of the scheduler brings the driver a full budget.
        let _ran = world.step().await;
        has_closed.then_some(world)
    }

    /// How long to wait for a blocking job before assuming that it waits for something else, and giving it its own
    /// thread: a quarter of the hang limit, because a sync on a busy disk may take seconds too.
    fn worker_after(&self) -> Duration {
        self.stage.watchdog.limit() / 4
    }

    /// How many tasks the setup has left running.
    pub(crate) fn tasks_of_the_setup(&self) -> usize {
        self.baseline
    }

    /// Whether more tasks are alive than the setup has left.
    pub(crate) fn has_children(&self) -> bool {
        // One of them is the sentinel.
        self.stage.alive_tasks() > self.baseline + 1
    }

    pub(crate) fn close_gate(&self) {
        self.gate.borrow_mut().get_or_insert_with(Gate::close);
    }

    pub(crate) fn open_gate(&self) {
        drop(self.take_gate());
    }

    /// Takes the gate, for an end of the runtime that has to begin before the gate opens.
    pub(crate) fn take_gate(&self) -> Option<Gate> {
        self.gate.borrow_mut().take()
    }

    /// Polls the next ready task, if there is one, and lets everything that is due at once happen.
    pub(crate) async fn step(&self) -> Step {
        self.turns.step().await
    }

    /// Polls tasks, without letting time pass, until none is ready and no blocking job is left, except jobs that wait
    /// for something else.
    async fn quiesce(&self) {
        let mut polls = 0;
        let mut drained = false;
        while polls < POLLS_PER_REST {
            match self.step().await {
                Step::Ran => {
                    polls += 1;
                    drained = false;
                }
                Step::Idle if drained => break,
                Step::Idle if self.fence(Duration::ZERO).await => drained = true,
                Step::Idle => break,
            }
        }
    }

    /// Waits until all submitted blocking jobs have ended, after holding the blocking thread for `pause`. Returns
    /// whether they have: a job may wait for something that must not continue now.
    async fn fence(&self, pause: Duration) -> bool {
        let (tell, told) = mpsc::sync_channel(1);
        drop(tokio::task::spawn_blocking(move || {
            if !pause.is_zero() {
                std::thread::park_timeout(pause);
            }
            // The receiver is gone if the wait was given up.
            tell.send(()).unwrap_or_default();
        }));
        self.hear(&Told(told), pause + STILL).await
    }

    /// Lets the blocking jobs that wait at the gate run, and makes the gate close again behind them.
    /// [`is_drained`](Self::is_drained) tells whether it has closed.
    fn begin_to_drain(&self) {
        let next = Gate::close();
        // The old one opens.
        drop(self.gate.replace(Some(next)));
    }

    /// Whether the gate is closed and no blocking job is left in front of it; waits a moment for that.
    fn is_drained(&self) -> bool {
        self.gate.borrow().as_ref().is_none_or(|gate| gate.held().wait(STILL))
    }

    /// Waits for a message from the blocking thread. It blocks this thread meanwhile, so that no task runs unasked; but
    /// not for long, because a job may wait for a task.
    async fn hear(&self, told: &Told, still: Duration) -> bool {
        if told.wait(still) {
            return true;
        }
        let begun = Instant::now();
        let patience = self.stage.job_patience.get().min(self.worker_after());
        while !told.wait(Duration::ZERO) {
            if self.step().await == Step::Ran {
                continue;
            }
            if begun.elapsed() > patience {
                // Jobs that wait for each other are rare, and the next run need not wait as long to find out.
                self.stage.job_patience.set(STILL);
                return false;
            }
            // After a step this checks for the message again: if the job has ended meanwhile, a paused clock would jump
            // to the next timer as soon as the runtime sleeps.
            if !told.wait(Duration::ZERO) {
                self.stage.bell.next().await;
            }
        }
        true
    }

    /// Lets the runtime sleep until something happens: a timer, a socket, another thread, or the watchdog. `Ran` says
    /// that a task was polled instead.
    async fn sleep(&self) -> Step {
        // The paused clock stands still while a blocking job runs, and the gate is one.
        let gate = self.take_gate();
        let closed = gate.is_some();
        // When the gate ends, it wakes the timer driver, which then does not move the clock at its next sleep.
        if let Some(gate) = gate {
            gate.open();
        }
        let step = if closed { self.turns.next().await } else { Step::Idle };
        if step == Step::Idle {
            self.stage.bell.next().await;
        }
        if closed {
            self.close_gate();
        }
        step
    }

    /// Lets the world continue until `is_woken`, or until `stop_after` task polls, which it counts in `steps`.
    pub(crate) async fn until(
        &self,
        is_woken: impl Fn() -> bool,
        patience: Patience,
        stop_after: Option<usize>,
        steps: &mut usize,
    ) -> Result<Went, Fault> {
        let wait = async {
            let mut quiet = Quiet::new();
            let mut jobs = Jobs::Unknown;
            let mut running_since = Instant::now();
            let mut sleepy = false;
            loop {
                // A step first, because it brings the driver, and so whatever it polls next, a full budget.
                let slept = std::mem::take(&mut sleepy);
                let step = if slept { self.sleep().await } else { self.step().await };
                if step == Step::Ran {
                    quiet = Quiet::new();
                    jobs = if jobs == Jobs::Running { Jobs::Running } else { Jobs::Unknown };
                    *steps += 1;
                    if stop_after == Some(*steps) {
                        return Ok(Went::Stepped);
                    }
                }
                match (step, jobs) {
                    _ if slept => {}
                    _ if is_woken() => return Ok(Went::Woken),
                    (Step::Ran, _) if !(*steps).is_multiple_of(POLLS_PER_DRAIN) => {}
                    (_, Jobs::Unknown) => {
                        self.close_gate();
                        self.begin_to_drain();
                        jobs = if self.is_drained() { Jobs::Done } else { Jobs::Running };
                        running_since = Instant::now();
                    }
                    (Step::Ran, _) => {}
                    (Step::Idle, Jobs::Running) => {
                        // A slow job may wait for a task, a timer or a socket; or for another job, which then needs its
                        // own thread.
                        if self.is_drained() {
                            jobs = Jobs::Done;
                        } else if running_since.elapsed() > self.worker_after() {
                            return Err(Fault::Occupied);
                        } else {
                            self.stage.bell.next().await;
                        }
                    }
                    (Step::Idle, Jobs::Done) if patience == Patience::Rest => return Err(Fault::Hung),
                    (Step::Idle, Jobs::Done)
                        if patience == Patience::Known
                            && quiet.is_longer_than(self.stage.quiet.get())
                            && self.is_for_ever(&is_woken).await =>
                    {
                        self.stage.quiet.set((self.stage.quiet.get() / QUIET_AGAIN).max(QUIET / QUIET_AGAIN));
                        return Err(Fault::Hung);
                    }
                    (Step::Idle, Jobs::Done) => sleepy = true,
                }
            }
        };
        self.stage.watchdog.bound(wait).await.and_then(|went| went)
    }

    /// Whether it is known, after a long quiet time, that nothing will happen any more: no socket is watched, and no
    /// timer is due.
    async fn is_for_ever(&self, is_woken: impl Fn() -> bool) -> bool {
        if !sockets::are_none() {
            return false;
        }
        let before = Instant::now();
        let clock = tokio::time::Instant::now();
        std::thread::park_timeout(ROUND);
        let is_paused = clock == tokio::time::Instant::now();
        // A paused clock jumps to the next timer when the runtime sleeps. The first sleep may end for another reason.
        if !is_paused {
            tokio::time::pause();
        }
        let mut is_still = true;
        for _ in 0..2 {
            is_still &= self.sleep().await == Step::Idle;
        }
        let passed = clock.elapsed();
        if is_paused {
            return is_still && passed.is_zero() && !is_woken();
        }
        tokio::time::resume();
        is_still && passed <= before.elapsed() && !is_woken()
    }

    /// Opens the gate and lets the world continue until nothing in it can make progress unless time passes. Then it
    /// lets time pass, for `patience` at most, until the operation of `tracer` has been woken and the tasks spawned
    /// since the setup have ended.
    pub(crate) async fn rest(&self, tracer: &Tracer, patience: Duration) -> Result<(), Fault> {
        self.open_gate();
        // An operation that was never polled waits for nothing.
        let patience = if tracer.has_polled() { patience } else { Duration::ZERO };
        let wait = self.wait_rounds(patience, || tracer.is_woken() && !self.has_children());
        self.stage.watchdog.bound(wait).await.map(drop)
    }

    /// Opens the gate and lets tasks and blocking jobs end, for `patience` at most. Returns whether the tasks spawned
    /// since the setup have ended.
    pub(crate) async fn settle(&self, patience: Duration) -> Result<bool, Fault> {
        self.open_gate();
        self.stage.watchdog.bound(self.wait_rounds(patience, || !self.has_children())).await
    }

    async fn wait_rounds(&self, patience: Duration, is_done: impl Fn() -> bool) -> bool {
        self.quiesce().await;
        let begun = tokio::time::Instant::now();
        let rounds = u32::try_from(patience.as_micros().div_ceil(ROUND.as_micros())).unwrap_or(u32::MAX);
        for round in 1..=rounds {
            if is_done() {
                return true;
            }
            // On the blocking thread, because there real time passes without moving a paused clock.
            let _ended = self.fence(ROUND).await;
            if self.stage.paused {
                self.pass_until(begun + ROUND * round).await;
            }
            self.quiesce().await;
        }
        is_done()
    }

    /// Lets time pass on tokio's clock, and stops at each timer for the tasks it wakes.
    async fn pass_until(&self, deadline: tokio::time::Instant) {
        let mut timer = pin!(tokio::time::sleep_until(deadline));
        loop {
            let over = poll_fn(|cx| Poll::Ready(timer.as_mut().poll(cx).is_ready())).await;
            if over {
                return;
            }
            for _ in 0..POLLS_PER_REST {
                if self.step().await == Step::Idle {
                    break;
                }
            }
            let _step = self.sleep().await;
        }
    }
}

/// Measures how long nothing has happened: no task has run, and a paused clock has not moved.
#[derive(Debug)]
struct Quiet {
    since: Instant,
    clock: tokio::time::Instant,
}

impl Quiet {
    fn new() -> Self {
        Self { since: Instant::now(), clock: tokio::time::Instant::now() }
    }

    fn is_longer_than(&mut self, limit: Duration) -> bool {
        let quiet = self.since.elapsed();
        // A clock that runs does not run ahead.
        if self.clock.elapsed() > quiet + ROUND {
            *self = Self::new();
            return false;
        }
        quiet >= limit
    }
}
