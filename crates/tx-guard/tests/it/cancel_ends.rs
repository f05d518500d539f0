//! Transactions with an incident before their end, dropped at every await point of the end: an error, a lost savepoint,
//! an end by their own SQL, an abandoned statement, a connection that is cut in COMMIT.

use std::cell::RefCell;
use std::pin::pin;
use std::time::Duration;

use cancel_safe_testing::{Explore, Outcome, Report, Way, drop_after};
use cancel_safe_tx_guard::{CommitMode, CommitOutcome, TransactionGuard, TxError, TxPool};
use futures_util::future::poll_immediate;
use sqlx::pool::PoolOptions;
use sqlx::{AssertSqlSafe, Connection, MySql, Postgres, Sqlite};
use tokio::time::timeout;

use crate::cancel::{Doubt, Stage, explore, explore_unstarved, side_by_side, within};
use crate::proxy::{Fault, Proxy, ServerDb};
use crate::relied::takes_dropped_begins_back;
use crate::torn::{self, Pace};
use crate::world::{TestDb, World, elsewhere};

/// A transaction that has inserted 1, and its surroundings.
struct Met<D: TestDb> {
    stage: Stage<D>,
    tx: RefCell<Option<TransactionGuard<D>>>,
}

impl<D: TestDb> Met<D> {
    async fn begin(stage: Stage<D>) -> (Stage<D>, TransactionGuard<D>) {
        let mut tx = stage.db.begin().await.unwrap();
        stage.handle.replace(Some(tx.outcome_handle()));
        stage.world.insert(&mut tx, 1).await.unwrap();
        (stage, tx)
    }

    fn take(&self) -> TransactionGuard<D> {
        self.tx.take().unwrap()
    }
}

/// `meet` causes the incident; `end` ends the transaction, and asserts the result when nothing drops it.
fn ended<D: TestDb>(
    explore: &Explore,
    meet: impl AsyncFn(&Stage<D>, &mut TransactionGuard<D>),
    end: impl AsyncFn(TransactionGuard<D>),
    whole: &[i64],
    doubt: Doubt,
) -> Report {
    explore.run(
        async || {
            let (stage, mut tx) = Met::begin(Stage::<D>::new().await).await;
            meet(&stage, &mut tx).await;
            Met { stage, tx: RefCell::new(Some(tx)) }
        },
        async |met| end(met.take()).await,
        async |met, outcome| {
            // If it was never polled, the operation has not even taken the transaction.
            drop(met.tx.take());
            let rows = met.stage.agree(whole, doubt).await?;
            if outcome.is_completed() && rows != whole { Err(format!("completed, and {rows:?}")) } else { Ok(()) }
        },
    )
}

async fn is_lost<D: TestDb>(tx: TransactionGuard<D>) {
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
}

#[test]
fn a_commit_of_a_doomed_transaction_dropped_anywhere_leaves_nothing() {
    fn doomed<D: TestDb>(explore: &Explore) -> Report {
        let lose = async |stage: &Stage<D>, tx: &mut TransactionGuard<D>| {
            let savepoint = tx.savepoint(async |sp| {
                stage.world.insert(sp, 2).await?;
                std::future::pending().await
            });
            let savepoint: Result<Result<(), TxError>, _> = timeout(Duration::from_millis(20), savepoint).await;
            assert!(savepoint.is_err(), "{savepoint:?}");
        };
        ended::<D>(explore, lose, is_lost, &[], Doubt::OfTheRuntime)
    }
    side_by_side([
        || doomed::<Sqlite>(&explore()).publish("tx-guard", "commit, doomed (SQLite)").assert_clean(),
        || doomed::<Postgres>(&explore_unstarved()).publish("tx-guard", "commit, doomed (PostgreSQL)").assert_clean(),
        || doomed::<MySql>(&explore_unstarved()).publish("tx-guard", "commit, doomed (MySQL)").assert_clean(),
    ]);
}

#[test]
fn a_commit_of_an_aborted_transaction_dropped_anywhere_leaves_nothing() {
    let abort = async |stage: &Stage<Postgres>, tx: &mut TransactionGuard<Postgres>| {
        stage.world.insert(tx, 1).await.unwrap_err();
    };
    let is_aborted = async |tx: TransactionGuard<Postgres>| {
        let error = tx.commit().await.unwrap_err();
        assert!(matches!(error, TxError::Aborted { .. }), "{error:?}");
    };
    let report = ended::<Postgres>(&explore(), abort, is_aborted, &[], Doubt::OfTheRuntime);
    report.publish("tx-guard", "commit, aborted (PostgreSQL)").assert_clean();
}

