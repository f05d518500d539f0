//! SQLite: hooks on the connection see and stop what no statement could.
//!
//! Invariant: while a guard is open, nothing is committed on its connection. A commit hook turns every
//! COMMIT that is not the guard's own into a rollback, so neither a raw `COMMIT` in SQL nor a statement
//! that runs after the transaction was lost can become permanent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::Duration;

use sqlx::error::DatabaseError;
use sqlx::sqlite::{SqliteConnectOptions, SqliteError};
use sqlx::{AssertSqlSafe, Connection, Database, SqlSafeStr, Sqlite, SqliteConnection};
use sqlx_core::transaction::TransactionManager;

use crate::TxError;
use crate::backend::{
    Activity, Backend, Cancels, CommitFailure, CommitMode, Driver, First, Isolation, Mode, Options, Receipt, Rollback,
    Unsignalled, Wanted, depth,
};
use crate::pooler::PoolerMode;

type Manager = <Sqlite as Database>::TransactionManager;

/// How many virtual machine instructions run between two checks of the cancel flag.
const PROGRESS_OPS: i32 = 1_000;

/// How often a rollback is tried before the connection is given up.
const ROLLBACK_ATTEMPTS: usize = 4;

/// SQLite's code for "there is no transaction", and for other errors that a COMMIT cannot cause.
const SQLITE_ERROR: u32 = 1;
const SQLITE_BUSY: u32 = 5;
const SQLITE_LOCKED: u32 = 6;
const SQLITE_CANTOPEN: u32 = 14;

/// The connection is not in a guard's transaction.
const IDLE: u8 = 0;
/// A guard's transaction is open, and nothing may be committed.
const OPEN: u8 = 1;
/// The guard's own commit is under way.
const COMMITTING: u8 = 2;

/// The state that the hooks of one connection share with us.
#[derive(Debug, Default)]
#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Hooks {
    phase: AtomicU8,
    /// Set by the rollback hook: the transaction has ended, for whatever reason.
    rolled_back: AtomicBool,
    /// Read by the progress handler: interrupt the running statement.
    cancel: AtomicBool,
    /// Read by the commit hook, which SQLite does not call for a transaction that has written nothing.
    read_only: AtomicBool,
}

impl Hooks {
    fn enter(&self, phase: u8) {
        self.phase.store(phase, Ordering::Release);
    }

    fn is_rolled_back(&self) -> bool {
        self.rolled_back.load(Ordering::Acquire)
    }

    /// While COMMITTING, a commit that follows a rollback is not the guard's transaction, but a statement
    /// that was left in the queue and would be committed by itself.
    fn may_commit(&self) -> bool {
        match self.phase.load(Ordering::Acquire) {
            IDLE => true,
            COMMITTING => !self.is_rolled_back() && !self.read_only.load(Ordering::Acquire),
            _ => false,
        }
    }
}

impl Backend for Sqlite {}

impl Driver for Sqlite {
    const TITLE: &'static str = "SQLite";
    const NEEDS_ITS_RUNTIME: bool = false;
    const IS_REMOTE: bool = false;
    const TAKES_FILES: bool = true;
    type Probe = Arc<Hooks>;
    type Known = ();
    type Canceller = ();

    fn target(options: &Options<Self>) -> String {
        format!("{:?}", SqliteConnectOptions::get_filename(options))
    }

    fn connect_error(target: String, source: sqlx::Error) -> TxError {
        match primary_code(&source) {
            Some(SQLITE_CANTOPEN) => TxError::MissingDatabase { target, source },
            _ => TxError::Refused { target, source },
        }
    }

    /// Nothing else about BEGIN is an error of this kind.
    fn is_occupied(error: &sqlx::Error) -> bool {
        matches!(error, sqlx::Error::InvalidSavePointStatement) || primary_code(error) == Some(SQLITE_ERROR)
    }

    async fn probe(
        conn: &mut SqliteConnection,
        _: PoolerMode,
        _: Option<First<'_, Self>>,
    ) -> Result<Arc<Hooks>, sqlx::Error> {
        let hooks = Arc::new(Hooks::default());
        let mut handle = conn.lock_handle().await?;
        handle.set_progress_handler(PROGRESS_OPS, {
            let hooks = Arc::clone(&hooks);
            move || !hooks.cancel.load(Ordering::Relaxed)
        });
        handle.set_commit_hook({
            let hooks = Arc::clone(&hooks);
            move || hooks.may_commit()
        });
        handle.set_rollback_hook({
            let hooks = Arc::clone(&hooks);
            move || hooks.rolled_back.store(true, Ordering::Release)
        });
        Ok(hooks)
    }

