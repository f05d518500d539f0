//! How a transaction gets its connection, dropped at every await point: waiting with a deadline, opening, upkeep,
//! recognition, a dead connection; and a connection that must not be used again.

use std::cell::RefCell;
use std::time::Duration;

use cancel_safe_testing::{Report, Way, drop_after};
use cancel_safe_tx_guard::{Options, TransactionGuard, TxError, TxPool};
use sqlx::mysql::MySqlConnectOptions;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::{ConnectOptions, Connection, MySql, Postgres};
use tokio::time::{advance, pause, resume, sleep, timeout};

use crate::cancel::{Doubt, Stage, explore, explore_unstarved, side_by_side, within};
use crate::world::{PATIENCE, Server, TestDb, World, eventually};

/// A database whose sessions can be distinguished from those of other tests.
trait Counted: Server {
    /// Options that identify the sessions of this test.
    async fn counted(world: &World<Self>) -> Options<Self>;
    /// A query for their ids.
    fn sessions(world: &World<Self>) -> String;
    fn kill(id: i64) -> String;
    async fn uncount(world: &World<Self>);
}

impl Counted for Postgres {
    async fn counted(world: &World<Self>) -> PgConnectOptions {
        world.options.clone().application_name(&world.table)
    }

    fn sessions(world: &World<Self>) -> String {
        format!("SELECT pid::bigint FROM pg_stat_activity WHERE application_name = '{}'", world.table)
    }

    fn kill(id: i64) -> String {
        format!("SELECT pg_terminate_backend({id})")
    }

    async fn uncount(_: &World<Self>) {}
}

impl Counted for MySql {
    async fn counted(world: &World<Self>) -> MySqlConnectOptions {
        world.run(format!("CREATE DATABASE {}", world.table)).await;
        world.options.clone().database(&world.table)
    }

    fn sessions(world: &World<Self>) -> String {
        format!("SELECT CAST(id AS SIGNED) FROM information_schema.processlist WHERE db = '{}'", world.table)
    }

    fn kill(id: i64) -> String {
        format!("KILL CONNECTION {id}")
    }

    async fn uncount(world: &World<Self>) {
        world.run(format!("DROP DATABASE {}", world.table)).await;
    }
}

async fn all_sessions_are_closed<D: Counted>(world: &World<D>) {
    let mut other = world.plain().await;
    eventually("the sessions are closed", async || {
        D::numbers(&mut other, D::sessions(world)).await.unwrap().is_empty()
    })
    .await;
    drop(other.close().await);
}

fn connect<D: Counted>() -> Report {
    explore().ways([Way::Eager, Way::Settled]).run(
        async || {
            let world = World::<D>::new().await;
            let url = D::counted(&world).await.to_url_lossy().to_string();
            (world, url)
        },
        async |(_, url)| drop(TxPool::<D>::connect(url).await.unwrap()),
        async |(world, _), _| {
            all_sessions_are_closed(world).await;
            D::uncount(world).await;
            world.run(format!("DROP TABLE {}", world.table)).await;
            Ok(())
        },
    )
}

#[test]
fn a_connect_to_a_url_dropped_anywhere_leaves_no_session_behind() {
    connect::<MySql>().publish("tx-guard", "connect, URL (MySQL)").assert_clean();
}

/// The only connection comes free a little later.
#[test]
fn a_wait_for_a_connection_with_a_deadline_dropped_anywhere_begins_nothing() {
    let report = explore().run(
        async || {
            let stage = Stage::<Postgres>::new().await;
            let holder = stage.db.begin().await.unwrap();
            tokio::spawn(async move {
                sleep(Duration::from_millis(5)).await;
                holder.rollback().await
            });
            stage
        },
        async |stage| {
            let run = stage.db.tx().timeout(PATIENCE).run(async |tx| {
                stage.handle.replace(Some(tx.outcome_handle()));
                Ok::<_, TxError>(stage.world.insert(tx, 1).await?)
            });
            run.await.unwrap();
        },
        async |stage, outcome| stage.check(outcome, &[1]).await,
    );
    report.publish("tx-guard", "run, waiting (PostgreSQL)").assert_clean();
}

