//! PostgreSQL: cancelling and terminating over a separate connection, and a commit that proves itself.
//!
//! Invariant: a cancel is acknowledged before its target connection is used again, and it identifies its target by more
//! than the process id, so it can never hit another transaction's statement.

mod habit;
mod pooled;
mod proof;

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnectOptions, PgDatabaseError};
use sqlx::{AssertSqlSafe, Connection, Database, PgConnection, Postgres, Row, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;

use crate::TxError;
use crate::backend::{
    Activity, Backend, Cancels, CommitFailure, CommitMode, Driver, First, Isolation, Mode, Options, Receipt, Rollback,
    Wanted, depth,
};
use crate::canceller::{Canceller, Opened, Signals};
use crate::known::Known;
use crate::pooler::PoolerMode;

use self::pooled::Place;
use self::proof::STATE;

type Manager = <Postgres as Database>::TransactionManager;

/// How often a rollback is tried: each abandoned statement may answer with one error.
const ROLLBACK_ATTEMPTS: usize = 16;

/// How many milliseconds later than the client the server ends a session whose transaction takes too long.
const SESSION_MARGIN: u128 = 1_000;

/// The same for a statement. Our own limit is over by then, so the caller does not get the server's message.
const STATEMENT_MARGIN: u128 = 250;

/// The largest timeout that the server accepts, in milliseconds.
const LONGEST_LIMIT: u128 = 2_147_483_647;

/// Makes the server notice within half a second that the client has gone. From version 14 on.
const CHECK_CLIENT: &str = "SET client_connection_check_interval = '500ms'";

/// Process ids are reused. The start time distinguishes two processes with the same id.
///
/// On our own sessions, everything outside a guard's transaction may only read from here on. A `begin` that is
/// cancelled two levels deep ends the whole transaction, and the statements that follow in the level between do not
/// pass the guard. Where nothing can be written anyway, the session is left as it is.
const IDENTIFY: &str = "SELECT pid, (extract(epoch FROM backend_start) * 1000000)::bigint,
    CASE WHEN $1 AND current_setting('default_transaction_read_only') = 'off' AND NOT pg_is_in_recovery()
        THEN set_config('default_transaction_read_only', 'on', false) = 'on' ELSE false END,
    coalesce(current_setting('client_connection_check_interval', true) = '0' AND version() ~ 'linux', false)
    FROM pg_stat_get_activity(pg_backend_pid())";

/// Sessions are matched by both, so that a session that has replaced another one is left alone; and by the transaction,
/// if only the transaction makes the session ours.
const WHICH: &str = "(a.pid)
    FROM unnest('{PIDS}'::int[], '{STARTS}'::bigint[], '{TRANSACTIONS}'::bigint[]) AS wanted (pid, started, transaction)
    JOIN pg_stat_get_activity(NULL) a ON a.pid = wanted.pid
    WHERE (extract(epoch FROM a.backend_start) * 1000000)::bigint = wanted.started
        AND wanted.transaction IN (0, (extract(epoch FROM a.xact_start) * 1000000)::bigint)";

/// The SQLSTATEs of a transaction that has already run a query, or has failed.
const IN_TRANSACTION: [&str; 2] = ["25001", "25P02"];

/// The SQLSTATE of a server, role or database that has reached its session limit.
const TOO_MANY_SESSIONS: &str = "53300";

/// Everything that DISCARD ALL does, except for the prepared statements, which belong to sqlx.
const DISCARD: &str = "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ROLE; RESET ALL; UNLISTEN *;
    SELECT pg_advisory_unlock_all(); DISCARD PLANS; DISCARD TEMP; DISCARD SEQUENCES";

/// The SQLSTATEs for "this prepared statement does not exist", and for "it exists already".
const NO_STATEMENT: &str = "26000";
const STATEMENT_EXISTS: &str = "42P05";

/// The SQLSTATE for "no transaction is open".
const NO_TRANSACTION: &str = "25P01";

/// Keeps the session from writing anything any more, whatever is rolled back on it afterwards.
const FENCE: &str = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY";

/// Begins a transaction and spoils it at once, so that each later statement is refused.
const SPOIL: &str = "BEGIN; ROLLBACK TO SAVEPOINT \"none: the guarded transaction was lost\"";

/// The same for the session of this one transaction.
const HOLD: &str = "BEGIN READ ONLY";

/// One backend of the server.
#[derive(Debug, Clone, Copy)]
#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct BackendId {
    pid: i32,
    /// In microseconds.
    started: i64,
    /// When the transaction began that makes the session ours, in microseconds. Zero for our own sessions.
    transaction: i64,
    /// Whether only a transaction that requests it may write.
    fenced: bool,
    /// Whether the server could check for a vanished client, but does not.
    unwatched: bool,
}

