//! Runs on PostgreSQL, dropped at every await point, and the job completed by another worker.

use std::time::Duration;

use cancel_safe_resumable::{PgStore, TaskError};
use cancel_safe_testing::{Explore, Report};
use futures_util::TryStreamExt;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::postgres::world::{POSTGRES, World, assert_complete, numbers, pool, url, work};

const ITEMS: u64 = 2;
const PATIENCE: Duration = Duration::from_secs(60);

/// A store with its own sessions: an operation's sessions may have ended with its runtime, and then its leases lapse.
fn store(world: &World) -> PgStore {
    let store = PgStore::new(pool(&url(POSTGRES), 2)).schema(&world.schema).range_items(2);
    store.lease(Duration::from_secs(2)).tolerate_lost(100)
}

/// Drops an operation at every point, lets another worker complete the job, and looks for missing or doubled results.
///
/// The tables are made at the first point, and the job at each: how tables are made is explored with the keeper.
fn explore(operation: impl AsyncFn(&World) -> Result<(), TaskError>) -> Report {
    let schema = World::name();
    let report = Explore::new().budgets([]).hang_after(PATIENCE).timeout(6 * PATIENCE).run(
        async || {
            let world = World::named(&schema);
            let afresh = "CREATE SCHEMA IF NOT EXISTS {s}_beside;
                CREATE TABLE IF NOT EXISTS {s}_beside.effect (n bigint); TRUNCATE {s}_beside.effect;
                DO $$ BEGIN IF to_regclass('{s}.job') IS NOT NULL THEN DELETE FROM {s}.job; END IF; END $$";
            world.run(afresh).await;
            world
        },
        &operation,
        async |world, _| {
            // As if the lease of a worker without its runtime had expired. At worst, a worker that gives its range back
            // is fenced.
            let lapse = "DO $$ BEGIN IF to_regclass('{s}.range') IS NOT NULL THEN
                UPDATE {s}.range SET lease_until = 'epoch' WHERE lease_until IS NOT NULL; END IF; END $$";
            world.run(lapse).await;
            operation(world).await.map_err(|error| format!("started again: {error}"))?;
            work(numbers(store(world)), ITEMS).await.map_err(|error| format!("by another: {error}"))?;
            assert_complete(&store(world), ITEMS).await;
            let doubled = "SELECT count(*) - count(DISTINCT n) FROM {s}_beside.effect";
            let doubled = world.number(doubled).await;
            if doubled == 0 { Ok(()) } else { Err(format!("{doubled} effects are there twice")) }
        },
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime
        .block_on(async { World::named(&schema).run("DROP SCHEMA {s}_beside CASCADE; DROP SCHEMA {s} CASCADE").await });
    report
}

#[test]
fn a_dropped_run_of_a_fleet_goes_on() {
    let report = explore(async |world| work(numbers(store(world)).concurrency(2), ITEMS).await.map(drop));
    report.publish("resumable", "Run::next on PostgreSQL").assert_clean();
}

#[test]
fn a_dropped_process_tx_goes_on_and_doubles_no_effect() {
    let report = explore(async |world| {
        let schema = &world.schema;
        let work = async |conn: &mut PgConnection, x: u64| {
            let insert = format!("INSERT INTO {schema}_beside.effect VALUES ({x})");
            sqlx::query(AssertSqlSafe(insert)).persistent(false).execute(conn).await?;
            Ok(x * 2)
        };
        numbers(store(world)).concurrency(2).process_tx(0..ITEMS, work).await.map(drop)
    });
    report.publish("resumable", "Builder::process_tx").assert_clean();
}

#[test]
fn a_dropped_reading_of_results_changes_nothing() {
    let report = explore(async |world| {
        match store(world).results::<u64>("numbers").try_for_each(async |_| Ok(())).await {
            // Nobody has worked on it yet.
            Err(TaskError::Config(_)) => Ok(()),
            other => other,
        }
    });
    report.publish("resumable", "PgResults::next").assert_clean();
}