/// A rollback by its SQL is reported as a rollback, or as unknown.
#[test]
fn the_end_of_a_transaction_that_its_sql_has_ended_dropped_anywhere_commits_nothing() {
    async fn roll_back<D: TestDb>(_: &Stage<D>, tx: &mut TransactionGuard<D>) {
        D::execute(tx, "ROLLBACK".to_owned()).await.unwrap();
    }
    fn committed<D: TestDb>(explore: &Explore) -> Report {
        ended::<D>(explore, roll_back, is_lost, &[], Doubt::OfTheTransaction)
    }
    fn rolled_back<D: TestDb>(explore: &Explore) -> Report {
        let end = async |tx: TransactionGuard<D>| drop(tx.rollback().await);
        ended::<D>(explore, roll_back, end, &[], Doubt::OfTheTransaction)
    }
    side_by_side([
        || committed::<Sqlite>(&explore()).publish("tx-guard", "commit, ended (SQLite)").assert_clean(),
        || committed::<Postgres>(&explore_unstarved()).publish("tx-guard", "commit, ended (PostgreSQL)").assert_clean(),
        || committed::<MySql>(&explore_unstarved()).publish("tx-guard", "commit, ended (MySQL)").assert_clean(),
        || rolled_back::<Sqlite>(&explore()).publish("tx-guard", "rollback, ended (SQLite)").assert_clean(),
        || rolled_back::<Postgres>(&explore()).publish("tx-guard", "rollback, ended (PostgreSQL)").assert_clean(),
        || rolled_back::<MySql>(&explore_unstarved()).publish("tx-guard", "rollback, ended (MySQL)").assert_clean(),
    ]);
}

#[test]
fn a_commit_over_a_forgotten_nested_transaction_dropped_anywhere_is_whole_or_nothing() {
    fn forgotten<D: TestDb>() -> Report {
        let forget = async |stage: &Stage<D>, tx: &mut TransactionGuard<D>| {
            let mut nested = tx.begin().await.unwrap();
            stage.world.insert(&mut nested, 2).await.unwrap();
            std::mem::forget(nested);
        };
        let commit = async |tx: TransactionGuard<D>| tx.commit().await.unwrap();
        ended::<D>(&explore(), forget, commit, &[1, 2], Doubt::OfTheRuntime)
    }
    side_by_side([
        || forgotten::<Sqlite>().publish("tx-guard", "commit, nested (SQLite)").assert_clean(),
        || forgotten::<Postgres>().publish("tx-guard", "commit, nested (PostgreSQL)").assert_clean(),
    ]);
}

/// sqlx has rolled back behind the guard's back, so its own count no longer describes the session.
async fn cancel_a_nested_begin<D: TestDb>(_: &Stage<D>, tx: &mut TransactionGuard<D>) {
    // Behind a statement that still runs, because otherwise the server may be faster than a poll.
    timeout(Duration::from_millis(10), D::execute(tx, D::SLOW.to_owned())).await.unwrap_err();
    assert!(drop_after(1, tx.begin()).await.is_none(), "nothing was cancelled");
}

#[test]
fn a_rollback_behind_a_cancelled_nested_begin_dropped_anywhere_leaves_nothing() {
    fn lost<D: TestDb>() -> Report {
        let end = async |tx: TransactionGuard<D>| drop(tx.rollback().await.unwrap_err());
        ended::<D>(&explore(), cancel_a_nested_begin, end, &[], Doubt::OfTheTransaction)
    }
    side_by_side([
        || lost::<Postgres>().publish("tx-guard", "rollback, lost (PostgreSQL)").assert_clean(),
        || lost::<MySql>().publish("tx-guard", "rollback, lost (MySQL)").assert_clean(),
    ]);
}

