//! sqlx transactions that end when they are dropped, and say how they ended.
//!
//! # The problem
//!
//! ```no_run
//! # use std::time::Duration;
//! # #[cfg(feature = "sqlite")]
//! # async fn handler(pool: sqlx::SqlitePool) -> Result<(), Box<dyn std::error::Error>> {
//! // A handler with a deadline, on plain sqlx.
//! tokio::time::timeout(Duration::from_secs(5), async {
//!     // Dropped here: can leave a transaction open in the pool.
//!     let mut tx = pool.begin().await?;
//!     // Dropped here: it keeps running on the server, with its row locks held.
//!     sqlx::query("UPDATE account …").execute(&mut *tx).await?;
//!     // Dropped here: committed or not, nobody will know.
//!     tx.commit().await
//! })
//! .await
//! # ??;
//! # Ok(())
//! # }
//! ```
//!
//! Dropping a `sqlx::Transaction` cancels nothing on the server. It queues a `ROLLBACK` behind whatever still runs, so
//! the row locks of an abandoned statement last as long as the statement. A `begin` that is dropped at the wrong poll
//! leaves a transaction open on a pooled connection, and other callers' later statements disappear in it. A dropped
//! nested `begin` rolls the *outer* transaction back, and what follows it is committed statement by statement. And
//! `commit` returns `Ok` even if PostgreSQL has rolled back after an earlier error.
//!
//! # What to write instead
//!
//! ```
//! # #[cfg(feature = "sqlite")] {
//! use std::time::Duration;
//!
//! use cancel_safe_tx_guard::{CommitOutcome, TransactionGuard, TxError, TxPool};
//! use sqlx::Sqlite;
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! let db = TxPool::<Sqlite>::connect("sqlite::memory:").await?;
//! # let mut tx = db.begin().await?;
//! # sqlx::query("CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER)").execute(&mut *tx).await?;
//! # sqlx::query("INSERT INTO account VALUES (1, 100)").execute(&mut *tx).await?;
//! # tx.commit().await?;
//!
//! let mut tx: TransactionGuard<Sqlite> = TransactionGuard::new(&db).await?;
//! let withdraw = sqlx::query("UPDATE account SET balance = balance - 30 WHERE id = 1");
//! withdraw.execute(&mut *tx).await?;
//! let handle = tx.outcome_handle();
//!
//! // However impatient the caller is, the commit ends, and the handle tells how.
//! let committed = tokio::time::timeout(Duration::ZERO, tx.commit()).await;
//! if committed.is_err() {
//!     assert_eq!(handle.outcome().await, CommitOutcome::Committed);
//! }
//!
//! let report = db.close(Duration::from_secs(5)).await;
//! assert!(report.is_clean(), "{report}");
//! # Ok::<(), TxError>(())
//! # }).unwrap();
//! # }
//! ```
//!
//! Or use a closure, with a deadline for everything and retries where the database asks for them: see [`Tx::run`]. If
//! the compiler says that the closure's future is not "general enough" to be sent, use [`Tx::run_boxed`] or
//! [`Tx::attempts`]. A guard in hand takes the same options: [`Tx::begin`].
//!
//! # Guarantees
//!
//! | what is dropped, or fails | what is left behind |
//! |---|---|
//! | `begin`, while it waits for a connection | nothing |
//! | `begin`, later | nothing: it runs to completion and is rolled back |
//! | a guard, idle | rolled back; the connection returns to the pool once it is seen to be clean |
//! | a guard, while a statement runs | the statement is cancelled on the server, then the same |
//! | a guard, outside any runtime | the same, on the runtime where it began |
//! | a guard, after the end of that runtime | the connection is closed, which rolls back; no panic |
//! | `commit`, never polled | rolled back |
//! | `commit`, polled | it runs to completion; the [`OutcomeHandle`] and the hooks report how it ended |
//! | `commit`, after the [`timeout`](Tx::timeout) of its transaction | rolled back, and [`TxError::Timeout`] |
//! | `commit` of a transaction that an error had aborted | rolled back, and an error: `Ok` means committed |
//! | a nested sqlx `begin` that is cancelled inside the guard | `commit` is [`TxError::Lost`]; no later statement stands |
//! | a query or a stream on the pool | it is cancelled on the server, and the session returns to the pool when nothing runs on it |
//! | a savepoint, halfway | `commit` is [`TxError::Lost`] and rolls back |
//! | the connection, inside `COMMIT` | [`TxError::Unknown`] and [`CommitOutcome::Unknown`], never "failed" |
//! | the same on PostgreSQL, with [`CommitMode::Resolvable`] | the crate asks the server: committed, or rolled back |
//!
//! A cancel never reaches another transaction: it is acknowledged, and a clean round trip follows, before its
//! connection is used again. All waiting cancels go out in one message. A cancel that arrives before its statement has
//! no effect, so it is repeated: first after a round trip plus 2 ms, then each time after twice as long, up to 100 ms.
//! An idle connection gets no cancel. A connection that does not come to rest within the
//! [`settle_timeout`](TxPoolBuilder::settle_timeout), two seconds, is terminated and closed.
//!
//! On PostgreSQL and MySQL, all pools of a process send their cancels from the crate's own thread, `tx-guard-cancel`,
//! because sqlx does not give its runtime a turn while a server has rows to send.
//!
//! # Limitations
//!
//! Everywhere:
//!
//! - `&TxPool` is an sqlx `Executor` for reads, and no `Acquire`. The crate's own pools and SQLite refuse a write on
//!   it; a wrapped pool of PostgreSQL or MySQL commits the write by itself. [`Reader`] has the details.
//! - The guard hands out the connection itself. If you swap it for another, for example with `mem::swap`, the wrong one
//!   is cancelled.
//! - `mem::forget` of a guard keeps its transaction and its connection.
//! - On a current-thread runtime a dropped transaction is rolled back when that runtime runs again.
//! - A connection needs the runtime on which it was opened, except on SQLite. If the crate's own pool outlives that
//!   runtime, it opens new connections. A wrapped pool is sqlx's, and sqlx does not check.
//! - After a `fork` the child has no thread for cancels: its drops end at their time limits, and close the connection.
//! - An unanswered `COMMIT` is waited for as long as its caller waits, and for ten minutes after the caller has gone.
//!   Then its connection is closed, and its outcome is unknown.
//! - If the `commit` of a nested sqlx transaction is dropped halfway, it may undo more than that transaction, because
//!   sqlx reuses the names of its savepoints. The savepoints of [`savepoint`](TransactionGuard::savepoint) have
//!   distinct names.
//! - If a `begin` is cancelled inside a *nested* sqlx transaction, more than that is lost, and the guard's `commit` is
//!   [`TxError::Lost`]. Then:
//!   - On a wrapped PostgreSQL pool, and behind a pooler, later statements on the nested transaction are committed by
//!     themselves.
//!   - On MySQL, and on PostgreSQL with a version of sqlx after 0.9.0, the nested `commit` commits what is left of the
//!     whole; the outcome is then [`CommitOutcome::Unknown`].
//!   - Behind a pooler, statements prepared in it stay on the pooler's session until such a pool has another
//!     transaction there.
//!
//! PostgreSQL:
//!
//! - Version 13 and later. If a pooler gives each transaction another session, as PgBouncer in transaction mode does,
//!   tell the pool so ([`PoolerMode`]); a wrapped pool must lead to the server itself.
//! - Server code that cannot be cancelled ends in its own time, or with its session.
//! - sqlx does not reveal the key with which the protocol cancels a session. If the server has no session left for the
//!   connection that cancels, the connection of the dropped transaction is closed instead. The server, which checks for
//!   its client every half second (version 14 and later, on Linux), then ends the statement.
//! - A raw `COMMIT` in the SQL is executed, and the guard's own `commit` and `rollback` report it; the outcome is
//!   [`CommitOutcome::Unknown`]. After a raw `COMMIT` or `ROLLBACK`, the crate's own pools refuse each further write;
//!   on a wrapped pool it commits by itself.
//! - On a wrapped pool, `begin` joins a transaction that other code has left open if that transaction has run nothing
//!   but a `LOCK`, `NOTIFY` or `SET LOCAL`. Any other open transaction is noticed, and its session closed.
//! - If a connection is lost inside `COMMIT`, the outcome is looked up only with [`CommitMode::Resolvable`].
//!
//! MySQL and MariaDB:
//!
//! - An address that leads to a different server each time cannot be used: a cancel would go to the wrong one.
//! - A statement whose client has died continues until it has something to send.
//! - A hundred statements in MariaDB's `SLEEP()` take seconds to cancel, because the server itself waits inside `KILL`
//!   for each. Statements that wait for a lock do not.
//! - MySQL commits by itself before a DDL statement. Inside a guard the DDL is then refused, and `commit` is
//!   [`TxError::Lost`]. But what came before it is committed, so the outcome is [`CommitOutcome::Unknown`].
//!   `CREATE TEMPORARY TABLE` does not do that.
//! - Only `commit` notices a raw `COMMIT`.
//! - If MySQL has rolled back by itself, as for the victim of a deadlock, and the program ignored its error, `commit`
//!   is [`TxError::Lost`] as well, and the outcome [`CommitOutcome::Unknown`], because the two cases look the same.
//! - sqlx loses its place in the answers if a statement is dropped while it is being prepared (its text is new to the
//!   connection) or in the middle of a packet:
//!   - The guard's own statements follow a random number, and the guard believes no answer before it has read that
//!     number. After a drop and a rollback the connection is in step or closed, and a `commit` is rolled back, or
//!     unknown if `COMMIT` had been sent.
//!   - If sqlx and the server wait for each other, the connection that cancels detects it: when the server has waited
//!     for five seconds in a `commit` or a [`savepoint`](TransactionGuard::savepoint), for two once `COMMIT` has been
//!     sent, or for half a second after a drop.
//!   - A further statement of the caller on that guard may panic inside sqlx, fail, or never return, and may make sqlx
//!     ask for more memory than there is, which ends the process. So may its `commit`, and the drop of a [`Reader`],
//!     if all rows of the dropped statement had arrived. Drop the guard together with the future of such a
//!     statement: behind the drop of a guard, the crate reads only what cannot ask for memory.
//!   - A wrapped pool may hand out a connection on which this has happened outside any guard; its commit is then
//!     unknown.
//!
//! SQLite:
//!
//! - A statement that waits for a lock ends by `busy_timeout`.
//! - A raw `COMMIT` of a transaction that has written is refused.
//! - A database in memory lives as long as one of its connections does.
//! - The crate takes the progress handler, the commit hook and the rollback hook of each connection.
//!
//! # Comparison
//!
//! The transactions of sqlx, sea-orm and deadpool-postgres leave an abandoned statement running: with `pg_sleep(10)`
//! the row lock is free after 9.8 s, here after milliseconds. sqlx alone is the right choice if futures are never
//! dropped. [`TxPool::wrap`] puts guards on an existing pool. A [`TxPool`] with its own sessions does more: they write
//! nothing outside a guard's transaction, and a dead client is noticed sooner.
//!
//! # Features
//!
//! - `sqlite` (default), `postgres` and `mysql` (MySQL and MariaDB): the databases. The application chooses sqlx's
//!   runtime and TLS features; tokio is needed. sqlx's `macros` is on, because without it `Executor` is a different
//!   trait.
//! - `tracing`: logs what [`TxPool::events`] reports, and the error of a commit whose caller had gone.
//!
//! The minimum supported Rust version is 1.94, as for sqlx 0.9.

