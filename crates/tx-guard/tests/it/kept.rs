//! What a failed transaction leaves behind: a session that is in order is used again, and any other is ended over
//! another session, so that its locks are free whatever becomes of its connection.

use std::pin::pin;
use std::time::{Duration, Instant};

use cancel_safe_testing::drop_after;
use cancel_safe_tx_guard::{CommitOutcome, TransactionGuard, TxError, TxPool};
use futures_util::future::poll_immediate;
use sqlx::{AssertSqlSafe, Connection, MySql, Postgres};
use tokio::time::timeout;

use crate::commit::works_as_before;
use crate::on_all;
use crate::silence::within;
use crate::torn::{Door, Pace};
use crate::world::{TestDb, World, mostly_within};

on_all!(a_commit_that_is_refused_for_a_lost_savepoint_keeps_its_session);

/// Asserts that one session was opened, and none was given up.
fn is_kept<D: TestDb>(db: &TxPool<D>) {
    let now = db.metrics();
    assert_eq!((now.opened, now.closed_failed, now.terminated), (1, 0, 0), "{now:?}");
}

async fn a_commit_that_is_refused_for_a_lost_savepoint_keeps_its_session<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    let savepoint = tx.savepoint(async |_| std::future::pending::<Result<(), TxError>>().await);
    timeout(Duration::from_millis(20), savepoint).await.unwrap_err();
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    // The transaction is over before its commit returns.
    assert_eq!(handle.try_outcome(), Some(CommitOutcome::RolledBack));
    works_as_before(&world, &db).await;
    is_kept(&db);
    world.end(db).await;
}

async fn a_commit_behind_an_end_by_its_sql_keeps_its_session<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    D::execute(&mut tx, "ROLLBACK".to_owned()).await.unwrap();
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert_eq!(handle.try_outcome(), Some(CommitOutcome::Unknown));
    works_as_before(&world, &db).await;
    is_kept(&db);
    world.end(db).await;
}

#[tokio::test]
async fn a_commit_behind_an_end_by_its_sql_keeps_its_session_on_postgres() {
    a_commit_behind_an_end_by_its_sql_keeps_its_session::<Postgres>().await;
}

#[tokio::test]
async fn a_commit_behind_an_end_by_its_sql_keeps_its_session_on_mysql() {
    a_commit_behind_an_end_by_its_sql_keeps_its_session::<MySql>().await;
}

/// Nobody has got the error yet, so it becomes the commit's error, as on PostgreSQL.
#[tokio::test]
async fn a_commit_behind_a_dropped_statement_that_fails_is_refused_on_mysql() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let again = format!("INSERT INTO {} (n) SELECT 1 FROM (SELECT SLEEP(0.3)) nap", world.table);
    timeout(Duration::from_millis(20), MySql::execute(&mut tx, again)).await.unwrap_err();
    let handle = tx.outcome_handle();
    let error = within(tx.commit()).await.unwrap_err();
    let code = error.as_sqlx().and_then(|error| error.as_database_error()?.code()).map(|code| code.into_owned());
    assert_eq!(code.as_deref(), Some("23000"), "{error:?}");
    assert_eq!(handle.try_outcome(), Some(CommitOutcome::RolledBack));
    works_as_before(&world, &db).await;
    is_kept(&db);
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

/// The session has died before anything of the commit was sent.
#[tokio::test]
async fn a_commit_behind_a_dropped_statement_whose_session_was_killed_is_a_rollback_on_mysql() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    let id: u64 = sqlx::query_scalar("SELECT CONNECTION_ID()").fetch_one(&mut *tx).await.unwrap();
    timeout(Duration::from_millis(20), MySql::execute(&mut tx, MySql::SLOW.to_owned())).await.unwrap_err();
    world.run(format!("KILL CONNECTION {id}")).await;
    let error = within(tx.commit()).await.unwrap_err();
    assert!(!error.is_unknown(), "{error:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert!(world.committed().await.is_empty());
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// sqlx mistakes a `begin` that was cut inside a nested transaction for the nested one, whose commit then commits the
/// whole. The outcome is in doubt even without the server's answer to the guard's rollback.
#[tokio::test]
async fn an_end_of_which_sqlx_may_have_made_a_commit_is_in_doubt_although_the_session_has_died() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    // The server may be faster than a poll, and then there is nothing to cut.
    let (tx, id) = loop {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, 1).await.unwrap();
        let id: u64 = sqlx::query_scalar("SELECT CONNECTION_ID()").fetch_one(&mut *tx).await.unwrap();
        let mut nested = tx.begin().await.unwrap();
        if drop_after(1, nested.begin()).await.is_none() {
            nested.commit().await.unwrap();
            break (tx, id);
        }
        drop(nested);
        tx.rollback().await.unwrap();
    };
    let handle = tx.outcome_handle();
    world.run(format!("KILL CONNECTION {id}")).await;
    let error = within(tx.rollback()).await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// The answer is longer than sqlx knows when it is dropped before the end.
async fn leave_more_to_be_read_than_there_is(
    world: &World<MySql>,
    door: &Door<MySql>,
    tx: &mut TransactionGuard<MySql>,
) {
    door.pace.send_replace(Pace::ToTheFirstRow);
    let wide = AssertSqlSafe(format!("SELECT ? + ?, n, v FROM {}", world.table));
    let prepared = sqlx::query(wide).bind(1).bind(2).fetch_all(&mut **tx);
    timeout(Duration::from_millis(300), prepared).await.map(drop).unwrap_err();
}

/// sqlx waits for more than the server sends, and the server waits for sqlx: nothing is sent that could be committed,
/// and after the server was seen waiting for the limit the session is ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_behind_what_never_comes_is_given_up_in_its_time_and_its_session_ended() {
    let world = World::<MySql>::new().await;
    let door = Door::<MySql>::open(&world.options).await;
    let limit = Duration::from_secs(1);
    let db = TxPool::<MySql>::builder().max_connections(1).catch_up_timeout(limit);
    let db = db.connect_with(door.through.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    leave_more_to_be_read_than_there_is(&world, &door, &mut tx).await;
    let start = Instant::now();
    let mut commit = pin!(tx.commit());
    assert!(poll_immediate(commit.as_mut()).await.is_none());
    door.pace.send_replace(Pace::AtOnce);
    let error = within(commit).await.unwrap_err();
    assert!(start.elapsed() >= limit, "{:?}", start.elapsed());
    assert!(matches!(error, TxError::Lost { reason } if reason.contains("could not be read")), "{error:?}");
    assert_eq!(handle.try_outcome(), Some(CommitOutcome::RolledBack));
    assert_eq!(db.metrics().terminated, 1);
    assert!(world.committed().await.is_empty());
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// The same without a commit. There is no wait of two seconds, as for a session that can still be cancelled.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drop_behind_what_never_comes_ends_the_session_soon() {
    let world = World::<MySql>::new().await;
    let door = Door::<MySql>::open(&world.options).await;
    let db = TxPool::<MySql>::builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let mut ended = 0;
    let once = async || {
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        world.insert(&mut tx, 1).await.unwrap();
        leave_more_to_be_read_than_there_is(&world, &door, &mut tx).await;
        door.pace.send_replace(Pace::AtOnce);
        let start = Instant::now();
        drop(tx);
        assert_eq!(within(handle.outcome()).await, CommitOutcome::RolledBack);
        ended += 1;
        assert_eq!(db.metrics().terminated, ended);
        start.elapsed()
    };
    mostly_within(Duration::from_millis(1_900), 5, once).await;
    works_as_before(&world, &db).await;
    world.end(db).await;
}
