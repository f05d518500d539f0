//! What differs between databases, behind one sealed trait.
//!
//! Invariant: everything a driver does is said in terms of one connection and its probe. Pools, reaping and
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
    /// The lock for writing is taken at once, where there is one for the whole database.
    pub(crate) immediate: bool,
    /// What its owner calls it.
    pub(crate) name: Option<&'static str>,
    /// How long the transaction may still last.
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

/// What a commit is asked for by when its connection was lost.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "only PostgreSQL can be asked"))]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub struct Receipt {
    /// None where nothing can be written.
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
    /// There was no transaction any more, and what it had done is rolled back.
    Lost(&'static str),
    /// There was no transaction any more, and how its SQL had ended it is not known here.
    Ended,
    /// The database refused and rolled back.
    Refused(sqlx::Error),
    /// COMMIT was sent and no answer came.
    Unknown(sqlx::Error),
    /// The same, and the server can be asked for how it ended.
    Resolvable(sqlx::Error, Receipt),
}

/// What a rollback has found when it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Rollback {
    /// The transaction, or what the database had left of it.
    Done,
    /// No transaction: it had been ended without the guard, and whether by a commit is not known here.
    TooLate,
}

/// The sealed half of [`Backend`].
#[expect(unnameable_types, reason = "this is what seals `Backend`")]
pub trait Driver: Database {
    /// The name people know the database by.
    const TITLE: &'static str;

    /// Whether a URL may do without a scheme, as the name of a file.
    const TAKES_FILES: bool = false;

    /// Whether a connection can do nothing any more when the runtime has ended on which it was opened.
    const NEEDS_ITS_RUNTIME: bool = true;

    /// Whether somebody has to answer who may have gone without a word.
    const IS_REMOTE: bool = true;

    /// Whether sqlx may wait for more than the server has to say, after a future was dropped in the middle of an answer.
    const LOSES_ITS_PLACE: bool = false;

    /// Whether a pooler is known that gives each transaction another session.
    const HAS_POOLERS: bool = false;

    /// What a session learns about its connection once, to be able to cancel what runs on it.
    type Probe: Clone + Send + Sync + 'static;

    /// What was learnt of the connections of a wrapped pool.
    type Known: Default + Send + Sync + 'static;

    /// The means of cancelling from outside, one for a pool.
    type Canceller: Cancels<Self>;

    /// Describes where the options lead to, without credentials.
    fn target(options: &Options<Self>) -> String;

    /// Says which kind of failure an error of opening a connection is.
    fn connect_error(target: String, error: sqlx::Error) -> TxError;

    /// Whether the server takes no more sessions for now.
    fn is_full(_: &sqlx::Error) -> bool {
        false
    }

    /// Whether BEGIN was refused because the session is in a transaction that was begun by somebody else.
    fn is_occupied(error: &sqlx::Error) -> bool;

    /// The options for connections that share their sessions with others.
    fn for_a_pooler(options: Options<Self>) -> Options<Self> {
        options
    }

    /// Makes the settings of a session of our own, and learns what `cancel` will need. The first session of a pool is
    /// compared with that of the connection for cancelling before.
    fn probe(
        conn: &mut Self::Connection,
        pooler: PoolerMode,
        first: Option<First<'_, Self>>,
    ) -> impl Future<Output = Result<Self::Probe, sqlx::Error>> + Send;

    /// What is to be the same for each transaction, and the settings of these names. Releases the locks of the session. None
    /// where nothing is compared.
    fn state(
        _: &mut Self::Connection,
        _: &Self::Probe,
        _: &[String],
    ) -> impl Future<Output = Result<Option<String>, sqlx::Error>> + Send {
        async { Ok(None) }
    }

    /// Whether that is what the end of the last transaction has seen in its own message.
    fn was_seen(_: &Self::Probe, _: &str) -> bool {
        false
    }

    /// Resets all that a session has for itself but its prepared statements. False where that cannot be done.
    fn discard(_: &mut Self::Connection) -> impl Future<Output = Result<bool, sqlx::Error>> + Send {
        async { Ok(false) }
    }

    /// Learns the same of a session that is borrowed from the user's own sqlx pool, whose settings are not ours to change.
    fn recognise(
        conn: &mut Self::Connection,
        known: &Self::Known,
    ) -> impl Future<Output = Result<Self::Probe, sqlx::Error>> + Send;

