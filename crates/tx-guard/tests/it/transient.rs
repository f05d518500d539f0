//! What runs again, and what does not: whatever error wraps the cause, and never after a possible commit.

use std::error::Error;
use std::fmt::{self, Debug};
use std::io;
use std::time::Duration;

use cancel_safe_tx_guard::{CommitError, CommitOutcome, OutcomeHandle, Retry, Tx, TxError, TxPool, is_transient};
use sqlx::{MySql, Postgres};

use crate::on_all;
use crate::proxy::{Fault, Proxy, ServerDb};
use crate::stuck::Transient;
use crate::world::World;

on_all!(
    a_transient_failure_is_found_behind_the_errors_of_a_team,
    an_error_that_nobody_can_look_into_is_not_run_again_unless_its_owner_says_so,
    what_may_have_been_committed_is_not_run_again,
    a_failure_that_lasts_is_not_run_again,
);

/// The error of a repository: it names its source.
#[derive(Debug)]
struct Repository(sqlx::Error);

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("repository")
    }
}

impl Error for Repository {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.0)
    }
}

/// A transparent error: the error inside it is not in its chain.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Speaker(#[from] sqlx::Error);

/// An error of the application that is not a `std::error::Error`.
#[derive(Debug)]
enum AppError {
    Db(sqlx::Error),
    Tx(TxError),
}

impl From<TxError> for AppError {
    fn from(error: TxError) -> Self {
        Self::Tx(error)
    }
}

impl AppError {
    fn is_transient(&self) -> bool {
        match self {
            Self::Db(error) => is_transient(error),
            Self::Tx(error) => error.is_transient(),
        }
    }
}

/// Returns how many attempts are made at work that fails twice.
async fn attempts<D: Transient, E: From<TxError> + Debug + 'static>(
    tx: Tx<D>,
    fail: impl Fn(sqlx::Error, OutcomeHandle) -> E,
) -> u32 {
    let mut attempts = 0;
    let tx = tx.retry(Retry::attempts(5).backoff(Duration::ZERO, Duration::ZERO));
    let ran = tx.run(async |tx| {
        attempts += 1;
        if attempts < 3 { Err(fail(D::transient(tx).await, tx.outcome_handle())) } else { Ok(()) }
    });
    assert_eq!(ran.await.is_ok(), attempts == 3);
    attempts
}

async fn a_transient_failure_is_found_behind_the_errors_of_a_team<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let tries = [
        attempts(db.tx(), |error, _| TxError::Database(error)).await,
        attempts(db.tx(), |error, _| TxError::application(Repository(error))).await,
        attempts(db.tx(), |error, _| TxError::application(Speaker(error))).await,
        attempts(db.tx(), |error, _| TxError::application(TxError::application(error))).await,
        attempts(db.tx(), |source, _| TxError::Aborted { source }).await,
        attempts(db.tx(), |error, _| error).await,
        attempts(db.tx(), |source, _| sqlx::Error::Io(io::Error::other(TxError::Aborted { source }))).await,
        attempts(db.tx(), |error, _| CommitError::Failed(TxError::application(Repository(error)))).await,
        attempts(db.tx(), |error, _| Box::<dyn Error + Send + Sync>::from(Repository(error))).await,
        attempts(db.tx(), |error, _| Box::<dyn Error>::from(Repository(error))).await,
    ];
    assert_eq!(tries, [3; 10]);
    // Without a retry policy, the work runs only once.
    let mut once = 0;
    let ran: Result<(), _> = db
        .tx()
        .run(async |tx| {
            once += 1;
            Err(D::transient(tx).await)
        })
        .await;
    assert!(is_transient(&ran.unwrap_err()));
    assert_eq!(once, 1);
    world.end(db).await;
}

async fn an_error_that_nobody_can_look_into_is_not_run_again_unless_its_owner_says_so<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    assert_eq!(attempts(db.tx(), |error, _| AppError::Db(error)).await, 1);
    assert_eq!(attempts(db.tx().retry_if(|_: &TxError| true), |error, _| AppError::Db(error)).await, 1);
    assert_eq!(attempts(db.tx().retry_if(AppError::is_transient), |error, _| AppError::Db(error)).await, 3);
    let either = db.tx().retry_if(AppError::is_transient).retry_if(|_: &AppError| false);
    assert_eq!(attempts(either, |error, _| AppError::Db(error)).await, 3);
    assert_eq!(attempts(db.tx().retry_if(|_: &AppError| false), |error, _| AppError::Db(error)).await, 1);
    world.end(db).await;
}

async fn what_may_have_been_committed_is_not_run_again<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let unknown = |source, _| TxError::Unknown { source };
    assert_eq!(attempts(db.tx(), unknown).await, 1);
    assert_eq!(attempts(db.tx().idempotent(), unknown).await, 3);
    // It is not repeated either when the caller calls it transient, or has wrapped it in another error.
    assert_eq!(attempts(db.tx().retry_if(|error: &TxError| error.is_unknown()), unknown).await, 1);
    let behind = |source, _| TxError::application(TxError::Unknown { source });
    assert_eq!(attempts(db.tx(), behind).await, 1);
    let inside = |source, _| sqlx::Error::Io(io::Error::other(TxError::Unknown { source }));
    assert_eq!(attempts(db.tx(), inside).await, 1);
    assert_eq!(attempts(db.tx().idempotent(), inside).await, 3);
    // A commit that is still under way is never repeated, not even for an idempotent transaction.
    for tx in [db.tx(), db.tx().idempotent(), db.tx().idempotent().retry_if(|_: &TxError| true)] {
        assert_eq!(attempts(tx, |_, handle| TxError::Pending(handle)).await, 1);
    }
    for tx in [db.tx(), db.tx().idempotent()] {
        assert_eq!(attempts(tx, |_, handle| CommitError::Pending(handle)).await, 1);
    }
    world.end(db).await;
}

