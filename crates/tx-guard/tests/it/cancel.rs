//! Every operation dropped at every await point, and the state left behind compared with the promises.
//!
//! The points of one operation vary a little between runs, because a socket may have more or less to read at once;
//! every point that a run has is still visited.

use std::cell::RefCell;

use cancel_safe_testing::{Explore, Outcome, Report, Way};
use cancel_safe_tx_guard::{CommitOutcome, OutcomeHandle, TxError, TxEvent, TxPool};
use sqlx::pool::PoolOptions;
use sqlx::{MySql, Pool, Postgres, Sqlite};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::relied::takes_dropped_begins_back;
use crate::world::{PATIENCE, TestDb, World};

/// Both starved budgets and the natural one find the same awaits here; the smallest finds the most points.
pub(crate) fn explore() -> Explore {
    Explore::new().budgets([1]).hang_after(PATIENCE).timeout(6 * PATIENCE)
}

/// Only the natural budget, in less time: an operation that waits for a server is pending even without starvation.
pub(crate) fn explore_unstarved() -> Explore {
    explore().budgets([])
}

/// Explorations that wait for their servers most of the time.
pub(crate) fn side_by_side<const N: usize>(explorations: [fn(); N]) {
    std::thread::scope(|scope| explorations.map(|explore| drop(scope.spawn(explore))));
}

/// A pool of one connection, so that the next user meets whatever is left on it.
pub(crate) struct Stage<D: TestDb> {
    pub(crate) world: World<D>,
    pub(crate) db: TxPool<D>,
    pub(crate) handle: RefCell<Option<OutcomeHandle>>,
    /// Ends with the runtime in which the pool was made, and not before.
    runtime: JoinHandle<()>,
}

impl<D: TestDb> Stage<D> {
    pub(crate) async fn new() -> Self {
        let world = World::new().await;
        let db = world.pool(1).await;
        Self::over(world, db)
    }

    /// The same over a pool of one connection that was made in another way.
    pub(crate) fn over(world: World<D>, db: TxPool<D>) -> Self {
        Self { world, db, handle: RefCell::new(None), runtime: tokio::spawn(std::future::pending()) }
    }

    /// The promises that hold after any drop: the handle agrees with the table, there are no half transactions, and the
    /// pool works as if nothing had happened.
    pub(crate) async fn check<T>(&self, outcome: Outcome<T>, whole: &[i64]) -> Result<(), String> {
        let rows = self.agree(whole, Doubt::OfTheRuntime).await?;
        if outcome.is_completed() && rows != whole {
            return Err(format!("completed, and the table has {rows:?}"));
        }
        Ok(())
    }

    /// The same, whatever the purpose of the operation. Returns the content of the table.
    pub(crate) async fn agree(&self, whole: &[i64], doubt: Doubt) -> Result<Vec<i64>, String> {
        let shutdown = self.runtime.is_finished();
        let handle = self.handle.borrow_mut().take();
        let told = match &handle {
            Some(handle) => Some(within(handle.outcome()).await?),
            None => None,
        };
        let rows = self.world.committed().await;
        let in_doubt = shutdown || matches!(doubt, Doubt::OfTheTransaction);
        match told {
            Some(CommitOutcome::Committed) if rows == whole => {}
            Some(CommitOutcome::RolledBack) | None if rows.is_empty() => {}
            Some(CommitOutcome::Unknown) if in_doubt && (rows.is_empty() || rows == whole) => {}
            told => return Err(format!("the handle says {told:?} and the table has {rows:?}")),
        }
        let db = if shutdown { self.world.pool(1).await } else { self.db.clone() };
        within(crate::commit::works_as_before(&self.world, &db)).await?;
        within(self.world.end(db)).await?;
        Ok(rows)
    }
}

/// When the end of a transaction may be unknown.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Doubt {
    /// The runtime that would have learned it is gone.
    OfTheRuntime,
    /// The transaction may also have been ended without its guard.
    OfTheTransaction,
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(PATIENCE / 2, future).await.map_err(|_| "it does not end".to_owned())
}