/// The connection for cancelling, over which the session is terminated, is opened only now.
#[test]
fn a_rollback_that_gives_up_a_session_of_a_wrapped_pool_dropped_anywhere_leaves_nothing() {
    let report = explore().run(
        async || {
            let world = World::<Postgres>::new().await;
            let pool = PoolOptions::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
            let (stage, mut tx) = Met::begin(Stage::over(world, TxPool::wrap(pool))).await;
            cancel_a_nested_begin(&stage, &mut tx).await;
            Met { stage, tx: RefCell::new(Some(tx)) }
        },
        async |met| drop(met.take().rollback().await.unwrap_err()),
        async |met, _| {
            drop(met.tx.take());
            // A version of sqlx that takes a dropped begin back may have committed.
            let takes_back = takes_dropped_begins_back().await;
            let doubt = if takes_back { Doubt::OfTheTransaction } else { Doubt::OfTheRuntime };
            met.stage.agree(&[], doubt).await.map(drop)
        },
    );
    report.publish("tx-guard", "rollback, lost and wrapped (PostgreSQL)").assert_clean();
}

/// A wrapped session gets the settings of its owner back, who then writes without any transaction.
#[test]
fn a_rollback_on_a_wrapped_pool_dropped_anywhere_gives_the_settings_back() {
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let world = World::<MySql>::new().await;
            let pool = PoolOptions::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
            let mut tx = TxPool::wrap(pool.clone()).begin().await.unwrap();
            world.insert(&mut tx, 1).await.unwrap();
            (world, pool, RefCell::new(Some(tx)))
        },
        async |(_, _, tx)| {
            let tx: TransactionGuard<MySql> = tx.take().unwrap();
            tx.rollback().await.unwrap();
        },
        async |(world, pool, tx), _| {
            drop(tx.take());
            let mut conn = within(pool.acquire()).await?.map_err(|error| error.to_string())?;
            world.insert(&mut conn, 2).await.map_err(|error| error.to_string())?;
            let rows = world.committed().await;
            conn.close().await.map_err(|error| error.to_string())?;
            world.run(format!("DROP TABLE {}", world.table)).await;
            if rows == [2] { Ok(()) } else { Err(format!("an insert has said Ok, and the table has {rows:?}")) }
        },
    );
    report.publish("tx-guard", "rollback, wrapped (MySQL)").assert_clean();
}

/// The unread answer to a dropped statement is read first. That takes so long that the server is checked meanwhile.
#[test]
fn a_commit_behind_a_dropped_statement_dropped_anywhere_is_whole_or_nothing() {
    let leave = async |_: &Stage<MySql>, tx: &mut TransactionGuard<MySql>| {
        let left = MySql::execute(tx, "SELECT SLEEP(0.65)".to_owned());
        timeout(Duration::from_millis(10), left).await.unwrap_err();
    };
    let commit = async |tx: TransactionGuard<MySql>| tx.commit().await.unwrap();
    let explore = explore_unstarved().ways([Way::Eager]);
    let report = ended::<MySql>(&explore, leave, commit, &[1], Doubt::OfTheRuntime);
    report.publish("tx-guard", "commit, behind (MySQL)").assert_clean();
}

/// The guard outlives its savepoint, which is undone, or set after the unread answer to a dropped statement.
fn savepoint_of<D: TestDb>(explore: Explore, left: Option<&str>) -> Report {
    explore.ways([Way::Eager, Way::Settled]).run(
        async || {
            let (stage, mut tx) = Met::begin(Stage::<D>::new().await).await;
            if let Some(left) = left {
                // On a very busy machine the statement may have ended already, which does no harm.
                drop(drop_after(1, D::execute(&mut tx, left.to_owned())).await);
            }
            (stage, tokio::sync::Mutex::new(Some(tx)))
        },
        async |(stage, tx)| {
            let mut tx = tx.lock().await;
            let undone = tx.as_mut().unwrap().savepoint(async |sp| {
                stage.world.insert(sp, 2).await?;
                Err::<(), _>(TxError::from(sqlx::Error::RowNotFound))
            });
            assert!(undone.await.is_err());
        },
        async |(stage, tx), outcome| {
            let committed = tx.lock().await.take().unwrap().commit().await;
            let whole: &[i64] = match (&outcome, &committed) {
                (Outcome::Completed(()) | Outcome::Dropped { point: 0, .. }, Ok(())) => &[1],
                (Outcome::Dropped { .. }, Err(TxError::Lost { .. })) => &[],
                _ => return Err(format!("{outcome:?}, and the commit says {committed:?}")),
            };
            let rows = stage.agree(whole, Doubt::OfTheRuntime).await?;
            if rows == whole { Ok(()) } else { Err(format!("{outcome:?}, and the table has {rows:?}")) }
        },
    )
}