async fn a_failure_that_lasts_is_not_run_again<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for tx in [db.tx(), db.tx().idempotent()] {
        assert_eq!(attempts(tx, |_, _| TxError::application("the account is overdrawn")).await, 1);
    }
    assert_eq!(attempts(db.tx().idempotent(), |_, _| sqlx::Error::RowNotFound).await, 1);
    let mut refused = 0;
    let tx = db.tx().idempotent().retry(Retry::attempts(5));
    let ran = tx.run(async |tx| {
        refused += 1;
        world.insert(tx, 1).await?;
        world.insert(tx, 1).await?;
        Ok::<_, TxError>(())
    });
    assert!(matches!(ran.await, Err(TxError::Database(_))));
    assert_eq!(refused, 1);
    world.end(db).await;
}

/// The connection is lost after COMMIT has reached the server. The table proves that nothing is done twice.
async fn a_commit_of_which_nobody_knows<D: ServerDb>() {
    let world = World::<D>::new().await;
    let proxy = Proxy::open(D::address(&world.options)).await;
    let through = D::through(world.options.clone(), proxy.port);
    let db = TxPool::<D>::builder().max_connections(1).connect_with(through).await.unwrap();
    // `retry_if` is not asked about the error of a commit.
    let tx = || db.tx().retry(Retry::attempts(5)).retry_if(|_: &TxError| true);
    for (idempotent, expected) in [(false, vec![1]), (true, vec![1, 11, 12])] {
        let mut attempts = if idempotent { 10 } else { 0 };
        let mut handle = None;
        let tx = if idempotent { tx().idempotent() } else { tx() };
        proxy.arm(Fault::CutAnswer);
        let ran = tx.run(async |tx| {
            attempts += 1;
            handle.get_or_insert(tx.outcome_handle());
            world.insert(tx, attempts).await?;
            Ok::<_, TxError>(())
        });
        let ran = ran.await;
        assert_eq!(handle.unwrap().outcome().await, CommitOutcome::Unknown);
        match idempotent {
            true => ran.unwrap(),
            false => assert!(matches!(ran, Err(TxError::Unknown { .. })), "{ran:?}"),
        }
        assert_eq!(world.committed().await, expected);
    }
    world.end(db).await;
}

#[tokio::test]
async fn a_commit_of_which_nobody_knows_is_done_again_only_if_that_does_no_harm_on_postgres() {
    a_commit_of_which_nobody_knows::<Postgres>().await;
}

#[tokio::test]
async fn a_commit_of_which_nobody_knows_is_done_again_only_if_that_does_no_harm_on_mysql() {
    a_commit_of_which_nobody_knows::<MySql>().await;
}

/// A real one, behind an error of the application, which leaves the closure through `TxError::application`.
#[tokio::test]
async fn a_serialization_failure_inside_the_error_of_a_repository_is_run_again() {
    let world = World::<Postgres>::new().await;
    world.insert(&mut world.plain().await, 1).await.unwrap();
    let db = world.pool(1).await;
    let mut tries = 0;
    let tx = db.tx().serializable().retry(Retry::attempts(5));
    let ran = tx.run(async |tx| {
        tries += 1;
        let add = format!("UPDATE {} SET v = v + 1", world.table);
        sqlx::query(sqlx::AssertSqlSafe(format!("SELECT n FROM {}", world.table))).fetch_one(&mut **tx).await?;
        if tries == 1 {
            world.run(add.clone()).await;
        }
        let added = sqlx::query(sqlx::AssertSqlSafe(add)).execute(&mut **tx).await;
        added.map(drop).map_err(|error| TxError::application(Repository(error)))
    });
    ran.await.unwrap();
    assert_eq!(tries, 2);
    world.end(db).await;
}

/// Its SQL has committed, and then it fails transiently: another attempt would do it twice.
#[tokio::test]
async fn work_that_has_committed_by_itself_is_not_run_again() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    for (idempotent, expected) in [(false, 1), (true, 5)] {
        let mut attempts = 0;
        let tx = db.tx().retry(Retry::attempts(5).backoff(Duration::ZERO, Duration::ZERO));
        let tx = if idempotent { tx.idempotent() } else { tx };
        let ran: Result<(), TxError> = tx
            .run(async |tx| {
                attempts += 1;
                sqlx::raw_sql("COMMIT").execute(&mut **tx).await?;
                Err(TxError::Database(Postgres::transient(tx).await))
            })
            .await;
        assert!(ran.is_err_and(|error| error.is_transient()));
        assert_eq!(attempts, expected);
    }
    world.end(db).await;
}