    /// Begins a transaction, and only where there is none.
    fn begin(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
        mode: &Mode,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Lets sqlx count no transaction, for somebody who has the connection without a guard.
    fn count_none(_: &mut Self::Connection, _: &Self::Probe) {}

    /// Keeps queries outside transactions from writing, where the session does not, and forgets what was seen of it.
    fn begin_read(_: &Self::Probe) {}

    /// Makes a session ready for the next one after such queries, when nothing runs on it. A cancel that has come too late for
    /// what it was meant for is consumed.
    fn end_read(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
    ) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Runs SQL of our own that has no result.
    fn run_sql(conn: &mut Self::Connection, sql: String) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Whether the same transaction, run again, may well succeed. Never so of an error of another database.
    fn is_transient(error: &(dyn DatabaseError + 'static)) -> bool;

    /// Whether the transaction of the guard has ended without the guard.
    fn is_lost(conn: &Self::Connection, probe: &Self::Probe) -> bool;

    /// Whether sqlx itself may have committed the transaction of the guard. Asked of a connection that is not used for
    /// another transaction after that, if it is true.
    fn may_have_committed(_: &mut Self::Connection) -> bool {
        false
    }

    /// Keeps further statements of a lost transaction from being committed one by one. The connection is not used for
    /// another transaction after that.
    fn fence(_: &mut Self::Connection, _: &Self::Probe) {}

    /// Reads what dropped futures have left to be read, where it could be taken for the answer to what follows. Nothing of
    /// the commit has been sent until it returns.
    fn catch_up(_: &mut Self::Connection) -> impl Future<Output = Result<(), sqlx::Error>> + Send {
        async { Ok(()) }
    }

    /// Commits. What the session is asked for behind the transaction goes in the same message.
    fn commit(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
        mode: CommitMode,
    ) -> impl Future<Output = Result<(), CommitFailure>> + Send;

    /// Whether nothing but a flush is due behind a commit that has succeeded; else a rollback is.
    fn is_nothing_due(conn: &Self::Connection, _: &Self::Probe) -> bool {
        depth::<Self>(conn) == 0
    }

    /// Finds out on another connection how a commit ended whose connection was lost: whether it is committed, or `None`
    /// where that cannot be said within the limit.
    fn resolve(
        canceller: &Self::Canceller,
        options: &Arc<Options<Self>>,
        probe: &Self::Probe,
        receipt: &Receipt,
        limit: Duration,
    ) -> impl Future<Output = Option<bool>> + Send;

    /// Waits for what still runs, and rolls back until the connection is idle and clean.
    fn rollback(
        conn: &mut Self::Connection,
        probe: &Self::Probe,
    ) -> impl Future<Output = Result<Rollback, sqlx::Error>> + Send;

    /// Waits until nothing runs any more on the connection, and reads the answer of the first statement that was left
    /// behind. On an idle connection of a server it comes back at its first poll, and has sent nothing. The transaction may be
    /// rolled back by it, but a rollback is still due.
    fn quiet(conn: &mut Self::Connection, probe: &Self::Probe) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Interrupts what runs on the connection without waiting, where that can be done.
    fn interrupt(_: &Self::Probe) {}
}

/// The way to what runs on a session, from outside. Sealed with [`Backend`].
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub trait Cancels<DB: Driver>: Default + Clone + Send + Sync + 'static {
    /// Where cancels are sent from, if that must not be the runtime of the transaction, which may be busy with it.
    fn beside() -> Option<Handle> {
        None
    }

    /// Opens what [`signal`](Self::signal) needs ahead of its first use.
    fn warm(&self, options: &Arc<Options<DB>>) -> impl Future<Output = Result<(), sqlx::Error>> + Send;

    /// Signals the session of `probe` over another one. `Ok` means that a cancel cannot arrive after the next clean round
    /// trip of that session.
    fn signal(
        &self,
        options: &Arc<Options<DB>>,
        wanted: Wanted,
        probe: &DB::Probe,
    ) -> impl Future<Output = Result<Activity, Unsignalled>> + Send;

    /// How long a message to the server and its answer take, as far as is known.
    fn round_trip(&self) -> Duration {
        Duration::ZERO
    }

    /// Closes what [`warm`](Self::warm) and [`signal`](Self::signal) have opened.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// What is wanted of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Wanted {
    /// What it runs is cancelled.
    Cancel,
    /// It is looked at: whether it waits for its client, where that may be for ever.
    Look,
    /// It is ended.
    Terminate,
}

/// Why it is not known that a session was signalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Unsignalled {
    /// Nothing was sent: there was no connection over which it could be.
    Unreachable,
    /// It was sent and had no answer, so it may be under way.
    Unanswered,
}

/// The first session of a pool, of which it is not known yet what is between here and the server.
#[derive(Debug)]
#[cfg_attr(not(feature = "postgres"), expect(dead_code, reason = "only PostgreSQL has poolers that are looked for"))]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub struct First<'a, DB: Driver> {
    pub(crate) canceller: &'a DB::Canceller,
    pub(crate) options: &'a Arc<Options<DB>>,
    /// When its connection was asked for.
    pub(crate) since: Instant,
}

/// What was seen of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(unnameable_types, reason = "part of the sealed half of `Backend`")]
pub enum Activity {
    /// It may have been running something.
    Unseen,
    /// It was waiting for its client, so there was nothing to cancel.
    Idle,
}

/// sqlx's own notion of how deep the connection is in transactions.
pub(crate) fn depth<DB: Database>(conn: &DB::Connection) -> usize {
    DB::TransactionManager::get_transaction_depth(conn)
}