#[test]
fn a_savepoint_that_is_undone_dropped_anywhere_is_never_committed_by_halves() {
    side_by_side([
        || savepoint_of::<Sqlite>(explore(), None).publish("tx-guard", "savepoint, undone (SQLite)").assert_clean(),
        || {
            savepoint_of::<Postgres>(explore_unstarved(), None)
                .publish("tx-guard", "savepoint, undone (PostgreSQL)")
                .assert_clean()
        },
        || {
            savepoint_of::<MySql>(explore_unstarved(), None)
                .publish("tx-guard", "savepoint, undone (MySQL)")
                .assert_clean()
        },
    ]);
}

#[test]
fn a_savepoint_behind_a_dropped_statement_dropped_anywhere_is_never_committed_by_halves() {
    let report = savepoint_of::<MySql>(explore_unstarved(), Some("SELECT SLEEP(0.05)"));
    report.publish("tx-guard", "savepoint, behind (MySQL)").assert_clean();
}

/// An answer that is held back halfway, in which sqlx has lost its place, so that nothing can tell where it ends. It
/// continues as soon as the transaction ends.
fn out_of_step(
    leave: impl AsyncFn(&World<MySql>, &mut TransactionGuard<MySql>),
    end: impl AsyncFn(TransactionGuard<MySql>),
    whole: &[i64],
) -> Report {
    explore_unstarved().ways([Way::Eager, Way::Settled]).run(
        async || {
            let world = World::<MySql>::new().await;
            let options = world.options.clone();
            let door = elsewhere(async move { torn::Door::<MySql>::open(&options).await }).await;
            let db = TxPool::builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
            let (stage, mut tx) = Met::begin(Stage::over(world, db)).await;
            door.pace.send_replace(Pace::ToTheFirstRow);
            leave(&stage.world, &mut tx).await;
            (door, Met { stage, tx: RefCell::new(Some(tx)) })
        },
        async |(door, met)| {
            let mut end = pin!(end(met.take()));
            let ended = poll_immediate(end.as_mut()).await;
            door.pace.send_replace(Pace::AtOnce);
            if ended.is_none() {
                end.await;
            }
        },
        async |(door, met), _| {
            door.pace.send_replace(Pace::AtOnce);
            drop(met.tx.take());
            met.stage.agree(whole, Doubt::OfTheTransaction).await.map(drop)
        },
    )
}

async fn leave_rows(_: &World<MySql>, tx: &mut TransactionGuard<MySql>) {
    let rows = MySql::execute(tx, torn::ROWS.replace('#', "1"));
    timeout(Duration::from_millis(30), rows).await.unwrap_err();
}

#[test]
fn the_end_of_a_transaction_that_is_out_of_step_dropped_anywhere_leaves_nothing() {
    let commit = out_of_step(leave_rows, async |tx| drop(tx.commit().await.unwrap_err()), &[]);
    commit.publish("tx-guard", "commit, out of step (MySQL)").assert_clean();
    let rollback = out_of_step(leave_rows, async |tx| drop(tx.rollback().await), &[]);
    rollback.publish("tx-guard", "rollback, out of step (MySQL)").assert_clean();
}

/// The answer is longer than sqlx knows when it is dropped before the end.
async fn prepare_wide(world: &World<MySql>, tx: &mut TransactionGuard<MySql>) {
    let wide = AssertSqlSafe(format!("SELECT ? + ?, n, v FROM {}", world.table));
    let prepared = sqlx::query(wide).bind(1).bind(2).fetch_all(&mut **tx);
    timeout(Duration::from_millis(30), prepared).await.map(drop).unwrap_err();
}

/// sqlx waits for more than the server sends, and the server waits for sqlx.
#[test]
fn a_rollback_that_is_stuck_dropped_anywhere_ends_the_session() {
    let rollback = out_of_step(prepare_wide, async |tx| drop(tx.rollback().await), &[]);
    rollback.publish("tx-guard", "rollback, stuck (MySQL)").assert_clean();
}

/// The same after a cancelled nested begin. It is unknown whether there was anything left to roll back.
#[test]
fn a_rollback_that_is_stuck_and_too_late_dropped_anywhere_is_not_told_as_one() {
    let leave = async |world: &World<MySql>, tx: &mut TransactionGuard<MySql>| {
        prepare_wide(world, tx).await;
        assert!(drop_after(1, tx.begin()).await.is_none(), "nothing was cancelled");
    };
    let is_lost = async |tx: TransactionGuard<MySql>| {
        let error = tx.rollback().await.unwrap_err();
        assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    };
    let rollback = out_of_step(leave, is_lost, &[]);
    rollback.publish("tx-guard", "rollback, stuck and lost (MySQL)").assert_clean();
}

