//! MySQL and MariaDB: a session is checked before it is killed, and a savepoint proves a commit.
//!
//! Invariant: while a guard is open, nothing that is written outside its transaction stands. Statements after the
//! transaction was lost are refused; statements after MySQL has rolled it back are undone at the end.

mod in_step;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use sqlx::error::DatabaseError;
use sqlx::mysql::{MySqlConnectOptions, MySqlDatabaseError};
use sqlx::{AssertSqlSafe, Connection, Database, MySql, MySqlConnection, Row, SqlSafeStr};
use sqlx_core::transaction::TransactionManager;

use crate::TxError;
use crate::backend::{
    Activity, Backend, CommitFailure, CommitMode, Driver, First, Isolation, Mode, Options, Receipt, Rollback, Wanted,
    depth,
};
use crate::canceller::{Canceller, Opened, Signals};
use crate::known::Known;
use crate::pooler::PoolerMode;
use in_step::Answers;

type Manager = <MySql as Database>::TransactionManager;

/// How many seconds later than the client the server ends a session whose transaction takes too long.
const SESSION_MARGIN: u64 = 1;

/// The same for a statement. Our own limit is over by then, so the caller does not get the server's message.
const STATEMENT_MARGIN: Duration = Duration::from_millis(250);

/// The largest limit that both servers accept, in seconds.
const LONGEST_LIMIT: u64 = 31_536_000;

/// A savepoint that lasts exactly as long as the transaction, whatever ends it. It is released in front of COMMIT, in
/// the same message: if it is gone, the message ends before COMMIT.
const MARK: &str = "SAVEPOINT txg_0";
const VERIFIED_COMMIT: &str = "RELEASE SAVEPOINT txg_0; COMMIT";

/// Refuses writes outside a transaction that requests them. After a deadlock, MySQL treats the victim as if its
/// transaction still had that permission, so autocommit is off as well.
const HOLD: &str = "SET autocommit = 0; SET SESSION TRANSACTION READ ONLY";

const IDENTIFY: &str = "SELECT CONNECTION_ID(), VERSION(), CAST(@@GLOBAL.read_only AS SIGNED)";

/// A statement that is refused inside a transaction, which START TRANSACTION would silently commit. It affects only the
/// next transaction.
const ALONE: &str = "SET TRANSACTION READ WRITE; ";

/// The error code for that inside a transaction.
const IN_TRANSACTION: u16 = 1568;
/// The error codes for a server or account that has reached its session limit.
const TOO_MANY_SESSIONS: [u16; 3] = [1040, 1203, 1226];
const DEADLOCK: u16 = 1213;
const LOCK_WAIT_TIMEOUT: u16 = 1205;
const NO_SUCH_DATABASE: u16 = 1049;
const NO_SUCH_SAVEPOINT: u16 = 1305;
const NO_SUCH_THREAD: u16 = 1094;
/// The error code of group replication for a commit that was refused and rolled back.
const REFUSED_BY_THE_GROUP: u16 = 3101;

/// The last error code that a server sends on a session. The second is MariaDB's, the third MySQL's.
const SERVER_SHUTDOWN: u16 = 1053;
const CONNECTION_KILLED: u16 = 1927;
const IDLE_FOR_TOO_LONG: u16 = 4031;

/// One session of the server, and its state after our transactions.
#[derive(Debug)]
#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Thread {
    identity: Identity,
    ownership: Ownership,
    /// Whether the session has the limits of a transaction with a deadline.
    limited: AtomicBool,
    /// Whether the end of the transaction is proved, with nothing sent since.
    in_step: AtomicBool,
    /// Whether a session of the user has its settings back already.
    is_back: AtomicBool,
    /// Whether sqlx's levels were removed, and a rollback sent, before the end of the transaction.
    is_undone: AtomicBool,
}