impl Backend for Postgres {}

impl Driver for Postgres {
    const TITLE: &'static str = "PostgreSQL";
    const HAS_POOLERS: bool = true;
    type Probe = Place;
    type Known = Known<Self, BackendId>;
    type Canceller = Canceller<Self>;

    fn target(options: &Options<Self>) -> String {
        let database = options.get_database().unwrap_or("(default)");
        match options.get_socket() {
            Some(socket) => format!("{database:?} at {}", socket.display()),
            None => format!("{database:?} at {}:{}", options.get_host(), options.get_port()),
        }
    }

    fn connect_error(target: String, source: sqlx::Error) -> TxError {
        match &source {
            sqlx::Error::Database(error) => match error.code().as_deref() {
                Some("3D000") => TxError::MissingDatabase { target, source },
                Some(TOO_MANY_SESSIONS) => TxError::TooManySessions { target, source },
                Some("57P01" | "57P02" | "57P03") => TxError::NotReady { target, source },
                _ => TxError::Refused { target, source },
            },
            sqlx::Error::Configuration(reason) if pooled::is_refused(&**reason) => TxError::Pooler { target },
            sqlx::Error::Configuration(_) => {
                TxError::InvalidUrl { database: Self::TITLE, reason: "an option cannot be used".to_owned() }
            }
            _ => TxError::Unreachable { target, source },
        }
    }

    fn is_full(error: &sqlx::Error) -> bool {
        code(error).as_deref() == Some(TOO_MANY_SESSIONS)
    }

    fn is_occupied(error: &sqlx::Error) -> bool {
        matches!(error, sqlx::Error::InvalidSavePointStatement)
            || code(error).is_some_and(|code| IN_TRANSACTION.contains(&code.as_str()))
    }

    fn for_a_pooler(options: PgConnectOptions) -> PgConnectOptions {
        options.statement_cache_capacity(0)
    }

    async fn probe(
        conn: &mut PgConnection,
        pooler: PoolerMode,
        first: Option<First<'_, Self>>,
    ) -> Result<Place, sqlx::Error> {
        habit::learn(conn).await?;
        if pooler == PoolerMode::Transaction {
            return Ok(Place::pooled());
        }
        if let Some(first) = first {
            pooled::refuse(conn, first).await?;
        }
        if conn.server_version_num().is_some_and(|version| version >= 14_00_00) {
            // Not every operating system supports it; the server then refuses the setting, and works without it.
            match sqlx::raw_sql(CHECK_CLIENT).execute(&mut *conn).await {
                Ok(_) | Err(sqlx::Error::Database(_)) => {}
                Err(error) => return Err(error),
            }
        }
        identify(conn, true, false).await.map(Place::own)
    }

    async fn recognise(conn: &mut PgConnection, known: &Self::Known) -> Result<Place, sqlx::Error> {
        habit::learn(conn).await?;
        let Some(statement) = known.statement(conn, IDENTIFY).await? else {
            return identify(conn, false, false).await.map(Place::lent);
        };
        if let Some(backend) = known.find(&statement) {
            return Ok(Place::lent(backend));
        }
        let backend = identify(conn, false, true).await?;
        known.remember(statement, backend);
        Ok(Place::lent(backend))
    }