    async fn recognise(conn: &mut SqliteConnection, (): &()) -> Result<Arc<Hooks>, sqlx::Error> {
        Self::probe(conn, PoolerMode::None, None).await
    }

    /// Every SQLite transaction is serializable. Requesting it takes the write lock at once, because a transaction that
    /// reads before its first write may not get it any more.
    async fn begin(conn: &mut SqliteConnection, hooks: &Arc<Hooks>, mode: &Mode) -> Result<(), sqlx::Error> {
        let write = (mode.immediate || mode.isolation == Some(Isolation::Serializable)) && !mode.read_only;
        // Always a BEGIN of our own: in somebody else's transaction, sqlx would make a savepoint, but BEGIN is refused.
        let statement = Some(if write { "BEGIN IMMEDIATE" } else { "BEGIN" }.into_sql_str());
        hooks.cancel.store(false, Ordering::Relaxed);
        hooks.rolled_back.store(false, Ordering::Release);
        hooks.enter(OPEN);
        hooks.read_only.store(mode.read_only, Ordering::Release);
        let begun = Manager::begin(conn, statement).await;
        if begun.is_err() {
            hooks.enter(IDLE);
        }
        begun
    }

    /// Nothing is compared, so nothing has to be reset.
    async fn discard(_: &mut SqliteConnection) -> Result<bool, sqlx::Error> {
        Ok(true)
    }

    /// The commit hook refuses each write, as it does for a transaction that was lost.
    fn begin_read(hooks: &Arc<Hooks>) {
        hooks.cancel.store(false, Ordering::Relaxed);
        hooks.enter(OPEN);
    }

    async fn end_read(conn: &mut SqliteConnection, hooks: &Arc<Hooks>) -> Result<(), sqlx::Error> {
        conn.ping().await?;
        hooks.cancel.store(false, Ordering::Relaxed);
        hooks.enter(IDLE);
        Ok(())
    }