#[derive(Debug, Clone, Copy)]
#[expect(unnameable_types, reason = "an associated type of the sealed half of `Backend`")]
pub struct Identity {
    id: u64,
    /// When its id was learned. A server that was restarted reuses ids.
    learnt: Instant,
    flavour: Flavour,
    /// Whether this server is read-only, so that even asking to write may be refused.
    read_only: bool,
}

/// Who owns the connection of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ownership {
    /// Ours: opened by the pool, only for guards.
    Owned,
    /// The user's: it gets its settings back after each transaction.
    Wrapped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    MariaDb,
    MySql,
}

impl Flavour {
    /// The variables to set for a transaction with a deadline.
    fn limits(self) -> &'static [&'static str] {
        match self {
            Self::MariaDb => {
                &["max_statement_time", "innodb_lock_wait_timeout", "lock_wait_timeout", "idle_transaction_timeout"]
            }
            Self::MySql => &["max_execution_time", "innodb_lock_wait_timeout", "lock_wait_timeout"],
        }
    }

    /// The variables that [`HOLD`] sets.
    fn held(self) -> [&'static str; 2] {
        match self {
            Self::MariaDb => ["autocommit", "tx_read_only"],
            Self::MySql => ["autocommit", "transaction_read_only"],
        }
    }

    /// MySQL limits only SELECT statements, in milliseconds; MariaDB limits each statement, in seconds.
    fn limit(self, variable: &str, remaining: Duration) -> String {
        // Rounded up, because a limit that strikes a moment too soon is reported as another error.
        let later = remaining.saturating_add(STATEMENT_MARGIN);
        let seconds = later.as_secs().saturating_add(1).min(LONGEST_LIMIT);
        match variable {
            "max_statement_time" => format!("{:.3}", later.as_secs_f64().min(31_536_000.0)),
            "max_execution_time" => (later.as_millis() + 1).min(u128::from(u32::MAX)).to_string(),
            "idle_transaction_timeout" => (seconds + SESSION_MARGIN).min(LONGEST_LIMIT).to_string(),
            _ => seconds.to_string(),
        }
    }
}

impl Backend for MySql {}

