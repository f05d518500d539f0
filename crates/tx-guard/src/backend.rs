//! The differences between databases, behind one sealed trait.
//!
//! Invariant: everything a driver does is expressed in terms of one connection and its probe. Pools, reaping and
//! outcomes are the same for all databases and live elsewhere.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use sqlx::error::DatabaseError;
use sqlx::{Connection, Database};
use sqlx_core::transaction::TransactionManager;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::TxError;
use crate::pooler::PoolerMode;

/// The options that open a connection of `DB`, such as `PgConnectOptions`.
pub type Options<DB> = <<DB as Database>::Connection as Connection>::Options;

/// A database whose transactions can be guarded: [`sqlx::Sqlite`], [`sqlx::Postgres`] and [`sqlx::MySql`], each behind
/// the feature of its name. Sealed.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no database of this build of cancel-safe-tx-guard",
    note = "choose a database by the crate's feature `postgres`, `sqlite` or `mysql`"
)]
pub trait Backend: Driver {}

/// How strictly a transaction is isolated from others that run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isolation {
    /// Each statement sees what was committed before it.
    ReadCommitted,
    /// All statements see what was committed before the first.
    RepeatableRead,
    /// As if the transactions had run one after another.
    Serializable,
}

/// The settings that a transaction begins with. The default is the database's own.
#[derive(Debug, Clone, Copy, Default)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub struct Mode {
    pub(crate) isolation: Option<Isolation>,
    pub(crate) read_only: bool,
    /// Whether to take the write lock at once, if the whole database has only one.
    pub(crate) immediate: bool,
    /// The name that its owner gave it.
    pub(crate) name: Option<&'static str>,
    /// How long the transaction may still take.
    #[cfg_attr(
        not(any(feature = "postgres", feature = "mysql")),
        expect(dead_code, reason = "only a server needs to be told")
    )]
    pub(crate) remaining: Option<Duration>,
}

/// What happens when a connection is lost inside `COMMIT`.
///
/// Set for a pool with [`TxPoolBuilder::commit_mode`](crate::TxPoolBuilder::commit_mode), for a closure with
/// [`Tx::commit_mode`](crate::Tx::commit_mode), or for one transaction with
/// [`TransactionGuard::set_commit_mode`](crate::TransactionGuard::set_commit_mode).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CommitMode {
    /// The outcome is [`CommitOutcome::Unknown`](crate::CommitOutcome::Unknown). The commit takes one round trip.
    #[default]
    Verified,
    /// On PostgreSQL, the outcome is looked up on another connection, within ten seconds
    /// ([`resolve_timeout`](crate::TxPoolBuilder::resolve_timeout)). The guard asks for the transaction's id before
    /// `COMMIT`, and asks the server for the fate of that id afterwards. This costs one more round trip for each
    /// commit, and gives an id even to a transaction that has written nothing. The outcome stays
    /// [`Unknown`](crate::CommitOutcome::Unknown) only if the server cannot be reached for that long, or was replaced
    /// by a standby that may not know the transaction.
    ///
    /// SQLite has no connection to lose, and MySQL offers no way to ask: there it is the same as `Verified`.
    Resolvable,
}

/// The data with which to look up a commit whose connection was lost.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "only PostgreSQL can be asked"))]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub struct Receipt {
    /// `None` where nothing can be written.
    pub(crate) transaction: Option<String>,
    /// The history of the server to which the id belongs.
    pub(crate) timeline: String,
}

/// How a `COMMIT` ended when it did not succeed.
#[derive(Debug)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum CommitFailure {
    /// An earlier error had aborted the transaction; COMMIT was not sent.
    Aborted(sqlx::Error),
    /// There was no transaction any more, and its changes are rolled back.
    Lost(&'static str),
    /// There was no transaction any more, and it is unknown how its SQL had ended it.
    Ended,
    /// The database refused and rolled back.
    Refused(sqlx::Error),
    /// COMMIT was sent and no answer came.
    Unknown(sqlx::Error),
    /// The same, but the server can be asked how it ended.
    Resolvable(sqlx::Error, Receipt),
}

/// What a rollback found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Rollback {
    /// The transaction, or what was left of it.
    Done,
    /// No transaction: it had ended without the guard, and it is unknown whether by a commit.
    TooLate,
}

