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
//!     // Dropped here: it goes on on the server, with its row locks held.
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
//! Dropping a `sqlx::Transaction` cancels nothing on the server. It queues a `ROLLBACK` behind whatever still runs, so the
//! row locks of an abandoned statement last as long as the statement. A `begin` that is dropped at the wrong poll leaves a
//! transaction open on a pooled connection, in which later statements of others disappear. A nested `begin` that is
//! dropped rolls the *outer* transaction back, and what follows it is committed statement by statement. And `commit` says
//! `Ok` where PostgreSQL, after an earlier error, has rolled back.
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
//! Or as a closure, with a deadline for everything and retries where the database asks for them: see [`Tx::run`]; where
//! the future of a closure is not "general enough" to be sent, [`Tx::run_boxed`] or [`Tx::attempts`]. The same options
//! hold for a guard in hand: [`Tx::begin`].
//!
//! # Guarantees
//!
//! | what is dropped, or fails | what is left behind |
//! |---|---|
//! | `begin`, while it waits for a connection | nothing |
//! | `begin`, later | nothing: it is driven to its end and rolled back |
//! | a guard, idle | rolled back; the connection goes back when it was seen clean |
//! | a guard, while a statement runs | the statement is cancelled on the server, then the same |
//! | a guard, outside any runtime | the same, on the runtime on which it was begun |
//! | a guard, after the end of that runtime | the connection is closed, which rolls back; no panic |
//! | `commit`, never polled | rolled back |
//! | `commit`, polled | driven to its end; the [`OutcomeHandle`] and the hooks learn how it ended |
//! | `commit`, after the [`timeout`](Tx::timeout) of its transaction | rolled back, and [`TxError::Timeout`] |
//! | `commit` of a transaction that an error had aborted | rolled back, and an error: `Ok` means committed |
//! | a nested sqlx `begin` that is cancelled inside the guard | `commit` is [`TxError::Lost`]; no later statement stands |
//! | a query or a stream on the pool | it is cancelled on the server, and the session goes back when nothing runs on it |
//! | a savepoint, halfway | `commit` is [`TxError::Lost`] and rolls back |
//! | the connection, inside `COMMIT` | [`TxError::Unknown`] and [`CommitOutcome::Unknown`], never "failed" |
//! | the same on PostgreSQL, with [`CommitMode::Resolvable`] | the server is asked: committed, or rolled back |
//!
//! A cancel reaches no other transaction: it is acknowledged, and followed by a clean round trip, before its connection
//! is used again. All that wait go out in one message. One that comes before its statement is no cancel, so it is
//! repeated, after a round trip and 2 ms at first, and each time twice as long up to 100 ms; an idle connection is sent
//! none. A connection that does not come to rest within the [`settle_timeout`](TxPoolBuilder::settle_timeout), two
//! seconds, is terminated and closed.
//!
//! On PostgreSQL and MySQL, all pools of a process send their cancels from one thread of the crate's own,
//! `tx-guard-cancel`: as long as a server has rows to send, sqlx reads them without giving its runtime a turn.
//!
//! # Limitations
//!
//! Everywhere:
//!
//! - `&TxPool` is an sqlx `Executor` for reads. A write on it is refused on a pool of the crate's own, and on SQLite; a
//!   wrapped pool of PostgreSQL or MySQL commits it by itself. [`Reader`] has the details. It is no `Acquire`.
//! - The guard hands out the connection itself. Swap it for another, by `mem::swap` say, and the wrong one is cancelled.
//! - `mem::forget` of a guard keeps its transaction and its connection.
//! - A transaction that is dropped on a current-thread runtime is rolled back when that runtime runs again.
//! - A connection needs the runtime on which it was opened, except SQLite's. A pool of the crate's own that outlives it opens
//!   new ones; a wrapped pool is sqlx's, which does not look.
//! - After a `fork` the child has no thread for cancels: its drops end by their time limits, and close the connection.
//! - A `COMMIT` that has no answer is waited for as long as its caller waits, and for ten minutes after the caller has gone.
//!   Then its connection is closed, and its outcome is unknown.
//! - A `commit` of a nested sqlx transaction that is dropped halfway may undo more than that one, because sqlx gives its
//!   savepoints the same name again. Those of [`savepoint`](TransactionGuard::savepoint) are told apart.
//! - A `begin` that is cancelled inside a *nested* sqlx transaction takes more than that with it, and the guard's `commit` is
//!   [`TxError::Lost`]. On a wrapped PostgreSQL pool, and behind a pooler, what then still runs on the nested transaction is
//!   committed by itself. On MySQL, and on PostgreSQL with a version of sqlx after 0.9.0, the nested `commit` commits what is
//!   left of the whole; then the outcome is [`CommitOutcome::Unknown`].
//!   Behind a pooler, what was prepared in it stays on the pooler's session until such a pool has another transaction there.
//!
//! PostgreSQL:
//!
//! - Version 13 and later. Behind a pooler that gives each transaction another session, such as PgBouncer in transaction
//!   mode, a pool must be told so ([`PoolerMode`]); a wrapped pool must lead to the server itself.
//! - Server code that cannot be cancelled ends in its own time, or with its session.
//! - sqlx does not give the key of a session away with which the protocol cancels. Where the server has no session left for
//!   the connection for cancelling, the connection of the dropped transaction is closed instead, and the server, which looks
//!   for its client every half second (version 14 and later, on Linux), ends the statement.
//! - A raw `COMMIT` in the SQL is executed, and reported by the guard's own `commit` and `rollback`; the outcome is
//!   [`CommitOutcome::Unknown`]. Behind a raw `COMMIT` or `ROLLBACK`, each further write is refused on a pool of the crate's
//!   own, and commits by itself on a wrapped one.
//! - On a wrapped pool, a transaction that somebody else has left open, and in which nothing was read or written but a
//!   `LOCK`, `NOTIFY` or `SET LOCAL`, is joined by `begin`. Any other one is noticed, and its session closed.
//! - The outcome of a connection that is lost inside `COMMIT` is looked up only with [`CommitMode::Resolvable`].
//!
//! MySQL and MariaDB:
//!
//! - An address that leads to another of several servers each time cannot be used: a cancel would go to the wrong one.
//! - A statement whose client has died goes on until it has something to say to it.
//! - A hundred statements that wait in MariaDB's `SLEEP()` take seconds to cancel, because the server itself waits inside
//!   `KILL` for each. Statements that wait for a lock do not.
//! - MySQL commits by itself before a DDL statement. Inside a guard the DDL is then refused, and `commit` is
//!   [`TxError::Lost`], but what came before it is committed, and [`CommitOutcome::Unknown`] is told. `CREATE TEMPORARY
//!   TABLE` does not do that. A raw `COMMIT` is noticed by `commit` alone.
//! - Where MySQL has rolled back by itself and its error was passed over, as for the victim of a deadlock, `commit` is
//!   [`TxError::Lost`] as well, and the outcome [`CommitOutcome::Unknown`], because the two look the same.
//! - sqlx loses its place in the answers when a statement is dropped while it is prepared, which is when its text is new to
//!   the connection, or in the middle of a packet. The guard's own statements come behind a random number, and no answer is
//!   believed before that was read: after a drop and a rollback the connection is in step or closed, and a `commit` is rolled
//!   back, or unknown if `COMMIT` had been sent. Where sqlx and the server wait for each other, that is found out over the
//!   connection for cancelling, when the server has waited for five seconds in a `commit` or a
//!   [`savepoint`](TransactionGuard::savepoint), for two once `COMMIT` has been sent, and for half a second after a drop. A
//!   further statement of the caller's on that guard may panic inside sqlx, fail, or wait for ever: give it up with the
//!   future of such a statement. A wrapped pool may hand out a connection on which that has happened outside of any guard;
//!   its commit is then unknown.
//!
//! SQLite:
//!
//! - A statement that waits for a lock ends by `busy_timeout`. A raw `COMMIT` of a transaction that has written is refused.
//! - A database in memory lives as long as one of its connections does.
//! - The progress handler, the commit hook and the rollback hook of each connection are taken.
//!
//! # Comparison
//!
//! `sqlx::Transaction`, sea-orm's and deadpool-postgres's leave an abandoned statement running: with `pg_sleep(10)` the
//! row lock is free after 9.8 s, here after milliseconds. sqlx alone is the right choice where futures are never dropped.
//! [`TxPool::wrap`] puts guards on a pool that exists already; a [`TxPool`] of its own makes more of its sessions: they
//! write nothing outside a guard's transaction, and a dead client is noticed sooner.
//!
//! # Features
//!
//! - `sqlite` (default), `postgres` and `mysql` (MySQL and MariaDB): the databases. sqlx's runtime and TLS features are
//!   the application's to choose; tokio is needed. sqlx's `macros` is on, without which `Executor` is another trait.
//! - `tracing`: logs what [`TxPool::events`] tells, and the error of a commit whose caller had gone.
//!
//! The oldest supported Rust is 1.94, as for sqlx 0.9.

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

// The examples of the README compile.
#[cfg(all(doctest, feature = "postgres"))]
#[doc = include_str!("../README.md")]
struct Readme;