impl Driver for MySql {
    const TITLE: &'static str = "MySQL";
    const LOSES_ITS_PLACE: bool = true;
    type Probe = Arc<Thread>;
    type Known = Known<Self, Identity>;
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
            sqlx::Error::Database(_) => match number(&source) {
                Some(NO_SUCH_DATABASE) => TxError::MissingDatabase { target, source },
                Some(number) if TOO_MANY_SESSIONS.contains(&number) => TxError::TooManySessions { target, source },
                Some(SERVER_SHUTDOWN) => TxError::NotReady { target, source },
                _ => TxError::Refused { target, source },
            },
            sqlx::Error::Configuration(_) => {
                TxError::InvalidUrl { database: Self::TITLE, reason: "an option cannot be used".to_owned() }
            }
            _ => TxError::Unreachable { target, source },
        }
    }

    fn is_full(error: &sqlx::Error) -> bool {
        number(error).is_some_and(|number| TOO_MANY_SESSIONS.contains(&number))
    }

    fn is_occupied(error: &sqlx::Error) -> bool {
        matches!(error, sqlx::Error::InvalidSavePointStatement) || number(error) == Some(IN_TRANSACTION)
    }

    async fn probe(
        conn: &mut MySqlConnection,
        _: PoolerMode,
        _: Option<First<'_, Self>>,
    ) -> Result<Arc<Thread>, sqlx::Error> {
        let identity = identify(conn, false).await?;
        if !identity.read_only {
            Self::run_sql(conn, HOLD.to_owned()).await?;
        }
        Ok(Arc::new(Thread::new(identity, Ownership::Owned)))
    }

    async fn recognise(conn: &mut MySqlConnection, known: &Self::Known) -> Result<Arc<Thread>, sqlx::Error> {
        let identity = match known.statement(conn, IDENTIFY).await? {
            None => identify(conn, false).await?,
            Some(statement) => match known.find(&statement) {
                Some(identity) => identity,
                None => {
                    let identity = identify(conn, true).await?;
                    known.remember(statement, identity);
                    identity
                }
            },
        };
        Ok(Arc::new(Thread::new(identity, Ownership::Wrapped)))
    }

    async fn state(
        conn: &mut MySqlConnection,
        _: &Arc<Thread>,
        names: &[String],
    ) -> Result<Option<String>, sqlx::Error> {
        let settings = names.iter().map(|name| match name.strip_prefix('@') {
            Some(_) => format!(", COALESCE({name}, '')"),
            None => format!(", COALESCE(@@SESSION.{name}, '')"),
        });
        let settings: String = settings.collect();
        let now = format!("CONCAT_WS(CHAR(1), COALESCE(DATABASE(), ''){settings})");
        // As bytes, whatever character sets the session uses by now.
        let sql = format!("SELECT RELEASE_ALL_LOCKS(), CAST({now} AS BINARY)");
        let row = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_one(conn).await?;
        let state: Vec<u8> = row.try_get(1)?;
        Ok(Some(String::from_utf8_lossy(&state).into_owned()))
    }

    async fn begin(conn: &mut MySqlConnection, thread: &Arc<Thread>, mode: &Mode) -> Result<(), sqlx::Error> {
        thread.in_step.store(false, Ordering::Relaxed);
        thread.is_back.store(false, Ordering::Relaxed);
        let sql = begin_sql(thread, mode);
        Manager::begin(conn, Some(AssertSqlSafe(sql).into_sql_str())).await
    }

    /// Without autocommit a query begins a transaction.
    async fn end_read(conn: &mut MySqlConnection, _: &Arc<Thread>) -> Result<(), sqlx::Error> {
        in_step::repeat(conn, "ROLLBACK").await
    }

    async fn run_sql(conn: &mut MySqlConnection, sql: String) -> Result<(), sqlx::Error> {
        in_step::run(conn, &sql).await
    }

    fn is_transient(error: &(dyn DatabaseError + 'static)) -> bool {
        let number = error.try_downcast_ref().map(MySqlDatabaseError::number);
        matches!(number, Some(DEADLOCK | LOCK_WAIT_TIMEOUT))
    }

    fn is_lost(conn: &MySqlConnection, _: &Arc<Thread>) -> bool {
        depth::<Self>(conn) == 0
    }

    /// A `begin` that is cancelled inside a nested transaction removes only that level, and the `commit` of the nested
    /// transaction then commits the whole.
    fn may_have_committed(conn: &mut MySqlConnection) -> bool {
        depth::<Self>(conn) == 0
    }

    async fn catch_up(conn: &mut MySqlConnection) -> Result<(), sqlx::Error> {
        in_step::catch_up(conn).await
    }

    async fn commit(conn: &mut MySqlConnection, thread: &Arc<Thread>, _: CommitMode) -> Result<(), CommitFailure> {
        // All in one message, so that none costs a round trip of its own.
        let sql = match thread.settings_back() {
            Some(settings_back) => format!("{VERIFIED_COMMIT}; {settings_back}"),
            None => VERIFIED_COMMIT.to_owned(),
        };
        let missing = || sqlx::Error::Protocol("the answer to COMMIT is missing".into());
        let error = match in_step::exchange(conn, &sql).await {
            // sqlx still counts a transaction: an empty one, to be rolled back off the caller's path.
            Answers { proved: true, done: 2.., error: None } => {
                thread.in_step.store(true, Ordering::Relaxed);
                thread.is_back.store(true, Ordering::Relaxed);
                return Ok(());
            }
            // Committed; the settings are tried again, or the connection is closed.
            Answers { proved: true, done: 2.., error: Some(_) } => return Ok(()),
            Answers { proved: true, done, error: Some(error @ sqlx::Error::Database(_)) } => {
                return Err(match (done, number(&error)) {
                    (0, Some(NO_SUCH_SAVEPOINT)) => CommitFailure::Ended,
                    // A COMMIT that waits too long for the global read lock of another session is rolled back.
                    (0, _) | (_, Some(DEADLOCK | LOCK_WAIT_TIMEOUT | REFUSED_BY_THE_GROUP)) => {
                        CommitFailure::Refused(error)
                    }
                    _ => CommitFailure::Unknown(error),
                });
            }
            // This came instead of the number, which precedes COMMIT, so the session ended before COMMIT.
            Answers { proved: false, error: Some(error), .. } if is_last_word(&error) => {
                return Err(CommitFailure::Refused(error));
            }
            Answers { error, .. } => error,
        };
        Err(CommitFailure::Unknown(error.unwrap_or_else(missing)))
    }

    /// MySQL does not remember how a transaction ended.
    async fn resolve(
        _: &Self::Canceller,
        _: &Arc<MySqlConnectOptions>,
        _: &Arc<Thread>,
        _: &Receipt,
        _: Duration,
    ) -> Option<bool> {
        None
    }

    async fn rollback(conn: &mut MySqlConnection, thread: &Arc<Thread>) -> Result<Rollback, sqlx::Error> {
        let was_undone = thread.is_undone.swap(false, Ordering::Relaxed);
        let found = if !was_undone && Self::may_have_committed(conn) { Rollback::TooLate } else { Rollback::Done };
        let is_sent = undo(conn);
        let is_back = thread.is_back.swap(false, Ordering::Relaxed);
        let settings_back = thread.settings_back().filter(|_| !is_back);
        let in_step = thread.in_step.swap(false, Ordering::Relaxed);
        // A late cancel hits what is sent here, never the next transaction.
        if is_sent && in_step && settings_back.is_none() && is_done(conn.flush().await)? {
            return Ok(found);
        }
        let rollback = match settings_back {
            Some(settings_back) => format!("ROLLBACK; {settings_back}"),
            None => "ROLLBACK".to_owned(),
        };
        match in_step {
            true => in_step::repeat(conn, &rollback).await?,
            false => in_step::insist(conn, &rollback).await?,
        }
        Ok(found)
    }

    /// The rollback goes out before the proof that nothing is left to read, so that the locks are free a round trip
    /// sooner. A cancel may still hit it, so another rollback is due.
    async fn quiet(conn: &mut MySqlConnection, thread: &Arc<Thread>) -> Result<(), sqlx::Error> {
        if in_step::is_left(conn).await? {
            thread.is_undone.fetch_or(undo(conn), Ordering::Relaxed);
            in_step::prove(conn).await?;
            thread.in_step.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// Removes sqlx's levels, whatever the answers will be: if MySQL has rolled back by itself, including the savepoints,
/// sqlx's own rollback fails for ever. The rollbacks go out with the next message, and free the locks there. Returns
/// false if there is no level.
fn undo(conn: &mut MySqlConnection) -> bool {
    let was_open = depth::<MySql>(conn) > 0;
    while depth::<MySql>(conn) > 0 {
        Manager::start_rollback(conn);
    }
    was_open
}

impl Thread {
    fn new(identity: Identity, ownership: Ownership) -> Self {
        Self {
            identity,
            ownership,
            limited: AtomicBool::new(false),
            in_step: AtomicBool::new(false),
            is_back: AtomicBool::new(false),
            is_undone: AtomicBool::new(false),
        }
    }

    /// The SQL that restores a wrapped session's settings from before its transaction. `None` if it has them all.
    fn settings_back(&self) -> Option<String> {
        let mut settings: Vec<&str> = Vec::new();
        if self.ownership == Ownership::Wrapped && !self.identity.read_only {
            settings.extend(self.identity.flavour.held());
        }
        if self.ownership == Ownership::Wrapped && self.limited.load(Ordering::Relaxed) {
            settings.extend(self.identity.flavour.limits());
        }
        let settings: Vec<_> = settings.iter().map(|setting| format!("{setting} = @txg_{setting}")).collect();
        (!settings.is_empty()).then(|| format!("SET {}", settings.join(", ")))
    }
}

async fn identify(conn: &mut MySqlConnection, keep: bool) -> Result<Identity, sqlx::Error> {
    // Taken before the question: the server that answers was started before this.
    let learnt = Instant::now();
    let identify = sqlx::query_as(IDENTIFY).persistent(keep);
    let (id, version, read_only): (u64, String, i64) = identify.fetch_one(conn).await?;
    let flavour = if version.contains("MariaDB") { Flavour::MariaDb } else { Flavour::MySql };
    Ok(Identity { id, learnt, flavour, read_only: read_only != 0 })
}

/// BEGIN, its settings and its mark in one message, so that they cost no extra round trip.
fn begin_sql(thread: &Thread, mode: &Mode) -> String {
    let wrapped = thread.ownership == Ownership::Wrapped;
    let flavour = thread.identity.flavour;
    // One SET for all. Its parts take effect from left to right: a wrapped session first saves its own values in
    // variables, from which they are restored later.
    let put_away = |setting: &&str| format!("@txg_{setting} = @@{setting}");
    let mut settings: Vec<String> = Vec::new();
    if wrapped && !thread.identity.read_only {
        let [autocommit, read_only] = flavour.held();
        settings.extend(flavour.held().iter().map(put_away));
        settings.extend([format!("{autocommit} = 0"), format!("{read_only} = 1")]);
    }
    let was_limited = thread.limited.swap(mode.remaining.is_some(), Ordering::Relaxed);
    match mode.remaining {
        Some(remaining) => {
            if wrapped {
                settings.extend(flavour.limits().iter().map(put_away));
            }
            let limits = flavour.limits().iter();
            settings.extend(limits.map(|limit| format!("{limit} = {}", flavour.limit(limit, remaining))));
        }
        None if was_limited && !wrapped => {
            settings.extend(flavour.limits().iter().map(|limit| format!("{limit} = DEFAULT")));
        }
        None => {}
    }
    let mut sql = String::from(ALONE);
    if !settings.is_empty() {
        sql.push_str(&format!("SET {}; ", settings.join(", ")));
    }
    sql.push_str(match mode.isolation {
        None => "",
        Some(Isolation::ReadCommitted) => "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; ",
        Some(Isolation::RepeatableRead) => "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; ",
        Some(Isolation::Serializable) => "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; ",
    });
    sql.push_str(match (mode.read_only, thread.identity.read_only) {
        (true, _) => "START TRANSACTION READ ONLY; ",
        (false, false) => "START TRANSACTION READ WRITE; ",
        (false, true) => "START TRANSACTION; ",
    });
    sql.push_str(MARK);
    sql
}

/// Whether the work is done. An answer of the database, even a refusal, shows that the connection works: each abandoned
/// statement may have one.
fn is_done(result: Result<(), sqlx::Error>) -> Result<bool, sqlx::Error> {
    match result {
        Ok(()) => Ok(true),
        Err(sqlx::Error::Database(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Signals for MySql {
    type Session = Identity;

    /// It checks before it kills.
    const TRIPS: u32 = 2;

    fn session(thread: &Arc<Thread>) -> Identity {
        thread.identity
    }

    fn ran(conn: &mut MySqlConnection) -> BoxFuture<'_, Result<Duration, sqlx::Error>> {
        uptime(conn).boxed()
    }

    fn send<'c>(
        conn: &'c mut MySqlConnection,
        opened: Opened,
        wanted: Wanted,
        sessions: &'c [Identity],
    ) -> BoxFuture<'c, Result<Vec<Activity>, sqlx::Error>> {
        signal(conn, opened, wanted, sessions).boxed()
    }
}

/// A session that waits for its client has nothing to kill, and a kill would hit its next statement.
async fn signal(
    conn: &mut MySqlConnection,
    opened: Opened,
    wanted: Wanted,
    sessions: &[Identity],
) -> Result<Vec<Activity>, sqlx::Error> {
    if sessions.is_empty() {
        // Sends as many messages as other signals do, so that it takes as long as they do.
        conn.ping().await?;
        return conn.ping().await.map(|()| Vec::new());
    }
    // A restarted server gives out the same ids again. If the server was young when the connection was opened, it is
    // asked for its uptime once more, since it counts in whole seconds.
    let is_known = |session: &Identity| opened.is_same_server(session.learnt);
    let uptime = if sessions.iter().all(is_known) { Duration::ZERO } else { uptime(conn).await? };
    let lives = |session: &Identity| is_known(session) || uptime > session.learnt.elapsed();
    let ids = |wanted: &[bool]| -> Vec<u64> {
        sessions.iter().zip(wanted).filter(|(_, wanted)| **wanted).map(|(session, _)| session.id).collect()
    };
    let living: Vec<bool> = sessions.iter().map(lives).collect();
    if wanted == Wanted::Terminate {
        kill(conn, "KILL CONNECTION", &ids(&living)).await?;
        return Ok(vec![Activity::Unseen; sessions.len()]);
    }
    let idle = idle_among(conn, &ids(&living)).await?;
    let is_idle = |session: &Identity, lives: bool| lives && idle.contains(&session.id);
    let seen: Vec<bool> = sessions.iter().zip(&living).map(|(session, lives)| is_idle(session, *lives)).collect();
    if wanted == Wanted::Cancel {
        let running: Vec<bool> = living.iter().zip(&seen).map(|(lives, idle)| *lives && !idle).collect();
        kill(conn, "KILL QUERY", &ids(&running)).await?;
    }
    Ok(seen.into_iter().map(|idle| if idle { Activity::Idle } else { Activity::Unseen }).collect())
}

/// The sessions that wait for their clients.
async fn idle_among(conn: &mut MySqlConnection, ids: &[u64]) -> Result<Vec<u64>, sqlx::Error> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<_> = ids.iter().map(u64::to_string).collect();
    let sql = format!(
        "SELECT CAST(id AS UNSIGNED) FROM information_schema.processlist WHERE command = 'Sleep' AND id IN ({})",
        ids.join(", ")
    );
    // As text, because preparing costs another round trip, and each statement differs from the last.
    let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(conn).await?;
    rows.iter().map(|row| row.try_get::<u64, _>(0)).collect()
}

/// Kills all of them with one message, plus one more for each that has gone meanwhile, because the message ends there.
async fn kill(conn: &mut MySqlConnection, how: &str, mut ids: &[u64]) -> Result<(), sqlx::Error> {
    while !ids.is_empty() {
        let sql: Vec<_> = ids.iter().map(|id| format!("{how} {id}")).collect();
        match in_step::exchange(conn, &sql.join("; ")).await {
            Answers { proved: true, error: None, .. } => return Ok(()),
            Answers { proved: true, done, error: Some(error) } if number(&error) == Some(NO_SUCH_THREAD) => {
                ids = ids.get(done + 1..).unwrap_or_default();
            }
            Answers { error, .. } => return Err(error.unwrap_or_else(in_step::out_of_step)),
        }
    }
    Ok(())
}

/// How long the server has been running, in whole seconds.
async fn uptime(conn: &mut MySqlConnection) -> Result<Duration, sqlx::Error> {
    let (_, uptime): (String, String) = sqlx::query_as("SHOW GLOBAL STATUS LIKE 'Uptime'").fetch_one(conn).await?;
    let uptime =
        uptime.parse().map_err(|_| sqlx::Error::Protocol("the server does not say how long it runs".into()))?;
    Ok(Duration::from_secs(uptime))
}

/// Whether the server has said that it ends the session, after which nothing is run on it.
fn is_last_word(error: &sqlx::Error) -> bool {
    matches!(number(error), Some(SERVER_SHUTDOWN | CONNECTION_KILLED | IDLE_FOR_TOO_LONG))
}

fn number(error: &sqlx::Error) -> Option<u16> {
    Some(error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?.number())
}