    async fn state(conn: &mut PgConnection, place: &Place, names: &[String]) -> Result<Option<String>, sqlx::Error> {
        if place.is_compared() {
            match sqlx::raw_sql(proof::ASK_STATE).fetch_one(&mut *conn).await {
                // Somebody has deallocated all prepared statements.
                Err(error) if code(&error).as_deref() == Some(NO_STATEMENT) => {}
                row => return row?.try_get(0).map(Some),
            }
        }
        let prepare = prepare_state(names);
        match Self::run_sql(conn, prepare.clone()).await {
            // It was prepared before the session was reset, or by somebody else, who may compare something else.
            Err(error) if code(&error).as_deref() == Some(STATEMENT_EXISTS) => {
                Self::run_sql(conn, format!("DEALLOCATE {STATE}; {prepare}")).await?;
            }
            prepared => prepared?,
        }
        place.compare();
        sqlx::raw_sql(proof::ASK_STATE).fetch_one(conn).await?.try_get(0).map(Some)
    }

    fn was_seen(place: &Place, state: &str) -> bool {
        place.state().as_deref() == Some(state)
    }

    fn begin_read(place: &Place) {
        *place.state() = None;
    }

    async fn count_none(conn: &mut PgConnection, place: &Place) -> Result<bool, sqlx::Error> {
        if !place.stays_counted() || depth::<Self>(conn) == 0 {
            return Ok(false);
        }
        // One poll writes the message, and both answers are read together. It begins a transaction for the rollback to
        // end: without one, the server would log a warning.
        drop(sqlx::raw_sql("BEGIN").execute(&mut *conn).now_or_never());
        proof::leave(conn);
        conn.flush().await.map(|()| true)
    }

    async fn discard(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
        Self::run_sql(conn, DISCARD.to_owned()).await.map(|()| true)
    }

    async fn begin(conn: &mut PgConnection, place: &Place, mode: &Mode) -> Result<(), sqlx::Error> {
        *place.state() = None;
        let sql = begin_sql(mode, &place.backend(), conn.server_version_num());
        match place.stays_counted() && depth::<Self>(conn) == 1 {
            true => proof::say(conn, sql).await?,
            false => Manager::begin(conn, Some(AssertSqlSafe(sql).into_sql_str())).await?,
        }
        if place.is_pooled() { place.learn(conn).await } else { Ok(()) }
    }

    async fn end_read(conn: &mut PgConnection, place: &Place) -> Result<(), sqlx::Error> {
        // Behind a pooler, a message outside a transaction says nothing about the session that the last one had.
        if place.is_pooled() { conn.ping().await } else { proof::exchange_nothing(conn).await }
    }

    async fn run_sql(conn: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(conn).await.map(drop)
    }