/// The sealed half of [`Backend`].
#[expect(unnameable_types, reason = "this is what seals `Backend`")]
pub trait Driver: Database {
    /// The common name of the database.
    const TITLE: &'static str;

    /// Whether a URL may lack a scheme and be a file name.
    const TAKES_FILES: bool = false;

    /// Whether a connection stops working when the runtime that opened it has ended.
    const NEEDS_ITS_RUNTIME: bool = true;

    /// Whether there is a peer that may vanish silently.
    const IS_REMOTE: bool = true;

    /// Whether sqlx may wait for more than the server sends, after a future was dropped in the middle of an answer.
    const LOSES_ITS_PLACE: bool = false;

    /// Whether poolers exist that give each transaction another session.
    const HAS_POOLERS: bool = false;

    /// What a session learns once about its connection, to be able to cancel statements on it.
    type Probe: Clone + Send + Sync + 'static;

    /// What was learned about the connections of a wrapped pool.
    type Known: Default + Send + Sync + 'static;

    /// The means of cancelling from outside, one for each pool.
    type Canceller: Cancels<Self>;

    /// Describes where the options lead, without credentials.
    fn target(options: &Options<Self>) -> String;

    /// Classifies an error of opening a connection.
    fn connect_error(target: String, error: sqlx::Error) -> TxError;

    /// Whether the server accepts no more sessions for now.
    fn is_full(_: &sqlx::Error) -> bool {
        false
    }

    /// Whether BEGIN was refused because the session is in a transaction that other code has begun.
    fn is_occupied(error: &sqlx::Error) -> bool;

    /// The options for connections that share their sessions with others.
    fn for_a_pooler(options: Options<Self>) -> Options<Self> {
        options
    }

    /// Applies the settings of one of our own sessions, and learns what `cancel` will need. Before that, the first
    /// session of a pool is compared with the session of the cancelling connection.
    fn probe(
        conn: &mut Self::Connection,
        pooler: PoolerMode,
        first: Option<First<'_, Self>>,
    ) -> impl Future<Output = Result<Self::Probe, sqlx::Error>> + Send;

    /// The state that must be the same for each transaction, including the settings with these names. Releases the
    /// session's locks. `None` where nothing is compared.
    fn state(
        _: &mut Self::Connection,
        _: &Self::Probe,
        _: &[String],
    ) -> impl Future<Output = Result<Option<String>, sqlx::Error>> + Send {
        async { Ok(None) }
    }

    /// Whether the message that ended the last transaction has already seen this state.
    fn was_seen(_: &Self::Probe, _: &str) -> bool {
        false
    }

    /// Resets all session state except prepared statements. Returns false where that is not possible.
    fn discard(_: &mut Self::Connection) -> impl Future<Output = Result<bool, sqlx::Error>> + Send {
        async { Ok(false) }
    }

    /// Learns the same about a session borrowed from the user's own sqlx pool, without changing its settings.
    fn recognise(
        conn: &mut Self::Connection,
        known: &Self::Known,
    ) -> impl Future<Output = Result<Self::Probe, sqlx::Error>> + Send;