fn transaction<D: TestDb>() -> Report {
    explore().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let mut tx = stage.db.begin().await.unwrap();
            stage.handle.replace(Some(tx.outcome_handle()));
            stage.world.insert(&mut tx, 1).await.unwrap();
            stage.world.insert(&mut tx, 2).await.unwrap();
            tx.commit().await.unwrap();
        },
        async |stage, outcome| stage.check(outcome, &[1, 2]).await,
    )
}

#[test]
fn a_transaction_dropped_anywhere_is_whole_or_nothing_on_sqlite() {
    transaction::<Sqlite>().publish("tx-guard", "transaction (SQLite)").assert_clean();
}

#[test]
fn a_transaction_dropped_anywhere_is_whole_or_nothing_on_postgres() {
    transaction::<Postgres>().publish("tx-guard", "transaction (PostgreSQL)").assert_clean();
}

#[test]
fn a_transaction_dropped_anywhere_is_whole_or_nothing_on_mysql() {
    transaction::<MySql>().publish("tx-guard", "transaction (MySQL)").assert_clean();
}

fn commit_within<D: TestDb>() -> Report {
    explore().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let mut tx = stage.db.begin().await.unwrap();
            stage.handle.replace(Some(tx.outcome_handle()));
            stage.world.insert(&mut tx, 1).await.unwrap();
            tx.commit_within(PATIENCE).await.unwrap();
        },
        async |stage, outcome| stage.check(outcome, &[1]).await,
    )
}

#[test]
fn a_commit_with_a_limit_dropped_anywhere_is_whole_or_nothing() {
    side_by_side([
        || commit_within::<Sqlite>().publish("tx-guard", "commit_within (SQLite)").assert_clean(),
        || commit_within::<Postgres>().publish("tx-guard", "commit_within (PostgreSQL)").assert_clean(),
        || commit_within::<MySql>().publish("tx-guard", "commit_within (MySQL)").assert_clean(),
    ]);
}

/// A transaction that another task drops a little later.
async fn dropped_later(stage: &Stage<Sqlite>) -> OutcomeHandle {
    let tx = stage.db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    tokio::spawn(async move {
        tokio::task::yield_now().await;
        drop(tx);
    });
    handle
}

#[test]
fn a_wait_for_the_outcome_dropped_anywhere_can_be_repeated() {
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let stage = Stage::<Sqlite>::new().await;
            let handle = dropped_later(&stage).await;
            (stage, handle)
        },
        async |(_, handle)| handle.outcome().await,
        async |(stage, handle), outcome| {
            let told = within(handle.outcome()).await?;
            within(stage.world.end(stage.db.clone())).await?;
            match outcome {
                _ if told != CommitOutcome::RolledBack => Err(format!("{told:?}")),
                Outcome::Completed(first) if first != told => Err(format!("{first:?} at first, then {told:?}")),
                _ => Ok(()),
            }
        },
    );
    report.publish("tx-guard", "outcome (SQLite)").assert_clean();
}

#[test]
fn a_wait_for_an_event_dropped_anywhere_loses_none() {
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let stage = Stage::<Sqlite>::new().await;
            let events = Mutex::new(stage.db.events());
            dropped_later(&stage).await;
            (stage, events)
        },
        async |(_, events)| events.lock().await.next().await,
        async |(stage, events), outcome| {
            let event = match outcome {
                Outcome::Completed(event) => event,
                Outcome::Dropped { .. } => within(events.lock().await.next()).await?,
            };
            within(stage.world.end(stage.db.clone())).await?;
            if event == Some(TxEvent::ImplicitRollback) { Ok(()) } else { Err(format!("{event:?}")) }
        },
    );
    report.publish("tx-guard", "events (SQLite)").assert_clean();
}