    /// 40001 is a serialization failure, 40P01 a deadlock.
    fn is_transient(error: &(dyn DatabaseError + 'static)) -> bool {
        error.try_downcast_ref::<PgDatabaseError>().is_some_and(|error| matches!(error.code(), "40001" | "40P01"))
    }

    fn is_lost(conn: &PgConnection, _: &Place) -> bool {
        depth::<Self>(conn) == 0
    }

    /// A `begin` that is cut two levels deep goes wrong in every version of sqlx. Version 0.9.0 rolls the whole
    /// transaction back. A version that takes a dropped `begin` back leaves the level of the transaction itself, and
    /// the `commit` of the level between then commits the whole.
    fn may_have_committed(conn: &mut PgConnection) -> bool {
        depth::<Self>(conn) == 0 && habit::takes_dropped_begins_back()
    }

    /// One poll of a `begin` writes its message into the connection's buffer, ahead of whatever the caller sends next. What
    /// sqlx does when the `begin` is then dropped differs between its versions: nothing, or a `ROLLBACK`, which ends the
    /// spoilt transaction. Writes are refused in both cases.
    ///
    /// Behind a pooler the next session is not ours to change, so there the fence is a transaction that has to last:
    /// the `begin` is not dropped, but forgotten.
    fn fence(conn: &mut PgConnection, place: &Place) {
        if place.is_pooled() {
            // If a `begin` meets the error of an abandoned statement, later versions of sqlx take it back.
            for _ in 0..ROLLBACK_ATTEMPTS {
                let mut hold = Box::pin(Manager::begin(conn, Some(HOLD.into_sql_str())));
                match hold.as_mut().now_or_never() {
                    Some(Err(_)) => {}
                    Some(Ok(())) => return,
                    None => return std::mem::forget(hold),
                }
            }
            return;
        }
        Manager::begin(conn, Some(FENCE.into_sql_str())).now_or_never();
        Manager::begin(conn, Some(SPOIL.into_sql_str())).now_or_never();
    }

    async fn commit(conn: &mut PgConnection, place: &Place, mode: CommitMode) -> Result<(), CommitFailure> {
        release_forgotten(conn).await?;
        let receipt = match mode {
            CommitMode::Verified => None,
            CommitMode::Resolvable => Some(proof::receipt(conn).await?),
        };
        let answer = proof::exchange_commit(conn, place.farewell()).await;
        // Nothing behind the answer to COMMIT can take the commit back.
        if answer.row && answer.done_after_row >= 2 {
            *place.state() = answer.state;
            // The ROLLBACK of the farewell may have been cancelled.
            if !place.stays_counted() || answer.done_after_row < 3 {
                proof::leave(conn);
            }
            return Ok(());
        }
        let Some(error) = answer.failure else {
            return Err(proof::in_doubt(proof::out_of_step(), receipt));
        };
        if !proof::is_refusal(&error) {
            // The row precedes COMMIT, so a session that ended before it sent the row has not run COMMIT.
            return Err(match proof::is_last_word(&error) && !answer.row {
                true => CommitFailure::Refused(error),
                false => proof::in_doubt(error, receipt),
            });
        }
        // The row would have come ahead of COMMIT.
        if !answer.row {
            return Err(CommitFailure::Aborted(error));
        }
        // The COMMIT failed, and the server is outside any transaction, where it would log a warning about a ROLLBACK.
        // sqlx still counts a transaction, so an empty one is opened for the rollback to end.
        let ended = code(&error).as_deref() == Some(NO_TRANSACTION);
        match sqlx::raw_sql("BEGIN").execute(conn).await {
            Ok(_) if ended => Err(CommitFailure::Ended),
            Ok(_) | Err(_) => Err(CommitFailure::Refused(error)),
        }
    }

    fn is_nothing_due(conn: &PgConnection, place: &Place) -> bool {
        place.stays_counted() || depth::<Self>(conn) == 0
    }

    async fn resolve(
        canceller: &Self::Canceller,
        options: &Arc<PgConnectOptions>,
        place: &Place,
        receipt: &Receipt,
        limit: Duration,
    ) -> Option<bool> {
        proof::resolve(options, receipt, limit, || canceller.signal(options, Wanted::Terminate, place)).await
    }

    /// A fresh random number in the answer shows that it answers this message: after a dropped COPY, sqlx takes each
    /// answer for the answer to the previous message.
    async fn rollback(conn: &mut PgConnection, place: &Place) -> Result<Rollback, sqlx::Error> {
        if depth::<Self>(conn) == 0 {
            return Err(sqlx::Error::Protocol("the transaction was lost: the state of the session is unknown".into()));
        }
        let mut found = Rollback::Done;
        for _ in 0..ROLLBACK_ATTEMPTS {
            while depth::<Self>(conn) > 1 {
                // A nested transaction that was forgotten.
                Manager::start_rollback(conn);
            }
            let answer = proof::exchange_rollback(conn, place.farewell()).await;
            match answer.failure {
                // A session that listens may be told something at the end of its transaction, which sqlx does not expect.
                None | Some(sqlx::Error::Database(_) | sqlx::Error::Protocol(_)) if answer.row => {
                    *place.state() = answer.state;
                    // The ROLLBACK of the farewell may have been cancelled.
                    if !place.stays_counted() || answer.done_after_row < 2 {
                        proof::leave(conn);
                    }
                    return Ok(found);
                }
                None => return Err(proof::out_of_step()),
                // The transaction's own SQL has ended it.
                Some(error) if code(&error).as_deref() == Some(NO_TRANSACTION) => {
                    found = Rollback::TooLate;
                    Self::run_sql(conn, "BEGIN".to_owned()).await?;
                }
                // The error of an abandoned statement, or of a cancel that hit the ROLLBACK itself.
                Some(sqlx::Error::Database(_)) => {}
                Some(error) => return Err(error),
            }
        }
        Err(sqlx::Error::Protocol("the transaction could not be rolled back".into()))
    }

    async fn quiet(conn: &mut PgConnection, _: &Place) -> Result<(), sqlx::Error> {
        conn.flush().await
    }
}

/// BEGIN and its limits in one message, so that they cost no extra round trip.
fn begin_sql(mode: &Mode, backend: &BackendId, version: Option<u32>) -> String {
    let mut sql = String::from("BEGIN");
    sql.push_str(match mode.isolation {
        None => "",
        Some(Isolation::ReadCommitted) => " ISOLATION LEVEL READ COMMITTED",
        Some(Isolation::RepeatableRead) => " ISOLATION LEVEL REPEATABLE READ",
        Some(Isolation::Serializable) => " ISOLATION LEVEL SERIALIZABLE",
    });
    if mode.read_only {
        sql.push_str(" READ ONLY");
    } else if backend.fenced {
        sql.push_str(" READ WRITE");
    }
    // It would not be deferrable anyway, but a transaction that has run a query refuses this. Inside such a
    // transaction, a plain BEGIN would only draw a warning and join it.
    sql.push_str(" NOT DEFERRABLE");
    if backend.unwatched {
        // Where nothing can be cancelled, only the end of the connection ends its statement.
        sql.push_str("; SET LOCAL client_connection_check_interval = '500ms'");
    }
    if let Some(remaining) = mode.remaining {
        // The server's own limits matter only if the client is gone or hangs, so they strike later than the client's.
        // Rounded up, because a limit that strikes a moment too soon is reported as another error.
        let rest = remaining.as_micros().div_ceil(1_000);
        let limit = (rest + STATEMENT_MARGIN).min(LONGEST_LIMIT);
        let margin = (rest + SESSION_MARGIN).min(LONGEST_LIMIT);
        sql.push_str(&format!("; SET LOCAL statement_timeout = {limit}"));
        sql.push_str(&format!("; SET LOCAL idle_in_transaction_session_timeout = {margin}"));
        if version.is_some_and(|version| version >= 17_00_00) {
            sql.push_str(&format!("; SET LOCAL transaction_timeout = {margin}"));
        }
    }
    sql
}

/// The role, the search path and the settings with these names in one text. A setting that was never set counts as
/// empty, as it is after a SET LOCAL. The locks are released, because looking for them would cost more. It is a prepared
/// statement, because planning it takes several times as long as running it.
fn prepare_state(names: &[String]) -> String {
    let settings = names.iter().map(|name| format!("coalesce(current_setting('{name}', true), ''), "));
    let settings: String = settings.collect();
    format!(
        "PREPARE {STATE} AS SELECT concat_ws(chr(1), current_setting('role'), session_user,
            current_setting('search_path'), current_setting('default_transaction_read_only'),
            coalesce(current_setting('client_connection_check_interval', true), ''), {settings} pg_advisory_unlock_all()::text) AS {STATE}"
    )
}

