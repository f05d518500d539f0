//! Drop guards, cancel scopes with critical sections, and a reaper that finishes what its caller dropped.
//!
//! # The problem
//!
//! A future can be dropped at any `.await`. What it has done so far stays done, and the rest never happens:
//!
//! ```
//! use std::time::Duration;
//! use tokio::sync::Mutex;
//! use tokio::time::{sleep, timeout};
//!
//! async fn transfer(from: &Mutex<i64>, to: &Mutex<i64>, amount: i64) {
//!     *from.lock().await -= amount;
//!     sleep(Duration::from_secs(2)).await; // tells the auditor
//!     *to.lock().await += amount;
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! let (from, to) = (Mutex::new(100), Mutex::new(0));
//! assert!(timeout(Duration::from_secs(1), transfer(&from, &to, 30)).await.is_err());
//! assert_eq!(*from.lock().await + *to.lock().await, 70); // 30 are gone
//! # }
//! ```
//!
//! # The same, made safe
//!
//! Mark the steps that belong together, and use a timeout that honours the mark. It can still end a transfer that has
//! not begun, and it never ends one in the middle:
//!
//! ```
//! use std::time::Duration;
//! use cancel_safe_guard::{critical, timeout};
//! use tokio::sync::Mutex;
//! use tokio::time::sleep;
//!
//! async fn transfer(from: &Mutex<i64>, to: &Mutex<i64>, amount: i64) {
//!     sleep(Duration::from_millis(500)).await; // may be cancelled: nothing has happened
//!     critical(async {
//!         *from.lock().await -= amount;
//!         sleep(Duration::from_secs(2)).await;
//!         *to.lock().await += amount;
//!     })
//!     .await;
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! let (from, to) = (Mutex::new(100), Mutex::new(0));
//! for deadline in (0..4_000).step_by(100).map(Duration::from_millis) {
//!     let _ = timeout(deadline, transfer(&from, &to, 1)).await;
//!     assert_eq!(*from.lock().await + *to.lock().await, 100);
//! }
//! # }
//! ```
//!
//! # Three patterns
//!
//! **Atomic sections.** Code between two awaits runs to completion. If all the changes fit there, you need no tool:
//! wait and check first, change last. Every caller must take two locks in the same order; otherwise two transfers in
//! opposite directions deadlock:
//!
//! ```
//! use tokio::sync::Mutex;
//!
//! struct Account { number: u32, balance: Mutex<u64> }
//!
//! #[derive(Debug, PartialEq)]
//! enum Refused { SameAccount, InsufficientFunds }
//!
//! async fn transfer(from: &Account, to: &Account, amount: u64) -> Result<(), Refused> {
//!     // Waiting: may be dropped, and gives back what it holds.
//!     let (mut source, mut target) = if from.number < to.number {
//!         let source = from.balance.lock().await;
//!         (source, to.balance.lock().await)
//!     } else if from.number > to.number {
//!         let target = to.balance.lock().await;
//!         (from.balance.lock().await, target)
//!     } else {
//!         return Err(Refused::SameAccount); // its lock cannot be taken twice
//!     };
//!     // Deciding and changing: no await from here on.
//!     *source = source.checked_sub(amount).ok_or(Refused::InsufficientFunds)?;
//!     *target += amount;
//!     Ok(())
//! }
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! let savings = Account { number: 1, balance: Mutex::new(100) };
//! let current = Account { number: 2, balance: Mutex::new(10) };
//! let (there, back) =
//!     tokio::join!(transfer(&savings, &current, 30), transfer(&current, &savings, 5));
//! assert_eq!((there, back), (Ok(()), Ok(())));
//! assert_eq!((*savings.balance.lock().await, *current.balance.lock().await), (75, 35));
//! assert_eq!(transfer(&current, &savings, 99).await, Err(Refused::InsufficientFunds));
//! # }
//! ```
//!
//! **Guards.** If something must be undone on every way out, arm a [`Guard`] before the await. If the undo itself
//! awaits, use [`Reaper::defer`]:
//!
//! ```
//! use std::sync::atomic::{AtomicU32, Ordering};
//! use std::time::Duration;
//! use cancel_safe_guard::Guard;
//! use tokio::time::{sleep, timeout};
//!
//! static UPLOADS: AtomicU32 = AtomicU32::new(0);
//!
//! async fn with_guard() {
//!     UPLOADS.fetch_add(1, Ordering::Relaxed);
//!     let _slot = Guard::new(|| { UPLOADS.fetch_sub(1, Ordering::Relaxed); });
//!     sleep(Duration::from_secs(60)).await;
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! assert!(timeout(Duration::from_secs(1), with_guard()).await.is_err());
//! assert_eq!(UPLOADS.load(Ordering::Relaxed), 0);
//! # }
//! ```
//!
//! **Try, commit, cancel.** [`try_commit_cancel`] either commits or releases what was prepared:
//!
//! ```
//! use std::sync::Mutex;
//! use std::time::Duration;
//! use cancel_safe_guard::{timeout, try_commit_cancel};
//! use tokio::time::sleep;
//!
//! #[derive(Default)]
//! struct Users { prepared: Mutex<Vec<u32>>, active: Mutex<Vec<u32>> }
//!
//! impl Users {
//!     async fn activate(&self, id: u32) -> Result<u32, String> {
//!         sleep(Duration::from_secs(2)).await; // asks the directory
//!         self.active.lock().unwrap().push(id);
//!         Ok(id)
//!     }
//!
//!     async fn create_user(&self, id: u32) -> Result<u32, String> {
//!         self.prepared.lock().unwrap().push(id);
//!         let release = || self.prepared.lock().unwrap().retain(|other| *other != id);
//!         try_commit_cancel(self.activate(id), release).await
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! let users = Users::default();
//! assert_eq!(timeout(Duration::from_secs(3), users.create_user(1)).await, Ok(Ok(1)));
//! assert!(timeout(Duration::from_secs(1), users.create_user(2)).await.is_err());
//! // The second user is not left behind half made.
//! assert_eq!(*users.prepared.lock().unwrap(), [1]);
//! # }
//! ```
//!
//! **Join, then try.** `tokio::try_join!` drops the other branches on the first error. [`join_then_try`] runs all of them to
//! their ends first:
//!
//! ```
//! use cancel_safe_guard::join_then_try;
//!
//! # async fn save(_: &str) -> Result<u64, std::io::Error> { Ok(1) }
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), std::io::Error> {
//! let (users, orders) = join_then_try((save("users"), save("orders"))).await?;
//! # assert_eq!((users, orders), (1, 1));
//! # Ok(())
//! # }
//! ```
//!
//! # A mutex that survives cancellation
//!
//! A future that is dropped while it holds a `tokio::sync::Mutex` releases the lock and leaves its change half done:
//! the mutex has no poison. Hold the lock inside [`critical`], and the scopes of this crate wait for the whole change:
//!
//! ```
//! use std::time::Duration;
//! use cancel_safe_guard::{critical, timeout};
//! use tokio::sync::Mutex;
//! use tokio::time::sleep;
//!
//! struct Pair { left: u32, right: u32 }
//!
//! async fn step(pair: &Mutex<Pair>) {
//!     let mut pair = pair.lock().await; // waiting for the lock may be cancelled
//!     critical(async {
//!         pair.left += 1;
//!         sleep(Duration::from_secs(2)).await;
//!         pair.right += 1;
//!     })
//!     .await;
//! }
//!
//! # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
//! let pair = Mutex::new(Pair { left: 0, right: 0 });
//! let _ = timeout(Duration::from_secs(1), step(&pair)).await;
//! let pair = pair.lock().await;
//! assert_eq!(pair.left, pair.right);
//! # }
//! ```
//!
//! # Guarantees
//!
//! | Event | What holds |
//! |---|---|
//! | a future with an armed [`Guard`] is dropped, panics or is aborted | the cleanup has run exactly once |
//! | [`timeout()`], [`timeout_at`] or [`with_token`] ends during [`critical`] | the section is finished first; the future is dropped at its first pending point after it |
//! | a critical section is still running 60 s after that ([`CRITICAL_LIMIT`]), or at the end of its grace ([`critical_for`]), polled or not | the scope's own timer ends the wait: the future is dropped, the section is torn and reported |
//! | the future is ready in the poll in which the deadline passes or the token fires | its result is returned: the future is polled first |
//! | a branch of [`join_then_try`] fails | the others are polled to their ends, then the error is returned |
//! | scopes are nested | the earliest deadline counts; inside a critical section the outer scopes are postponed, its own still work |
//! | `select!`, `tokio::time::timeout`, an abort, a shutdown or a panic drops a critical section | it is torn: counted by [`torn_sections`], reported to [`on_torn`] and to `tracing`; a failure in `cancel-safe-testing` |
//! | a [`Shield`] is dropped | before its first poll: it has never run; after it: it finishes on its runtime |
//! | the runtime ends before a shield or a cleanup has finished, or the work panics | it is counted as [`lost`](Drain::lost) |
//! | [`Reaper::drain`] returns | by the end of its grace; if clean, nothing is running any more; `finished + timed_out + lost` is all that was started |
//! | a task is spawned inside a scope | it inherits nothing |
//!
//! # Limitations
//!
//! - `mem::forget`, the end of the process and a loss of power skip every destructor, and so every guarantee above.
//! - Only the scopes of this crate respect critical sections. A drop by anything else can be seen, not stopped.
//! - A scope acts only when its future is pending. It cannot end a future that blocks its thread. A computation that
//!   never awaits can call [`cancellation_point`].
//! - A critical section postpones the deadlines around it by at most 60 s; [`critical_for`] sets another bound.
//! - A token's scope without a timer waits for the section however long it takes.
//! - When a [`Shield`] or a cleanup continues as a task, it loses its task-locals and its `tracing` span;
//!   [`Reaper::shield`] shows how to take them along.
//! - Deadlines use tokio's timers, so they are accurate to about a millisecond.
//!
//! # Comparison
//!
//! - `tokio::time::timeout` and `CancellationToken::run_until_cancelled` suit futures that are cancel safe at each
//!   await. The scopes here cost about the same and add the critical section.
//! - `tokio::spawn(work).await` protects `work` from its caller, but it costs a task, needs `'static`, and loses the
//!   work silently when the runtime ends. [`critical`] may borrow and spawns nothing; [`Reaper::shield`] spawns only
//!   abandoned work, and counts it.
//! - `scopeguard` has guards with a value and with strategies. [`Guard`] has neither; if your program uses `scopeguard`
//!   already, stay with it.
//!
//! # Features
//!
//! None is on by default. `tracing` emits an event of level `error` for each torn section, and of level `warn` for each lost
//! future.
//!
//! # Minimum supported Rust version
//!
//! 1.89. It is raised only in a minor release.

mod critical;
mod guard;
mod hold;
mod join;
mod ledger;
mod overtime;
mod reaper;
mod scope;
mod stack;
mod sync;

#[doc(hidden)]
pub use critical::observe_torn;
pub use critical::{Torn, critical, critical_for, on_torn, torn_sections};
pub use guard::{Guard, try_commit_cancel};
pub use hold::CRITICAL_LIMIT;
pub use join::{Branches, join_then_try};
pub use reaper::{Deferred, Drain, Reaper, Shield};
pub use scope::{Cancelled, Elapsed, cancellation_point, remaining, timeout, timeout_at, with_token};

// The examples of the README compile.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