/// The server is asked how it ended, and nothing is left in doubt.
fn commit_that_is_cut(fault: Fault, slow: bool) -> Report {
    let explore = if slow { explore() } else { explore_unstarved() };
    explore.run(
        async || {
            let world = World::<Postgres>::new().await;
            let address = Postgres::address(&world.options);
            if slow {
                world.run(Postgres::slow_commits(&world.table).unwrap().0).await;
            }
            let proxy = elsewhere(Proxy::open(address)).await;
            let options = Postgres::through(world.options.clone(), proxy.port);
            let db = TxPool::builder().max_connections(1).commit_mode(CommitMode::Resolvable);
            let (stage, tx) = Met::begin(Stage::over(world, db.connect_with(options).await.unwrap())).await;
            proxy.arm(fault);
            (proxy, Met { stage, tx: RefCell::new(Some(tx)) })
        },
        async |(_, met)| met.take().commit().await.is_ok(),
        async |(proxy, met), outcome| {
            drop(met.tx.take());
            let handle = met.stage.handle.borrow().clone().unwrap();
            let told = within(handle.outcome()).await?;
            proxy.disarm();
            if outcome.completed().is_some_and(|ok| ok != (told == CommitOutcome::Committed)) {
                return Err(format!("it says something else than the handle, {told:?}"));
            }
            if slow {
                let unset = Postgres::slow_commits(&met.stage.world.table).unwrap().1;
                // This waits for any session that is still in its COMMIT there.
                met.stage.world.run(unset).await;
            }
            met.stage.agree(&[1], Doubt::OfTheRuntime).await.map(drop)
        },
    )
}

#[test]
fn a_commit_that_is_cut_and_resolved_dropped_anywhere_is_told_truly() {
    let committed = commit_that_is_cut(Fault::CutAnswer, false);
    committed.publish("tx-guard", "commit, cut behind (PostgreSQL)").assert_clean();
    let rolled_back = commit_that_is_cut(Fault::CutBefore, false);
    rolled_back.publish("tx-guard", "commit, cut before (PostgreSQL)").assert_clean();
}

/// Its session still works at the time of the query, and is ended first.
#[test]
fn a_slow_commit_that_is_cut_and_resolved_dropped_anywhere_is_told_truly() {
    let slow = commit_that_is_cut(Fault::CutBehind, true);
    slow.publish("tx-guard", "commit, slow and cut (PostgreSQL)").assert_clean();
}

/// The pool is closed meanwhile, so the connection is closed when it comes back.
#[test]
fn the_end_of_a_transaction_of_a_closed_pool_dropped_anywhere_is_whole_or_nothing() {
    let closed = |end: fn(TransactionGuard<Sqlite>) -> futures_util::future::BoxFuture<'static, ()>, whole: &[i64]| {
        explore().ways([Way::Eager, Way::Settled]).run(
            async || {
                let (stage, tx) = Met::begin(Stage::<Sqlite>::new().await).await;
                assert_eq!(stage.db.close(Duration::ZERO).await.in_use, 1);
                Met { stage, tx: RefCell::new(Some(tx)) }
            },
            async |met| end(met.take()).await,
            async |met, outcome| {
                drop(met.tx.take());
                let report = met.stage.db.close(crate::world::PATIENCE).await;
                let rows = met.stage.world.committed().await;
                let told = met.stage.handle.take().unwrap().try_outcome();
                let expected = if told == Some(CommitOutcome::Committed) { whole } else { &[] };
                match rows == expected && report.is_clean() && (outcome.is_dropped() || rows == whole) {
                    true => Ok(()),
                    false => Err(format!("{report}, {told:?}, {rows:?}")),
                }
            },
        )
    };
    let commit = closed(|tx| Box::pin(async move { tx.commit().await.unwrap() }), &[1]);
    commit.publish("tx-guard", "commit, closed (SQLite)").assert_clean();
    let rollback = closed(|tx| Box::pin(async move { tx.rollback().await.unwrap() }), &[]);
    rollback.publish("tx-guard", "rollback, closed (SQLite)").assert_clean();
}