/// A forgotten nested transaction of sqlx is part of the whole. sqlx counts it until it is told otherwise, and COMMIT
/// removes its savepoint without telling sqlx.
async fn release_forgotten(conn: &mut PgConnection) -> Result<(), CommitFailure> {
    while depth::<Postgres>(conn) > 1 {
        match Manager::commit(conn).await {
            Ok(()) => {}
            Err(error) if code(&error).as_deref() == Some(NO_TRANSACTION) => return Err(CommitFailure::Ended),
            Err(error) if proof::is_refusal(&error) => return Err(CommitFailure::Aborted(error)),
            // COMMIT has not been sent.
            Err(error) => return Err(CommitFailure::Refused(error)),
        }
    }
    Ok(())
}

fn code(error: &sqlx::Error) -> Option<String> {
    Some(error.as_database_error()?.code()?.into_owned())
}

async fn identify(conn: &mut PgConnection, fence: bool, keep: bool) -> Result<BackendId, sqlx::Error> {
    let identify = sqlx::query_as(IDENTIFY).bind(fence).persistent(keep);
    let (pid, started, fenced, unwatched) = identify.fetch_one(conn).await?;
    Ok(BackendId { pid, started, transaction: 0, fenced, unwatched })
}

impl Signals for Postgres {
    type Session = BackendId;