mod attempts;
mod backend;
mod begin;
mod boxed;
mod builder;
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod canceller;
mod commit;
mod deadline;
mod drive;
mod error;
mod events;
mod executor;
mod guard;
mod keeper;
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod known;
mod metrics;
#[cfg(feature = "mysql")]
mod mysql;
mod open;
mod outcome;
mod pool;
mod pooler;
#[cfg(feature = "postgres")]
mod postgres;
mod queue;
mod reader;
mod reset;
mod retry;
mod run;
mod said;
mod session;
mod settings;
mod settle;
mod slot;
#[cfg(feature = "sqlite")]
mod sqlite;
mod transient;
mod tx;
mod upkeep;
mod watch;
mod work;

pub use attempts::Attempts;
pub use backend::{Backend, CommitMode, Isolation, Options};
pub use boxed::{BoxedWork, TxRef};
pub use builder::TxPoolBuilder;
pub use error::{CommitError, TxError};
pub use events::{TxEvent, TxEvents, TxRecord};
pub use guard::TransactionGuard;
pub use metrics::Metrics;
pub use outcome::{CommitOutcome, OutcomeHandle};
pub use pool::{CloseReport, PoolSource, TxPool};
pub use pooler::PoolerMode;
pub use reader::Reader;
pub use reset::Reset;
pub use retry::Retry;
pub use transient::is_transient;
pub use tx::Tx;
pub use upkeep::HookFuture;

// Compiles the examples of the README.
#[cfg(all(doctest, feature = "postgres"))]
#[doc = include_str!("../README.md")]
struct Readme;
