//! What a session of PostgreSQL is between two transactions, and what its next user finds.

use std::time::Duration;

use cancel_safe_tx_guard::{Reset, TxPool};
use futures_util::FutureExt;
use sqlx::{AssertSqlSafe, Connection, Postgres};
use tokio::time::sleep;

use crate::proxy::{Fault, Proxy, ServerDb};
use crate::silence::within;
use crate::world::{TestDb, World, eventually};

/// A pool of one session, whose server knows it by the name of the table.
async fn pool(world: &World<Postgres>, reset: Reset) -> TxPool<Postgres> {
    let options = world.options.clone().application_name(&world.table);
    TxPool::builder().max_connections(1).reset(reset).connect_with(options).await.unwrap()
}

/// What the server says of the sessions of that pool.
async fn states(world: &World<Postgres>) -> Vec<String> {
    let mut conn = world.plain().await;
    let sql = format!("SELECT state FROM pg_stat_activity WHERE application_name = '{}'", world.table);
    let states = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut conn).await.unwrap();
    conn.close().await.unwrap();
    states
}

async fn inserts(world: &World<Postgres>, db: &TxPool<Postgres>, n: i64) {
    let mut tx = within(db.begin()).await.unwrap();
    world.insert(&mut tx, n).await.unwrap();
    within(tx.commit()).await.unwrap();
}

async fn rests(db: &TxPool<Postgres>) {
    eventually("nothing is in use", async || {
        let now = db.metrics();
        (now.in_use, now.settling) == (0, 0)
    })
    .await;
}

#[track_caller]
fn is_the_first(db: &TxPool<Postgres>) {
    let now = db.metrics();
    assert_eq!((now.opened, now.closed_failed, now.terminated), (1, 0, 0), "{now:?}");
}

#[tokio::test]
async fn a_reader_that_is_dropped_before_it_is_ready_keeps_its_session() {
    let world = World::<Postgres>::new().await;
    let db = pool(&world, Reset::Verify).await;
    for idle in [Duration::ZERO, Duration::from_millis(1_100)] {
        inserts(&world, &db, db.metrics().committed.try_into().unwrap()).await;
        rests(&db).await;
        sleep(idle).await;
        assert!(db.reader().now_or_never().is_none(), "it waits for an answer");
        rests(&db).await;
    }
    is_the_first(&db);
    world.end(db).await;
}

#[tokio::test]
async fn a_reader_that_reads_nothing_yet_is_in_no_transaction() {
    let world = World::<Postgres>::new().await;
    let db = pool(&world, Reset::Verify).await;
    inserts(&world, &db, 0).await;
    let reader = within(db.reader()).await.unwrap();
    assert!(!states(&world).await.contains(&"idle in transaction".to_owned()));
    drop(reader);
    rests(&db).await;
    is_the_first(&db);
    world.end(db).await;
}

/// As by a cancel that comes when the commit is done.
#[tokio::test]
async fn a_session_whose_last_rollback_failed_is_in_no_transaction() {
    for reset in [Reset::Verify, Reset::None] {
        let world = World::<Postgres>::new().await;
        let proxy = Proxy::open(Postgres::address(&world.options)).await;
        let through = Postgres::through(world.options.clone(), proxy.port);
        let db = TxPool::builder().max_connections(1).reset(reset).connect_with(through).await.unwrap();
        inserts(&world, &db, 0).await;
        proxy.arm(Fault::SpoiltRollback);
        inserts(&world, &db, 1).await;
        let mut reader = within(db.reader()).await.unwrap();
        let sql = format!("SELECT n FROM {} ORDER BY n", world.table);
        assert_eq!(Postgres::numbers(&mut reader, sql).await.unwrap(), [0, 1], "{reset:?}");
        drop(reader);
        inserts(&world, &db, 2).await;
        assert_eq!(world.committed().await, [0, 1, 2]);
        world.end(db).await;
    }
}

#[tokio::test]
async fn a_session_that_listens_is_used_on() {
    let world = World::<Postgres>::new().await;
    let db = pool(&world, Reset::Verify).await;
    let notify = async || world.run(format!("NOTIFY {}", world.table)).await;
    let mut tx = within(db.begin()).await.unwrap();
    Postgres::execute(&mut tx, format!("LISTEN {}", world.table)).await.unwrap();
    within(tx.commit()).await.unwrap();
    rests(&db).await;
    for n in 0..3 {
        // Told while it is idle, and in the middle of a transaction.
        notify().await;
        let tx = within(db.begin()).await.unwrap();
        notify().await;
        within(tx.rollback()).await.unwrap();
        notify().await;
        inserts(&world, &db, n).await;
        notify().await;
        let mut reader = within(db.reader()).await.unwrap();
        notify().await;
        sqlx::query("SELECT 1").execute(&mut *reader).await.ok();
        drop(reader);
        rests(&db).await;
    }
    is_the_first(&db);
    world.end(db).await;
}

#[tokio::test]
async fn a_transaction_that_a_reader_has_left_open_ends_with_it() {
    for reset in [Reset::Verify, Reset::None] {
        let world = World::<Postgres>::new().await;
        let db = pool(&world, reset).await;
        for sql in ["BEGIN", "BEGIN; SELECT 1", "BEGIN; SELECT 1/0"] {
            let mut reader = within(db.reader()).await.unwrap();
            Postgres::execute(&mut reader, sql.to_owned()).await.ok();
            drop(reader);
            rests(&db).await;
            let states = states(&world).await;
            assert!(!states.iter().any(|state| state.contains("in transaction")), "{sql}: {states:?}");
            let mut reader = within(db.reader()).await.unwrap();
            assert_eq!(Postgres::numbers(&mut reader, "SELECT 1::bigint".to_owned()).await.unwrap(), [1], "{sql}");
        }
        world.end(db).await;
    }
}

#[tokio::test]
async fn a_commit_is_known_although_somebody_has_changed_the_question_for_the_state() {
    let world = World::<Postgres>::new().await;
    let db = pool(&world, Reset::Verify).await;
    for n in 0..2 {
        let mut tx = within(db.begin()).await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        let replace = "DEALLOCATE txg_state; PREPARE txg_state AS SELECT 1 AS other; SET search_path = elsewhere";
        Postgres::execute(&mut tx, replace.to_owned()).await.unwrap();
        within(tx.commit()).await.unwrap();
        let tx = within(db.begin()).await.unwrap();
        within(tx.rollback()).await.unwrap();
    }
    let mut reader = within(db.reader()).await.unwrap();
    let path: String =
        sqlx::query_scalar("SELECT current_setting('search_path')").fetch_one(&mut *reader).await.unwrap();
    assert_ne!(path, "elsewhere");
    drop(reader);
    world.end(db).await;
}

#[tokio::test]
async fn a_session_stays_read_only_outside_transactions_whatever_a_reader_resets() {
    let world = World::<Postgres>::new().await;
    let db = pool(&world, Reset::Verify).await;
    for sql in ["DISCARD ALL", "RESET ALL", "SET default_transaction_read_only = off"] {
        let mut reader = within(db.reader()).await.unwrap();
        Postgres::execute(&mut reader, sql.to_owned()).await.unwrap();
        drop(reader);
        rests(&db).await;
        let insert = format!("INSERT INTO {} (n) VALUES (1)", world.table);
        sqlx::query(AssertSqlSafe(insert)).execute(&db).await.unwrap_err();
        rests(&db).await;
    }
    assert_eq!(world.committed().await, Vec::<i64>::new());
    world.end(db).await;
}