    const TRIPS: u32 = 1;

    fn session(place: &Place) -> BackendId {
        place.backend()
    }

    /// PostgreSQL's sessions are distinguished by their start times.
    fn ran(_: &mut PgConnection) -> BoxFuture<'_, Result<Duration, sqlx::Error>> {
        std::future::ready(Ok(Duration::MAX)).boxed()
    }

    fn send<'c>(
        conn: &'c mut PgConnection,
        _: Opened,
        wanted: Wanted,
        sessions: &'c [BackendId],
    ) -> BoxFuture<'c, Result<Vec<Activity>, sqlx::Error>> {
        let function = if wanted == Wanted::Terminate { "pg_terminate_backend" } else { "pg_cancel_backend" };
        let list = |number: fn(&BackendId) -> i64| {
            sessions.iter().map(|session| number(session).to_string()).collect::<Vec<_>>().join(",")
        };
        let which = WHICH
            .replace("PIDS", &list(|session| session.pid.into()))
            .replace("STARTS", &list(|session| session.started))
            .replace("TRANSACTIONS", &list(|session| session.transaction));
        let sql = AssertSqlSafe(format!("SELECT {function}{which}"));
        let seen = vec![Activity::Unseen; sessions.len()];
        // One simple query, because behind a pooler two messages may reach two sessions.
        async move { sqlx::raw_sql(sql).execute(conn).await.map(|_| seen) }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use sqlx::ConnectOptions;

    use super::*;

    #[tokio::test]
    async fn a_signal_reaches_no_other_backend_that_was_given_the_same_process_id() {
        let url = std::env::var("CANCEL_SAFE_TEST_POSTGRES_URL")
            .expect("set CANCEL_SAFE_TEST_POSTGRES_URL or run cargo xtask test tx-guard");
        let options: Arc<PgConnectOptions> = Arc::new(url.parse().unwrap());
        let canceller = <Postgres as Driver>::Canceller::default();
        canceller.warm(&options).await.unwrap();
        let mut conn = options.connect().await.unwrap();
        let ours = Postgres::probe(&mut conn, PoolerMode::None, None).await.unwrap();
        let backend = ours.backend();
        let before = Place::own(BackendId { started: backend.started - 1, ..backend });

        // Repeated, because a cancel that comes before the statement has no effect.
        let again = async |to: Place| {
            loop {
                canceller.signal(&options, Wanted::Cancel, &to).await.unwrap();
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let slept = tokio::select! {
            slept = sqlx::raw_sql("SELECT pg_sleep(0.5)").execute(&mut conn) => slept,
            () = again(before) => unreachable!("it cancels for ever"),
        };
        assert!(slept.is_ok(), "{slept:?}");
        let slept = tokio::select! {
            slept = sqlx::raw_sql("SELECT pg_sleep(30)").execute(&mut conn) => slept,
            () = again(ours.clone()) => unreachable!("it cancels for ever"),
        };
        assert!(slept.is_err(), "{slept:?}");
        // A cancel leaves the session alive; this ends it.
        conn.ping().await.unwrap();
        canceller.signal(&options, Wanted::Terminate, &ours).await.unwrap();
        while conn.ping().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