    async fn run_sql(conn: &mut SqliteConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    fn is_transient(error: &(dyn DatabaseError + 'static)) -> bool {
        let primary = error.try_downcast_ref::<SqliteError>().and_then(|error| primary_code_of(error));
        matches!(primary, Some(SQLITE_BUSY | SQLITE_LOCKED))
    }

    fn is_lost(conn: &SqliteConnection, hooks: &Arc<Hooks>) -> bool {
        hooks.is_rolled_back() || depth::<Self>(conn) == 0
    }

    async fn commit(conn: &mut SqliteConnection, hooks: &Arc<Hooks>, _: CommitMode) -> Result<(), CommitFailure> {
        // Anything that dropped futures have left in the queue runs first. It may be somebody else's COMMIT, which must
        // meet the hook while the hook still refuses it. Our COMMIT has not been sent, so an error here is a rollback.
        conn.ping().await.map_err(CommitFailure::Refused)?;
        let lost_before = hooks.is_rolled_back();
        hooks.enter(COMMITTING);
        let mut committed = Manager::commit(conn).await;
        // Nested transactions that were forgotten are released first. Each success takes one level away.
        while committed.is_ok() && depth::<Self>(conn) > 0 {
            committed = Manager::commit(conn).await;
        }
        // sqlx returns Ok if its depth had already fallen to zero, so the rollback hook has the last word.
        let lost = hooks.is_rolled_back();
        hooks.enter(if committed.is_ok() && !lost { IDLE } else { OPEN });
        match committed {
            Err(error) if !matches!(error, sqlx::Error::Database(_)) => Err(CommitFailure::Unknown(error)),
            _ if lost && !lost_before && hooks.read_only.load(Ordering::Acquire) => {
                Err(CommitFailure::Lost("it was to be read only, and has written"))
            }
            _ if lost => Err(CommitFailure::Lost("the database or a cancelled nested begin had rolled it back")),
            // Without any write, a COMMIT in the SQL passes the commit hook, and leaves nothing to commit.
            Err(error) if primary_code(&error) == Some(SQLITE_ERROR) => {
                Err(CommitFailure::Lost("its SQL had ended the transaction already"))
            }
            Err(error) => Err(CommitFailure::Refused(error)),
            Ok(()) => Ok(()),
        }
    }

    async fn resolve((): &(), _: &Arc<Options<Self>>, _: &Arc<Hooks>, _: &Receipt, _: Duration) -> Option<bool> {
        None
    }

    async fn rollback(conn: &mut SqliteConnection, hooks: &Arc<Hooks>) -> Result<Rollback, sqlx::Error> {
        // A round trip first, so that anything a dropped future has left in the queue runs before the rollback.
        conn.ping().await?;
        let mut doubtful = hooks.is_rolled_back();
        for _ in 0..ROLLBACK_ATTEMPTS {
            if depth::<Self>(conn) == 0 {
                break;
            }
            match Manager::rollback(conn).await {
                Ok(()) => {}
                // SQLite had rolled back by itself and sqlx still counts a transaction: give sqlx one to end.
                Err(sqlx::Error::Database(_)) => {
                    doubtful = true;
                    hooks.cancel.store(false, Ordering::Relaxed);
                    tolerate(sqlx::raw_sql("BEGIN").execute(&mut *conn).await)?;
                }
                Err(error) => return Err(error),
            }
        }
        hooks.cancel.store(false, Ordering::Relaxed);
        if depth::<Self>(conn) != 0 {
            return Err(sqlx::Error::Protocol("the transaction could not be rolled back".into()));
        }
        if doubtful {
            // The SQL may have run a BEGIN of its own, which sqlx does not count. Outside a transaction, this ROLLBACK
            // is an error without effect.
            tolerate(sqlx::raw_sql("ROLLBACK").execute(&mut *conn).await)?;
        }
        // The cancel may come at any await of this method. It must not hit the owner of a wrapped connection later.
        hooks.cancel.store(false, Ordering::Relaxed);
        hooks.enter(IDLE);
        Ok(Rollback::Done)
    }

    async fn quiet(conn: &mut SqliteConnection, _: &Arc<Hooks>) -> Result<(), sqlx::Error> {
        conn.ping().await
    }

    fn interrupt(hooks: &Arc<Hooks>) {
        hooks.cancel.store(true, Ordering::Relaxed);
    }
}

/// A running SQLite statement can be reached directly.
impl Cancels<Sqlite> for () {
    async fn warm(&self, _: &Arc<SqliteConnectOptions>) -> Result<(), sqlx::Error> {
        Ok(())
    }

    async fn signal(
        &self,
        _: &Arc<SqliteConnectOptions>,
        wanted: Wanted,
        hooks: &Arc<Hooks>,
    ) -> Result<Activity, Unsignalled> {
        if wanted != Wanted::Look {
            Sqlite::interrupt(hooks);
        }
        Ok(Activity::Unseen)
    }

    async fn close(&self) {}
}

/// An answer of the database, even a refusal, shows that the connection works.
fn tolerate<T>(result: Result<T, sqlx::Error>) -> Result<(), sqlx::Error> {
    match result {
        Ok(_) | Err(sqlx::Error::Database(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The extended codes carry the primary one in their low byte.
fn primary_code(error: &sqlx::Error) -> Option<u32> {
    primary_code_of(error.as_database_error()?)
}

fn primary_code_of(error: &dyn DatabaseError) -> Option<u32> {
    error.code()?.parse::<u32>().ok().map(|code| code & 0xff)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::pin::pin;

    use sqlx::ConnectOptions;

    use super::*;

    #[tokio::test]
    async fn a_rollback_that_is_cancelled_at_every_await_leaves_no_cancel_behind() {
        let mut conn = SqliteConnectOptions::new().in_memory(true).connect().await.unwrap();
        let hooks = Sqlite::probe(&mut conn, PoolerMode::None, None).await.unwrap();
        Sqlite::begin(&mut conn, &hooks, &Mode::default()).await.unwrap();
        // SQLite has already rolled back by itself, so the rollback has the most to do.
        sqlx::raw_sql("ROLLBACK").execute(&mut conn).await.unwrap();
        {
            let mut rollback = pin!(Sqlite::rollback(&mut conn, &hooks));
            let cancelled = poll_fn(|cx| {
                let polled = rollback.as_mut().poll(cx);
                if polled.is_pending() {
                    Sqlite::interrupt(&hooks);
                }
                polled
            });
            cancelled.await.unwrap();
        }
        assert!(!hooks.cancel.load(Ordering::Relaxed));
    }
}