    /// Begins a transaction, but only if there is none yet.
    fn begin(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
        mode: &Mode,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Makes sqlx count no transaction, before somebody uses the connection without a guard. Returns whether the server
    /// has answered for that. If dropped, sqlx counts none already.
    fn count_none(_: &mut Self::Connection, _: &Self::Probe) -> impl Future<Output = Result<bool, sqlx::Error>> + Send {
        async { Ok(false) }
    }

    /// Keeps queries outside transactions from writing, if the session does not, and forgets what was seen of it.
    fn begin_read(_: &Self::Probe) {}

    /// Prepares a session for its next user after such queries, when nothing runs on it. This consumes a cancel that
    /// came too late for its statement.
    fn end_read(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Runs our own SQL, which has no result.
    fn run_sql(conn: &mut Self::Connection, sql: String) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Whether the same transaction may well succeed if run again. Always false for an error of another database.
    fn is_transient(error: &(dyn DatabaseError + 'static)) -> bool;

    /// Whether the guard's transaction has ended without the guard.
    fn is_lost(conn: &Self::Connection, probe: &Self::Probe) -> bool;

    /// Whether sqlx itself may have committed the guard's transaction. If so, the connection is not used for another
    /// transaction.
    fn may_have_committed(_: &mut Self::Connection) -> bool {
        false
    }

    /// Keeps further statements of a lost transaction from being committed one by one. After that the connection is not
    /// used for another transaction.
    fn fence(_: &mut Self::Connection, _: &Self::Probe) {}

    /// Reads what dropped futures have left unread, if it could be mistaken for the answer to what follows. Nothing of
    /// the commit is sent before this returns.
    fn catch_up(_: &mut Self::Connection) -> impl Future<Output = Result<(), sqlx::Error>> + Send {
        async { Ok(()) }
    }

    /// Commits. The question for the state of the session follows in the same message.
    fn commit(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
        mode: CommitMode,
    ) -> impl Future<Output = Result<(), CommitFailure>> + Send;

    /// Whether only a flush is due after a commit that has succeeded; otherwise a rollback is.
    fn is_nothing_due(conn: &Self::Connection, _: &Self::Probe) -> bool {
        depth::<Self>(conn) == 0
    }

    /// Finds out on another connection how a commit with a lost connection ended: whether it is committed, or `None` if
    /// that cannot be found out within the limit.
    fn resolve(
        canceller: &Self::Canceller,
        options: &Arc<Options<Self>>,
        probe: &Self::Probe,
        receipt: &Receipt,
        limit: Duration,
    ) -> impl Future<Output = Option<bool>> + Send;

    /// Waits for running statements, and rolls back until the connection is idle and clean.
    fn rollback(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
    ) -> impl Future<Output = Result<Rollback, sqlx::Error>> + Send;

    /// Waits until nothing runs on the connection any more, and reads the answer to the first abandoned statement. On
    /// an idle server connection it is ready at its first poll, and sends nothing. It may roll the transaction back,
    /// but a rollback is still due.
    fn quiet(conn: &mut Self::Connection, probe: &Self::Probe) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Interrupts the running statement without waiting, where that is possible.
    fn interrupt(_: &Self::Probe) {}
}

/// The way to reach a session's running statement from outside. Sealed with [`Backend`].
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub trait Cancels<DB: Driver>: Default + Clone + Send + Sync + 'static {
    /// The runtime that sends cancels, if that must not be the transaction's own runtime, which may be busy.
    fn beside() -> Option<Handle> {
        None
    }

    /// Opens what [`signal`](Self::signal) needs ahead of its first use.
    fn warm(&self, options: &Arc<Options<DB>>) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Signals the session of `probe` over another session. `Ok` means that a cancel cannot arrive after the next clean
    /// round trip of the signalled session.
    fn signal(
        &self,
        options: &Arc<Options<DB>>,
        wanted: Wanted,
        probe: &DB::Probe,
    ) -> impl Future<Output = Result<Activity, Unsignalled>> + Send;

    /// How long a message to the server and its answer take, as far as known.
    fn round_trip(&self) -> Duration {
        Duration::ZERO
    }

    /// Closes what [`warm`](Self::warm) and [`signal`](Self::signal) have opened.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// What to do with a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Wanted {
    /// Cancel its running statement.
    Cancel,
    /// Check whether it waits for its client, possibly for ever.
    Look,
    /// End it.
    Terminate,
}

/// Why it is unknown whether a session was signalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Unsignalled {
    /// Nothing was sent, because there was no connection for it.
    Unreachable,
    /// It was sent but not answered, so it may still be on its way.
    Unanswered,
}

/// The first session of a pool, before it is known what is between here and the server.
#[derive(Debug)]
#[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "only PostgreSQL has poolers that are looked for"))]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub struct First<'a, DB: Driver> {
    pub(crate) canceller: &'a DB::Canceller,
    pub(crate) options: &'a Arc<Options<DB>>,
    /// When its connection was requested.
    pub(crate) since: Instant,
}

/// What was seen of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Activity {
    /// It may have been running a statement.
    Unseen,
    /// It was waiting for its client, so there was nothing to cancel.
    Idle,
}

/// sqlx's own count of how deep the connection is in transactions.
pub(crate) fn depth<DB: Database>(conn: &DB::Connection) -> usize {
    DB::TransactionManager::get_transaction_depth(conn)
}
