//! The end of the time is reported as a timeout, whichever side notices first: the caller, the server or neither.

use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitOutcome, Retry, TxError};
use sqlx::{MySql, Postgres};
use tokio::time::sleep;

use crate::commit::works_as_before;
use crate::on_all;
use crate::world::{PATIENCE, TestDb, World};

on_all!(
    a_statement_that_runs_into_the_deadline_is_a_timeout,
    the_error_of_work_that_is_too_late_is_a_timeout_whatever_it_was,
    the_error_of_work_in_time_is_its_own,
);

/// A user's own error type, made from ours, without a source.
#[derive(Debug)]
enum AppError {
    Tx(TxError),
    Refused,
}

impl From<TxError> for AppError {
    fn from(error: TxError) -> Self {
        Self::Tx(error)
    }
}

fn is_timeout(error: &AppError, limit: Duration) -> bool {
    matches!(error, AppError::Tx(TxError::Timeout { timeout }) if *timeout == limit)
}

async fn a_statement_that_runs_into_the_deadline_is_a_timeout<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for round in 0..50 {
        let limit = Duration::from_millis(20 + round % 10) + Duration::from_micros(round * 97 % 1_000);
        let run = db
            .tx()
            .timeout(limit)
            .retry(Retry::attempts(9))
            .run(async |tx| D::execute(tx, D::SLOW.to_owned()).await.map_err(|error| AppError::Tx(error.into())));
        let error = run.await.unwrap_err();
        // So short a time may pass while the connection of the previous round is still being cleaned up.
        let AppError::Tx(error) = error else { panic!("{error:?}") };
        assert!(error.is_timeout(), "round {round}: {error:?}");
    }
    works_as_before(&world, &db).await;
    world.end(db).await;
}

async fn the_error_of_work_that_is_too_late_is_a_timeout_whatever_it_was<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    // The connection is there, so the time is spent on the work alone.
    db.begin().await.unwrap().rollback().await.unwrap();
    let limit = Duration::from_secs(1);
    for passes in [false, true] {
        let mut attempts = 0;
        let tx = db.tx().timeout(limit).retry(Retry::attempts(9)).retry_if(move |_: &AppError| passes);
        let run = tx.run(async |tx| {
            attempts += 1;
            world.insert(tx, 1).await.map_err(|error| AppError::Tx(error.into()))?;
            // The clock cannot be checked meanwhile.
            busy(limit);
            Err::<(), _>(AppError::Refused)
        });
        let error = run.await.unwrap_err();
        assert!(is_timeout(&error, limit), "{error:?}");
        assert_eq!(attempts, 1);
    }
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn the_error_of_work_in_time_is_its_own<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let run = db.tx().timeout(PATIENCE).run(async |_| Err::<(), _>(AppError::Refused));
    assert!(matches!(run.await, Err(AppError::Refused)));
    let run = db.tx().timeout(PATIENCE).run(async |tx| {
        world.insert(tx, 1).await?;
        world.insert(tx, 1).await?;
        Ok::<_, TxError>(())
    });
    assert!(matches!(run.await, Err(TxError::Database(_))));
    world.end(db).await;
}

#[expect(clippy::disallowed_methods, reason = "it is the point that the thread is kept busy")]
fn busy(time: Duration) {
    std::thread::sleep(time);
}

/// The thread is busy until the server's own limit has ended the statement, so both results are ready at once.
async fn the_limit_of_the_server_is_a_timeout_of_ours<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let limit = Duration::from_millis(100);
    for _ in 0..3 {
        let start = Instant::now();
        let mut said = None;
        let run = db.tx().timeout(limit).retry(Retry::attempts(9)).run(async |tx| {
            let slow = async {
                let slow = D::execute(tx, D::SLOW.to_owned()).await;
                said = Some(format!("{slow:?}"));
                slow
            };
            let (slow, ()) = tokio::join!(slow, async {
                sleep(Duration::from_millis(20)).await;
                busy(Duration::from_millis(1_200));
            });
            slow.map_err(|error| AppError::Tx(error.into()))
        });
        let error = run.await.unwrap_err();
        let AppError::Tx(error) = error else { panic!("{error:?}") };
        assert!(error.is_timeout(), "{error:?}, after {:?}; the server: {said:?}", start.elapsed());
    }
    works_as_before(&world, &db).await;
    world.end(db).await;
}

#[tokio::test]
async fn the_limit_of_postgres_is_a_timeout_of_ours() {
    the_limit_of_the_server_is_a_timeout_of_ours::<Postgres>().await;
}

#[tokio::test]
async fn the_limit_of_mysql_is_a_timeout_of_ours() {
    the_limit_of_the_server_is_a_timeout_of_ours::<MySql>().await;
}

/// Its constraint is checked at the commit, slowly.
async fn slow_commits(world: &World<Postgres>, then: &str) {
    let table = &world.table;
    world
        .run(format!(
            "CREATE FUNCTION {table}_slow() RETURNS trigger LANGUAGE plpgsql AS
                 $$ BEGIN PERFORM pg_sleep(1.5); {then} RETURN NULL; END $$;
             CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED
                 FOR EACH ROW EXECUTE FUNCTION {table}_slow()"
        ))
        .await;
}

/// A commit that began in time, and whose answer comes after the deadline.
#[tokio::test]
async fn a_commit_that_fails_past_the_deadline_is_a_timeout_and_one_that_succeeds_is_none() {
    for (then, committed) in [("RAISE EXCEPTION 'refused';", false), ("", true)] {
        let world = World::<Postgres>::new().await;
        slow_commits(&world, then).await;
        let db = world.pool(1).await;
        let limit = Duration::from_secs(1);
        let mut tx = db.tx().timeout(limit).begin().await.unwrap();
        world.insert(&mut tx, 1).await.unwrap();
        let handle = tx.outcome_handle();
        let told = tx.commit().await;
        let outcome = if committed { CommitOutcome::Committed } else { CommitOutcome::RolledBack };
        assert_eq!(handle.outcome().await, outcome);
        match told {
            Ok(()) => assert!(committed),
            Err(error) => {
                assert!(!committed && matches!(error, TxError::Timeout { timeout } if timeout == limit), "{error:?}");
            }
        }
        world.end(db).await;
        world.run(format!("DROP FUNCTION {}_slow", world.table)).await;
    }
}