async fn begins_and_commits<D: TestDb>(stage: &Stage<D>) {
    let mut tx = TransactionGuard::new(&stage.db).await.unwrap();
    stage.handle.replace(Some(tx.outcome_handle()));
    stage.world.insert(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
}

/// Both connections have been idle long enough to be checked for being alive: one of the pool, and one that was opened
/// for a caller that had gone.
#[test]
fn the_upkeep_of_idle_connections_dropped_anywhere_keeps_them_or_closes_them() {
    let report = explore_unstarved().ways([Way::Eager]).run(
        async || {
            let world = World::<Postgres>::new().await;
            let options = Postgres::counted(&world).await;
            let db = TxPool::<Postgres>::builder().max_connections(2).connect_with(options).await.unwrap();
            let tx = db.begin().await.unwrap();
            assert!(drop_after(1, db.begin()).await.is_none(), "nothing was left to be opened");
            let mut other = world.plain().await;
            eventually("a session is open for nobody", async || {
                let sessions =
                    format!("{} AND state = 'idle' AND query LIKE '%txg_state%'", Postgres::sessions(&world));
                Postgres::numbers(&mut other, sessions).await.unwrap().len() == 1
            })
            .await;
            drop(other.close().await);
            tx.rollback().await.unwrap();
            // Both connections have to be older than a second.
            pause();
            advance(Duration::from_secs(2)).await;
            resume();
            Stage::over(world, db)
        },
        async |stage| {
            let (one, two) = (stage.db.begin().await.unwrap(), stage.db.begin().await.unwrap());
            one.rollback().await.unwrap();
            two.rollback().await.unwrap();
        },
        async |stage, _| {
            let mut other = stage.world.plain().await;
            let sessions = Postgres::numbers(&mut other, Postgres::sessions(&stage.world)).await.unwrap();
            if sessions.len() > 3 {
                return Err(format!("two, and one for cancelling, are allowed: {sessions:?}"));
            }
            let (one, two) = (within(stage.db.begin()).await?, within(stage.db.begin()).await?);
            drop((one.unwrap().rollback().await, two.unwrap().rollback().await));
            stage.agree(&[], Doubt::OfTheRuntime).await?;
            Ok(())
        },
    );
    report.publish("tx-guard", "begin, idle for long (PostgreSQL)").assert_clean();
}

/// Its session ended while it was idle, so another one is opened.
fn begin_on_a_dead_session<D: Counted>() -> Report {
    explore_unstarved().run(
        async || {
            let world = World::<D>::new().await;
            let options = D::counted(&world).await;
            let db = TxPool::<D>::builder().max_connections(1).connect_with(options).await.unwrap();
            let mut other = world.plain().await;
            for id in D::numbers(&mut other, D::sessions(&world)).await.unwrap() {
                D::execute(&mut other, D::kill(id)).await.unwrap();
            }
            drop(other.close().await);
            all_sessions_are_closed(&world).await;
            Stage::over(world, db)
        },
        async |stage| begins_and_commits(stage).await,
        async |stage, outcome| stage.check(outcome, &[1]).await,
    )
}

#[test]
fn a_begin_on_a_dead_session_dropped_anywhere_is_whole_or_nothing() {
    begin_on_a_dead_session::<Postgres>().publish("tx-guard", "begin, again (PostgreSQL)").assert_clean();
}

/// The second connection of the pool is opened for it.
fn begin_on_a_new_session<D: Counted>() -> Report {
    explore_unstarved().run(
        async || {
            let world = World::<D>::new().await;
            let db = world.pool(2).await;
            let first = db.begin().await.unwrap();
            (Stage::over(world, db), RefCell::new(Some(first)))
        },
        async |(stage, _)| begins_and_commits(stage).await,
        async |(stage, first), outcome| {
            drop(first.take());
            stage.check(outcome, &[1]).await
        },
    )
}

#[test]
fn a_begin_on_a_new_session_dropped_anywhere_is_whole_or_nothing() {
    side_by_side([
        || begin_on_a_new_session::<Postgres>().publish("tx-guard", "begin, new (PostgreSQL)").assert_clean(),
        || begin_on_a_new_session::<MySql>().publish("tx-guard", "begin, new (MySQL)").assert_clean(),
    ]);
}

/// Its connections keep no statements that could identify them.
fn begin_without_a_cache<D: TestDb>(uncached: impl Fn(Options<D>) -> Options<D>) -> Report {
    explore_unstarved().ways([Way::Eager, Way::Settled]).run(
        async || {
            let world = World::<D>::new().await;
            let options = uncached(world.options.clone());
            let pool = PoolOptions::<D>::new().max_connections(1).connect_with(options).await.unwrap();
            (Stage::over(world, TxPool::wrap(pool.clone())), pool)
        },
        async |(stage, _)| begins_and_commits(stage).await,
        async |(stage, pool), outcome| {
            // The owner of the pool writes without a transaction, and that write stands.
            let handle = stage.handle.borrow().clone();
            if let Some(handle) = handle {
                within(handle.outcome()).await?;
            }
            let mut conn = within(pool.acquire()).await?.map_err(|error| error.to_string())?;
            stage.world.insert(&mut conn, 2).await.map_err(|error| error.to_string())?;
            drop(conn);
            if !stage.world.committed().await.contains(&2) {
                return Err("an insert has said Ok, and is not there".to_owned());
            }
            stage.world.run(format!("DELETE FROM {} WHERE n = 2", stage.world.table)).await;
            stage.check(outcome, &[1]).await
        },
    )
}

#[test]
fn a_begin_on_a_pool_without_a_cache_dropped_anywhere_leaks_no_open_transaction() {
    let report = begin_without_a_cache::<Postgres>(|options| options.statement_cache_capacity(0));
    report.publish("tx-guard", "begin, uncached (PostgreSQL)").assert_clean();
    let report = begin_without_a_cache::<MySql>(|options| options.statement_cache_capacity(0));
    report.publish("tx-guard", "begin, uncached (MySQL)").assert_clean();
}

/// The cancelling connection is dead and no other is available, so a cancel may stay under way for ever: the session is
/// rolled back when its statement has ended by itself, and is never used again.
#[test]
fn a_rollback_whose_cancel_is_lost_dropped_anywhere_ends_the_session() {
    let report = explore_unstarved().ways([Way::Eager]).run(
        async || {
            let world = World::<Postgres>::new().await;
            let role = world.table.clone();
            world.run(format!("CREATE ROLE {role} LOGIN PASSWORD 'secret'; GRANT ALL ON {role} TO {role}")).await;
            let options = Postgres::account(Postgres::counted(&world).await, &role, "secret");
            let db = TxPool::<Postgres>::builder().max_connections(1).connect_with(options).await.unwrap();
            let mut tx = db.begin().await.unwrap();
            let ours: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
            let ours = i64::from(ours);
            world.insert(&mut tx, 1).await.unwrap();
            world.run(format!("ALTER ROLE {role} NOLOGIN")).await;
            let mut other = world.plain().await;
            for id in Postgres::numbers(&mut other, Postgres::sessions(&world)).await.unwrap() {
                if id != ours {
                    Postgres::execute(&mut other, Postgres::kill(id)).await.unwrap();
                }
            }
            eventually("the connection for cancelling is dead", async || {
                Postgres::numbers(&mut other, Postgres::sessions(&world)).await.unwrap() == [ours]
            })
            .await;
            drop(other.close().await);
            let slow = Postgres::execute(&mut tx, "SELECT pg_sleep(0.5)".to_owned());
            timeout(Duration::from_millis(10), slow).await.unwrap_err();
            let stage = Stage::over(world, db);
            stage.handle.replace(Some(tx.outcome_handle()));
            (stage, ours, RefCell::new(Some(tx)))
        },
        async |(_, _, tx)| {
            let tx = tx.take().unwrap();
            tx.rollback().await.unwrap();
        },
        async |(stage, ours, tx), _| {
            drop(tx.take());
            let (world, role) = (&stage.world, &stage.world.table);
            let handle = stage.handle.borrow().clone().unwrap();
            within(handle.outcome()).await?;
            let mut other = world.plain().await;
            eventually("the session is closed", async || {
                !Postgres::numbers(&mut other, Postgres::sessions(world)).await.unwrap().contains(ours)
            })
            .await;
            drop(other.close().await);
            world.run(format!("ALTER ROLE {role} LOGIN")).await;
            let role = role.clone();
            let rows = stage.agree(&[], Doubt::OfTheRuntime).await?;
            let mut other = stage.world.plain().await;
            Postgres::execute(&mut other, format!("DROP ROLE {role}")).await.map_err(|error| error.to_string())?;
            if rows.is_empty() { Ok(()) } else { Err(format!("{rows:?}")) }
        },
    );
    report.publish("tx-guard", "rollback, cancel lost (PostgreSQL)").assert_clean();
}