fn closure<D: TestDb>() -> Report {
    explore().run(
        async || Stage::<D>::new().await,
        async |stage| {
            let run = stage.db.tx().timeout(PATIENCE).run(async |tx| {
                stage.handle.replace(Some(tx.outcome_handle()));
                stage.world.insert(tx, 1).await?;
                tx.savepoint(async |sp| Ok::<_, TxError>(stage.world.insert(sp, 2).await?)).await
            });
            run.await.unwrap();
        },
        async |stage, outcome| stage.check(outcome, &[1, 2]).await,
    )
}

#[test]
fn a_closure_dropped_anywhere_is_whole_or_nothing_on_sqlite() {
    closure::<Sqlite>().publish("tx-guard", "run (SQLite)").assert_clean();
}

#[test]
fn a_closure_dropped_anywhere_is_whole_or_nothing_on_postgres() {
    closure::<Postgres>().publish("tx-guard", "run (PostgreSQL)").assert_clean();
}

#[test]
fn a_closure_dropped_anywhere_is_whole_or_nothing_on_mysql() {
    closure::<MySql>().publish("tx-guard", "run (MySQL)").assert_clean();
}

/// The transaction outlives its savepoint, and must not be committed with a half of it.
fn savepoint<D: TestDb>() -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let stage = Stage::<D>::new().await;
            let mut tx = stage.db.begin().await.unwrap();
            stage.world.insert(&mut tx, 1).await.unwrap();
            (stage, Mutex::new(Some(tx)))
        },
        async |(stage, tx)| {
            let mut tx = tx.lock().await;
            let tx = tx.as_mut().unwrap();
            tx.savepoint(async |sp| Ok::<_, TxError>(stage.world.insert(sp, 2).await?)).await.unwrap();
        },
        async |(stage, tx), outcome| {
            let committed = tx.lock().await.take().unwrap().commit().await;
            let expected: &[i64] = match (&outcome, &committed) {
                (Outcome::Completed(()), Ok(())) => &[1, 2],
                (Outcome::Dropped { point: 0, .. }, Ok(())) => &[1],
                (Outcome::Dropped { .. }, Err(TxError::Lost { .. })) => &[],
                _ => return Err(format!("{outcome:?}, and the commit says {committed:?}")),
            };
            let rows = stage.world.committed().await;
            within(stage.world.end(stage.db.clone())).await?;
            if rows == expected { Ok(()) } else { Err(format!("{outcome:?}, and the table has {rows:?}")) }
        },
    )
}

#[test]
fn a_savepoint_dropped_anywhere_is_never_committed_by_halves_on_sqlite() {
    savepoint::<Sqlite>().publish("tx-guard", "savepoint (SQLite)").assert_clean();
}

#[test]
fn a_savepoint_dropped_anywhere_is_never_committed_by_halves_on_postgres() {
    savepoint::<Postgres>().publish("tx-guard", "savepoint (PostgreSQL)").assert_clean();
}

#[test]
fn a_savepoint_dropped_anywhere_is_never_committed_by_halves_on_mysql() {
    savepoint::<MySql>().publish("tx-guard", "savepoint (MySQL)").assert_clean();
}

fn rollback<D: TestDb>() -> Report {
    explore().run(
        async || {
            let stage = Stage::<D>::new().await;
            let mut tx = stage.db.begin().await.unwrap();
            stage.world.insert(&mut tx, 1).await.unwrap();
            stage.handle.replace(Some(tx.outcome_handle()));
            (stage, RefCell::new(Some(tx)))
        },
        async |(_, tx)| {
            let tx = tx.take().unwrap();
            tx.rollback().await.unwrap();
        },
        async |(stage, tx), outcome| {
            // If it was never polled, the operation has not even taken the transaction.
            drop(tx.take());
            stage.check(outcome, &[]).await
        },
    )
}

#[test]
fn a_rollback_dropped_anywhere_rolls_back_on_sqlite() {
    rollback::<Sqlite>().publish("tx-guard", "rollback (SQLite)").assert_clean();
}

