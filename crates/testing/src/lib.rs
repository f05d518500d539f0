//! Drops a future at every await point, deterministically, and checks what is left behind.
//!
//! # The problem
//!
//! A future can be dropped at any `.await`: a timeout fires, a `select!` branch loses, a client hangs up, a server
//! shuts down. This code passes every ordinary test, and loses money when a timeout fires between its two halves:
//!
//! ```
//! use std::cell::Cell;
//!
//! struct Bank { alice: Cell<i64>, bob: Cell<i64> }
//!
//! impl Bank {
//!     async fn transfer(&self, amount: i64) {
//!         self.alice.set(self.alice.get() - amount);
//!         audit(amount).await;                      // dropped here, the money is gone
//!         self.bob.set(self.bob.get() + amount);
//!     }
//! }
//! # async fn audit(_: i64) { tokio::time::sleep(std::time::Duration::from_millis(20)).await }
//! #
//! # let report = cancel_safe_testing::Explore::new().paused_time(true).run(
//! #     async || Bank { alice: Cell::new(60), bob: Cell::new(40) },
//! #     async |bank| bank.transfer(30).await,
//! #     async |bank, _outcome| match bank.alice.get() + bank.bob.get() {
//! #         100 => Ok(()),
//! #         sum => Err(format!("money gone: {sum}")),
//! #     },
//! # );
//! # assert_eq!(report.failures()[0].message(), "money gone: 70");
//! # assert_eq!(report.failures()[0].point(), 1);
//! ```
//!
//! # The test
//!
//! Add `cancel-safe-testing` and `tokio` to the `[dev-dependencies]` and write a plain `#[test]` with three closures:
//! how to set up, what to drop, and what must hold afterwards. On the fixed code it is silent:
//!
//! ```
//! # use std::cell::Cell;
//! # struct Bank { alice: Cell<i64>, bob: Cell<i64> }
//! # async fn audit(_: i64) { tokio::time::sleep(std::time::Duration::from_millis(20)).await }
//! use cancel_safe_testing::{Explore, Outcome};
//!
//! impl Bank {
//!     async fn transfer(&self, amount: i64) {
//!         audit(amount).await;                      // first everything that waits,
//!         self.alice.set(self.alice.get() - amount);
//!         self.bob.set(self.bob.get() + amount); // then both halves, and no await between
//!     }
//! }
//!
//! # /*
//! #[test]
//! fn a_dropped_transfer_loses_no_money() {
//! # */
//! let report = Explore::new().paused_time(true).run(
//!     async || Bank { alice: Cell::new(60), bob: Cell::new(40) },
//!     async |bank| bank.transfer(30).await,
//!     async |bank, outcome| match (outcome, bank.alice.get(), bank.bob.get()) {
//!         (_, 30, 70) | (Outcome::Dropped { .. }, 60, 40) => Ok(()),
//!         (_, alice, bob) => Err(format!("alice {alice}, bob {bob}")),
//!     },
//! );
//! report.assert_clean();
//! # /*
//! }
//! # */
//! ```
//!
//! On the broken code it fails. It says where, names the callers, and says how to repeat just that run:
//!
//! ```text
//! 5 points at 1 await in 55 runs: 12 failures, the simplest:
//! dropped at src/bank.rs:9: alice 30, bob 40
//!   called from tests/bank.rs:12
//!   point 1, way eager, budget natural
//!   again: .only(1, Way::Eager, None), or CANCEL_SAFE_ONLY=1:eager:natural
//! ```
//!
//! # Four questions
//!
//! | question | asked by | answered by |
//! |---|---|---|
//! | What is left behind when it is dropped? | [`Explore::run`], with your own check | [`Report::assert_clean`] |
//! | Is this call cancel safe in tokio's sense? If a `select!` drops it and it is called again, is anything lost or done twice? | [`Explore::cancel_safe`], with no check: undisturbed calls are the oracle | [`Report::verdict`], [`Report::assert_safe`] |
//! | What waits for it while it is alive and nobody polls it (a *futurelock*), and what does another task see half done? | [`Explore::suspended`], with a rival | [`Failure::is_futurelock`], with both lines |
//! | Which awaits has no test ever dropped? | `CANCEL_SAFE_COVERAGE=file`, which every exploration appends to | `cargo cancel-safe test` |
//!
//! All share the same options, bounds, reports and names of lines. [`drop_after`] is for a test that needs one drop at
//! one point.
//!
//! A **point** is the number of times the operation has returned `Pending`; at point 0 it was never polled. (An async
//! closure has not begun there. If a plain function is the operation, point 0 also shows what it does before it returns
//! its future: `.run(setup, send, check)` with `fn send(bank: &Bank) -> impl Future`.) The exploration visits each
//! point in each [`Way`] to die and under each budget:
//!
//! | way | what happens at the point | what it finds |
//! |---|---|---|
//! | [`Way::Eager`] | dropped while its blocking jobs have not begun | effects that land after the drop |
//! | [`Way::Settled`] | dropped when nothing around it can proceed until time passes, and what it waits for is done but not yet seen | results thrown away |
//! | [`Way::Shutdown`] | dropped with its runtime | cleanups that were spawned |
//! | [`Way::Scope`] (on request) | dropped by a cancel scope of `cancel-safe-guard` | effects outside a critical section that belong inside |
//! | [`Way::Panic`] (on request) | unwound by a panic | poisoned locks, destructors that rely on intact state |
//! | [`Way::Crash`] (on request) | its process is killed | damage that only a destructor would repair |
//!
//! The *natural* budget is production on a good day. A *starved* budget of 1, 2 or 3 units makes tokio's own leaf
//! futures yield when they are ready, as they do under load. For example, a `read_exact` whose bytes have all arrived
//! has no natural point at all.
//!
//! # Tasks of the operation
//!
//! A server does its work in tasks, and a dropped parent aborts them between two of *their* awaits. So an operation
//! that has spawned tasks is also dropped after each poll of any task ([`Explore::tasks`]). These points are counted
//! separately, and written as 2+3: the operation was pending twice, and then tasks were polled three times. An
//! exploration has at most 256 of them; if there would be more, it spreads them evenly and the report says so.
//!
//! Such a failure names the await at which the operation itself waits. Stock tokio does not show where each task
//! stands: the task's waker is tokio's own, and nothing can observe its clones.
//!
//! # Guarantees
//!
//! | event | what you get |
//! |---|---|
//! | the same code is explored again (files, synchronisation, tasks, paused time) | the same report |
//! | the code is right in one plain runtime | a clean report: setup, operation, drop and check run in one `block_on` |
//! | the check returns `Err` or panics | a [`Failure`] with the line of the await, the point, the way and the budget |
//! | the operation, its drop or the setup panics | a failure; the exploration continues or ends, and never crashes |
//! | something is not woken for [`hang_after`](Explore::hang_after) (10 s), or polled without end ([`max_polls`](Explore::max_polls)) | a failure with its line, never a hung test |
//! | an exploration needs more points or more time than allowed | a failure: nothing is left out silently |
//! | something other than the exploration tears a critical section of `cancel-safe-guard` | a failure with the line that began it |
//! | the setup leaves tasks running | by default no [`Way::Shutdown`], which would end them; a [note](Report::notes) says so |
//! | the setup leaves a blocking job running | it gets its own thread, and a note says so |
//! | a panic repeats in each run | it is printed once |
//! | a spawned task lives on | the run continues after [`settle_for`](Explore::settle_for) (5 ms) and is counted as [unsettled](Report::unsettled) |
//! | nothing is `Send` | nothing has to be |
//!
//! How it works: each run has a fresh current-thread runtime with a single blocking thread. The exploration holds that
//! thread during each poll and drains it before the next, so blocking jobs begin and end at the same places in every
//! run. The runtime looks at its events after every task, and a driver that has woken itself is polled between any two
//! tasks; this runs the tasks one poll at a time. A leaf future that waits clones the waker it is polled with. Our
//! waker takes a backtrace there: its innermost frame in user code is the await, and the frames around it are the
//! callers. Naming needs line tables (`debug = "line-tables-only"` or more, as in the `dev` profile).
//!
//! # Critical sections
//!
//! `cancel_safe_guard::critical` marks steps that belong together. The scopes of that crate keep them together; a raw
//! `select!`, `tokio::time::timeout` or `JoinHandle::abort` tears them. A section that is torn during a run is a
//! [failure](Failure::is_torn) with the line that began it, whatever the check says. This covers the setup, the
//! operation and the check, and a task that is aborted because the operation was dropped, on the thread that explores.
//! The hook of `cancel_safe_guard::on_torn` remains yours.
//!
//! The exploration does not blame your code for what it drops itself: the operation at its point, the state, the
//! runtime, and what [`Way::Panic`] unwinds. There the check decides, as for any other await, and its message says
//! which section was torn. If only the scopes of `cancel-safe-guard` ever end an operation, explore it with
//! `.ways([Way::Scope])`, which waits for the section as they do:
//!
//! ```
//! use std::cell::Cell;
//! use std::time::Duration;
//! use cancel_safe_testing::{Explore, Way};
//! use tokio::time::{sleep, timeout};
//!
//! async fn rename(name: &Cell<(u32, u32)>) {
//!     cancel_safe_guard::critical(async {
//!         name.set((2, 1));
//!         sleep(Duration::from_secs(2)).await;
//!         name.set((2, 2));
//!     })
//!     .await
//! }
//!
//! let explore = Explore::new().paused_time(true).ways([Way::Scope]);
//! let setup = async || Cell::new((1, 1));
//! let check = async |name: &Cell<(u32, u32)>, _outcome| match name.get() {
//!     (1, 1) | (2, 2) => Ok(()),
//!     half => Err(format!("half renamed: {half:?}")),
//! };
//! explore.run(setup, async |name| rename(name).await, check).assert_clean();
//!
//! // The timeout of tokio tears the section.
//! let second = Duration::from_secs(1);
//! let report =
//!     explore.run(setup, async |name| drop(timeout(second, rename(name)).await), check);
//! assert!(report.failures()[0].is_torn());
//! ```
//!
//! # Crashes
//!
//! For [`Way::Crash`] a second process does the run up to the point. It is this test binary again, started with the
//! name of the test and the environment variables `CANCEL_SAFE_CRASH` (which point of which call of [`Explore::run`])
//! and `CANCEL_SAFE_CRASH_DIR` (the directory of the run). At the point it is killed. Then the first process runs the
//! *setup again*, as a restarted program would, and the check. So the setup must open what it finds in [`scratch_dir`],
//! which is the same for both. In the second process all other explorations return an empty report at once: assert
//! nothing about it, or give the exploration that crashes its own test. A run takes as long as starting your test
//! binary.
//!
//! # Limitations
//!
//! Budgets and points:
//!
//! - Only tokio's leaf futures can be starved, and only those of the operation itself.
//! - A starved operation gets one more unit after each 128 pendings, because some futures (`io::copy`) never end on
//!   one; points beyond that are a little less starved.
//! - Inside tasks, points are polls and not awaits. They are visited under the natural budget and eagerly only, and a
//!   task's await has no name.
//! - Sets of futures (`FuturesUnordered`, `buffered`) poll with their own wakers: a failure names the await of the set,
//!   not the one inside it.
//! - The cost grows with the square of the number of points. Explore operations, not programs.
//!
//! The world around the operation:
//!
//! - With paused time, a blocking job of the setup that never ends stops tokio's clock, as in any tokio runtime.
//! - Sockets, and databases with their own threads, finish at any time: the number of points varies, and the report
//!   [says so](Report::is_varied).
//! - `select!` without `biased` is random by design; the report names it as the likely cause of variation.
//! - In [`Way::Shutdown`] the check runs on a fresh runtime: a pool or a connection made in the setup is dead there. If
//!   a task of the setup keeps it alive, this way is left out by default; otherwise use the other ways.
//! - Torn sections are seen only on the thread that explores, and only those of the `cancel-safe-guard` version that
//!   this crate depends on; another major version has its own sections.
//! - Code that blocks its thread without ever awaiting cannot be stopped from within; nor can a spawned task.
//! - A panic in a `Drop` while [`Way::Panic`] unwinds aborts the process, as it would in production.
//!
//! # Comparison
//!
//! - `tokio-test`'s `assert_pending!` and `task::spawn` poll by hand: you choose one point, and know in advance where
//!   it is.
//! - `loom` and `shuttle` explore how threads interleave, in code written against their own types. This crate
//!   explores where one future ends, in unchanged code on the real tokio.
//! - `turmoil` and `madsim` simulate networks and machines from a seed. They find what a random drop hits; this crate
//!   hits each point.
//! - Fault injection by `timeout(random)` in a loop finds the same bugs, some day.
//!
//! # Features
//!
//! None.
//!
//! # Minimum supported Rust version
//!
//! 1.89. It is raised only in a minor release.

mod act;
mod calls;
mod coverage;
mod crash;
mod drive;
mod drop_after;
mod explore;
mod failure;
mod json;
mod lock;
mod options;
mod panics;
mod plan;
mod publish;
mod report;
mod rival;
mod runtime;
mod scratch;
mod search;
mod seen;
mod select;
mod site;
mod sockets;
mod torn;
mod tracer;
mod turns;
mod verdict;
mod visit;
mod way;
mod world;

pub use crate::drop_after::drop_after;
pub use crate::explore::Explore;
pub use crate::failure::Failure;
pub use crate::report::Report;
pub use crate::scratch::scratch_dir;
pub use crate::site::Site;
pub use crate::verdict::Verdict;
pub use crate::way::{Outcome, Way};

// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