#[test]
fn a_rollback_dropped_anywhere_rolls_back_on_postgres() {
    rollback::<Postgres>().publish("tx-guard", "rollback (PostgreSQL)").assert_clean();
}

#[test]
fn a_rollback_dropped_anywhere_rolls_back_on_mysql() {
    rollback::<MySql>().publish("tx-guard", "rollback (MySQL)").assert_clean();
}

#[test]
fn a_connect_dropped_anywhere_leaves_no_session_behind() {
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        async || World::<Postgres>::new().await,
        async |world| {
            let options = world.options.clone().application_name(&world.table);
            drop(TxPool::<Postgres>::builder().connect_with(options).await.unwrap());
        },
        async |world, _| {
            let sessions = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{}'", world.table);
            let mut other = world.plain().await;
            crate::world::eventually("the sessions are closed", async || {
                Postgres::numbers(&mut other, sessions.clone()).await.unwrap() == [0]
            })
            .await;
            world.run(format!("DROP TABLE {}", world.table)).await;
            Ok(())
        },
    );
    report.publish("tx-guard", "connect (PostgreSQL)").assert_clean();
}

#[test]
fn closing_dropped_anywhere_can_be_repeated() {
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let stage = Stage::<Sqlite>::new().await;
            drop(stage.db.begin().await.unwrap());
            stage
        },
        async |stage| stage.db.close(PATIENCE).await,
        async |stage, _| {
            let report = stage.db.close(PATIENCE).await;
            if report.is_clean() { Ok(()) } else { Err(report.to_string()) }
        },
    );
    report.publish("tx-guard", "close (SQLite)").assert_clean();
}

/// An sqlx pool of one connection, on which `begin` is dropped; then its user writes without any transaction.
fn begin_on_a_plain_pool<D: TestDb, T>(begin: impl AsyncFn(&Pool<D>) -> T) -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let world = World::<D>::new().await;
            let pool = PoolOptions::<D>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
            (world, pool)
        },
        async |(_, pool)| drop(begin(pool).await),
        async |(world, pool), _| {
            let mut conn = within(pool.acquire()).await?.map_err(|error| error.to_string())?;
            world.insert(&mut conn, 1).await.map_err(|error| error.to_string())?;
            let rows = world.committed().await;
            conn.close().await.map_err(|error| error.to_string())?;
            world.run(format!("DROP TABLE {}", world.table)).await;
            if rows == [1] { Ok(()) } else { Err(format!("an insert has said Ok, and the table has {rows:?}")) }
        },
    )
}

#[test]
fn a_begin_dropped_anywhere_leaks_no_open_transaction() {
    let report = begin_on_a_plain_pool::<Postgres, _>(async |pool| TxPool::wrap(pool.clone()).begin().await.unwrap());
    report.publish("tx-guard", "begin, wrapped (PostgreSQL)").assert_clean();
    let report = begin_on_a_plain_pool::<Sqlite, _>(async |pool| TxPool::wrap(pool.clone()).begin().await.unwrap());
    report.publish("tx-guard", "begin, wrapped (SQLite)").assert_clean();
    let report = begin_on_a_plain_pool::<MySql, _>(async |pool| TxPool::wrap(pool.clone()).begin().await.unwrap());
    report.publish("tx-guard", "begin, wrapped (MySQL)").assert_clean();
}

#[test]
fn the_same_check_catches_the_leak_of_plain_sqlx() {
    let report = begin_on_a_plain_pool::<Postgres, _>(async |pool| pool.begin().await.unwrap());
    let lost = report.failures().iter().any(|failure| failure.message().contains("said Ok"));
    // Later versions of sqlx have fixed it.
    let mended = tokio::runtime::Runtime::new().unwrap().block_on(takes_dropped_begins_back());
    assert_eq!(lost, !mended, "{report}");
}
