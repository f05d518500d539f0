//! What one transaction changes in its session, and what the next one finds there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cancel_safe_tx_guard::{Reset, TransactionGuard, TxError, TxPool, TxPoolBuilder};
use sqlx::{AssertSqlSafe, MySql, Postgres, Sqlite};

use crate::silence::within;
use crate::world::{TestDb, World, eventually};

fn one<D: TestDb>() -> TxPoolBuilder<D> {
    TxPool::<D>::builder().max_connections(1)
}

/// How a transaction ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Commit,
    Rollback,
    Drop,
}

const ENDS: [End; 3] = [End::Commit, End::Rollback, End::Drop];

async fn end<D: TestDb>(tx: TransactionGuard<D>, end: End) {
    match end {
        End::Commit => within(tx.commit()).await.unwrap(),
        End::Rollback => within(tx.rollback()).await.unwrap(),
        End::Drop => drop(tx),
    }
}

/// Runs SQL in one transaction.
async fn run<D: TestDb>(db: &TxPool<D>, sql: &str, ending: End) {
    let mut tx = within(db.begin()).await.unwrap();
    D::execute(&mut tx, sql.to_owned()).await.unwrap();
    end(tx, ending).await;
}

/// Reads one text in the next one.
async fn next(db: &TxPool<Postgres>, sql: &str) -> String {
    let mut tx = within(db.begin()).await.unwrap();
    let read = sqlx::query_scalar(AssertSqlSafe(format!("SELECT coalesce(({sql})::text, '')"))).fetch_one(&mut *tx);
    let read = read.await.unwrap();
    tx.commit().await.unwrap();
    read
}

async fn setting(db: &TxPool<Postgres>, name: &str) -> String {
    next(db, &format!("current_setting('{name}', true)")).await
}

const LOCKS: &str = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()";

#[tokio::test]
async fn what_a_session_has_become_is_reset_however_its_transaction_ends() {
    let world = World::<Postgres>::new().await;
    let db = one().connect_with(world.options.clone()).await.unwrap();
    let path = setting(&db, "search_path").await;
    for ending in ENDS {
        let mut tx = within(db.begin()).await.unwrap();
        // Outside the transaction, so that a rollback does not undo it.
        let settings = "SELECT pg_advisory_lock(42); SET app.tenant = 'a'; SET search_path = tenant;
            SET work_mem = '5MB'; SET default_transaction_read_only = off";
        for sql in ["CREATE TEMP TABLE mine (n int)", "COMMIT", settings, "BEGIN"] {
            Postgres::execute(&mut tx, sql.to_owned()).await.unwrap();
        }
        end(tx, ending).await;
        assert_eq!(next(&db, LOCKS).await, "0");
        assert_eq!(setting(&db, "app.tenant").await, "");
        assert_eq!(setting(&db, "search_path").await, path);
        assert_ne!(setting(&db, "work_mem").await, "5MB");
        assert_eq!(next(&db, "to_regclass('pg_temp.mine')").await, "");
        // The pool's own settings are restored.
        assert_eq!(setting(&db, "default_transaction_read_only").await, "on");
    }
    assert_eq!(db.metrics().opened, 1, "a session that was reset need not be closed");
    world.end(db).await;
}

#[tokio::test]
async fn what_is_not_compared_stays_and_costs_no_session() {
    let world = World::<Postgres>::new().await;
    let db = one().connect_with(world.options.clone()).await.unwrap();
    let before = next(&db, "pg_backend_pid()").await;
    run(&db, "SET work_mem = '5MB'", End::Commit).await;
    run(&db, "SET LOCAL search_path = tenant; SET LOCAL app.tenant = 'a'; SET LOCAL ROLE pg_monitor", End::Commit)
        .await;
    run(&db, "SET search_path = tenant; SET app.tenant = 'a'", End::Rollback).await;
    assert_eq!(setting(&db, "work_mem").await, "5MB");
    assert_eq!(next(&db, "pg_backend_pid()").await, before);
    world.end(db).await;
}

#[tokio::test]
async fn a_session_that_is_as_it_was_costs_no_message_of_its_own() {
    let world = World::<Postgres>::new().await;
    let db = one().connect_with(world.options.clone()).await.unwrap();
    let pid = next(&db, "pg_backend_pid()").await;
    let mut beside = world.plain().await;
    for ending in [End::Commit, End::Rollback] {
        run(&db, "SELECT 1", ending).await;
        eventually("the session is idle", async || db.metrics().idle == 1).await;
        let last = format!("SELECT query FROM pg_stat_activity WHERE pid = {pid}");
        let last: String = sqlx::query_scalar(AssertSqlSafe(last)).fetch_one(&mut beside).await.unwrap();
        // The last statement was the end of the transaction.
        assert!(last.contains("COMMIT AND CHAIN") || last.contains("ROLLBACK"), "{ending:?}: {last}");
    }
    world.end(db).await;
}

#[tokio::test]
async fn what_a_reader_has_made_of_its_session_is_reset() {
    let world = World::<Postgres>::new().await;
    let db = one().connect_with(world.options.clone()).await.unwrap();
    let path = setting(&db, "search_path").await;
    let mut reader = within(db.reader()).await.unwrap();
    sqlx::raw_sql("SET search_path = tenant").execute(&mut *reader).await.unwrap();
    drop(reader);
    assert_eq!(setting(&db, "search_path").await, path);
    world.end(db).await;
}

#[tokio::test]
async fn a_setting_that_is_named_is_compared() {
    let world = World::<Postgres>::new().await;
    let db = one().verify(["app.tenant", "app.other"]).connect_with(world.options.clone()).await.unwrap();
    let before = next(&db, "pg_backend_pid()").await;
    // Afterwards the setting is empty, although it did not exist before.
    run(&db, "SET LOCAL app.tenant = 'a'; SET LOCAL work_mem = '6MB'", End::Commit).await;
    run(&db, "SET work_mem = '5MB'", End::Commit).await;
    assert_eq!(setting(&db, "work_mem").await, "5MB");
    run(&db, "SET app.tenant = 'a'", End::Commit).await;
    assert_eq!(setting(&db, "app.tenant").await, "");
    assert_ne!(setting(&db, "work_mem").await, "5MB");
    assert_eq!(next(&db, "pg_backend_pid()").await, before, "it was mended, not closed");
    world.end(db).await;
}

#[tokio::test]
async fn a_role_is_given_up() {
    let world = World::<Postgres>::new().await;
    let db = one().connect_with(world.options.clone()).await.unwrap();
    let before = next(&db, "current_user").await;
    run(&db, "SET ROLE pg_monitor", End::Commit).await;
    assert_eq!(next(&db, "current_user").await, before);
    run(&db, "SET SESSION AUTHORIZATION pg_monitor", End::Commit).await;
    assert_eq!(next(&db, "session_user").await, before);
    world.end(db).await;
}

#[tokio::test]
async fn somebody_who_waits_for_the_session_finds_it_as_it_was() {
    let world = World::<Postgres>::new().await;
    let db = one().connect_with(world.options.clone()).await.unwrap();
    let (path, before) = (setting(&db, "search_path").await, next(&db, "pg_backend_pid()").await);
    for ending in ENDS {
        for changed in [true, false] {
            let mut tx = db.begin().await.unwrap();
            let waiting = tokio::spawn({
                let db = db.clone();
                async move {
                    let read = format!("concat_ws('/', current_setting('search_path'), ({LOCKS}), pg_backend_pid())");
                    next(&db, &read).await
                }
            });
            eventually("it waits", async || format!("{db:?}").contains("waiting: 1")).await;
            if changed {
                for sql in ["COMMIT", "SELECT pg_advisory_lock(42); SET search_path = tenant", "BEGIN"] {
                    Postgres::execute(&mut tx, sql.to_owned()).await.unwrap();
                }
            }
            end(tx, ending).await;
            assert_eq!(within(waiting).await.unwrap(), format!("{path}/0/{before}"), "{ending:?}, {changed}");
        }
    }
    world.end(db).await;
}

/// With whatever its hook has set.
#[tokio::test]
async fn a_session_can_be_reset_each_time() {
    let world = World::<Postgres>::new().await;
    let readied = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&readied);
    let db = one::<Postgres>().reset(Reset::Discard).after_connect(move |conn| {
        count.fetch_add(1, Ordering::SeqCst);
        Box::pin(Postgres::execute(conn, "SET app.tenant = 'everybody'".to_owned()))
    });
    let db = db.connect_with(world.options.clone()).await.unwrap();
    for n in 1..4 {
        run(&db, "SET work_mem = '5MB'; SET app.tenant = 'a'", End::Commit).await;
        assert_ne!(setting(&db, "work_mem").await, "5MB");
        assert_eq!(setting(&db, "app.tenant").await, "everybody");
        assert!(readied.load(Ordering::SeqCst) > n);
    }
    // The statements that sqlx has prepared can still be used.
    for _ in 0..3 {
        let mut tx = within(db.begin()).await.unwrap();
        let one: i32 = sqlx::query_scalar("SELECT $1").bind(1_i32).fetch_one(&mut *tx).await.unwrap();
        assert_eq!(one, 1);
        tx.commit().await.unwrap();
    }
    world.end(db).await;
}

/// As behind `DISCARD ALL`, which some hooks run.
#[tokio::test]
async fn a_session_whose_prepared_statements_are_gone_is_kept_and_still_compared() {
    let world = World::<Postgres>::new().await;
    let db = one::<Postgres>().connect_with(world.options.clone()).await.unwrap();
    for ending in ENDS {
        run(&db, "DEALLOCATE ALL", ending).await;
        eventually("the session is idle", async || db.metrics().idle == 1).await;
        let mut tx = within(db.begin()).await.unwrap();
        // sqlx does not know that its own statements are gone, so this must not be one of them.
        Postgres::execute(&mut tx, "SET search_path = tenant; SELECT pg_advisory_lock(42)".to_owned()).await.unwrap();
        tx.commit().await.unwrap();
        eventually("the session is idle", async || db.metrics().idle == 1).await;
        let mut tx = within(db.begin()).await.unwrap();
        let look = format!("SELECT 1 WHERE current_setting('search_path') <> 'tenant' AND ({LOCKS}) = 0");
        let rows = sqlx::raw_sql(AssertSqlSafe(look)).fetch_all(&mut *tx).await.unwrap();
        assert_eq!(rows.len(), 1, "{ending:?}");
        tx.commit().await.unwrap();
    }
    assert_eq!(db.metrics().opened, 1);
    world.end(db).await;
}

#[tokio::test]
async fn a_question_that_somebody_else_has_prepared_is_replaced() {
    let world = World::<Postgres>::new().await;
    let always_the_same = "PREPARE txg_state AS SELECT 'always the same' AS txg_state";
    let db = one::<Postgres>()
        .verify(["app.tenant"])
        .after_connect(move |conn| Box::pin(Postgres::execute(conn, always_the_same.to_owned())));
    let db = db.connect_with(world.options.clone()).await.unwrap();
    run(&db, "SET app.tenant = 'a'", End::Commit).await;
    assert_eq!(setting(&db, "app.tenant").await, "");
    world.end(db).await;
}

#[tokio::test]
async fn a_session_can_be_left_as_it_is() {
    let world = World::<Postgres>::new().await;
    let db = one().reset(Reset::None).connect_with(world.options.clone()).await.unwrap();
    run(&db, "SET search_path = tenant; SELECT pg_advisory_lock(42)", End::Commit).await;
    assert_eq!(setting(&db, "search_path").await, "tenant");
    assert_eq!(next(&db, LOCKS).await, "1");
    world.end(db).await;
}

async fn id(db: &TxPool<MySql>) -> i64 {
    let mut tx = within(db.begin()).await.unwrap();
    let ids = MySql::numbers(&mut tx, "SELECT CAST(CONNECTION_ID() AS SIGNED)".to_owned()).await.unwrap();
    tx.commit().await.unwrap();
    ids[0]
}

#[tokio::test]
async fn a_session_of_mysql_that_has_become_another_is_closed() {
    let world = World::<MySql>::new().await;
    let db = one().verify(["time_zone", "@tenant"]).connect_with(world.options.clone()).await.unwrap();
    let mut before = id(&db).await;
    for ending in ENDS {
        for sql in ["USE information_schema", "SET time_zone = '+05:00'", "SET @tenant = 'a'"] {
            run(&db, sql, ending).await;
            let after = id(&db).await;
            assert_ne!(after, before, "{sql}");
            before = after;
        }
        for sql in ["SET @other = 'a'", "SET SESSION wait_timeout = 20000"] {
            run(&db, sql, ending).await;
            assert_eq!(id(&db).await, before, "{sql}");
        }
        let lock = format!("DO GET_LOCK('{}', 0)", world.table);
        run(&db, &lock, ending).await;
        let mut other = world.plain().await;
        let free = format!("SELECT CAST(IS_FREE_LOCK('{}') AS SIGNED)", world.table);
        eventually("the lock is released", async || MySql::numbers(&mut other, free.clone()).await.unwrap() == [1])
            .await;
        assert_eq!(id(&db).await, before, "a lock was released, not the session closed");
    }
    world.end(db).await;
}

#[tokio::test]
async fn a_session_of_mysql_that_is_to_be_reset_each_time_is_closed() {
    let world = World::<MySql>::new().await;
    let db = one().reset(Reset::Discard).connect_with(world.options.clone()).await.unwrap();
    let before = id(&db).await;
    assert_ne!(id(&db).await, before);
    world.end(db).await;
}

#[tokio::test]
async fn a_database_in_memory_is_kept_whatever_is_asked_for() {
    for reset in [Reset::Verify, Reset::Discard, Reset::None] {
        let db = one::<Sqlite>().reset(reset).connect("sqlite::memory:").await.unwrap();
        run(&db, "CREATE TABLE t (n INTEGER)", End::Commit).await;
        run(&db, "INSERT INTO t VALUES (1)", End::Commit).await;
        assert!(db.close(Duration::from_secs(10)).await.is_clean());
    }
}

#[tokio::test]
async fn a_name_that_is_none_is_refused() {
    let builder = TxPool::<Sqlite>::builder().verify(["app.tenant", "x'; DROP TABLE t; --"]);
    let error = builder.connect("sqlite::memory:").await.unwrap_err();
    assert!(matches!(error, TxError::InvalidOption { option: "verify", .. }), "{error:?}");
}

/// If no caller waits for a session, a separate message asks it after the commit.
#[tokio::test]
async fn what_a_session_has_become_is_reset_on_a_pool_with_room_as_well() {
    const SESSIONS: usize = 4;
    let world = World::<Postgres>::new().await;
    let builder = TxPool::<Postgres>::builder().max_connections(4).verify(["app.tenant"]);
    let db = builder.connect_with(world.options.clone()).await.unwrap();
    let mut beside = world.plain().await;
    for (key, ending) in (0..).zip(ENDS) {
        // The key belongs to this run alone, whoever else uses the server.
        let key = i64::from(std::process::id()) << 8 | key;
        let settings = format!("SELECT pg_advisory_lock({key}); SET app.tenant = 'a'");
        let mut tx = within(db.begin()).await.unwrap();
        for sql in ["COMMIT", &settings, "BEGIN"] {
            Postgres::execute(&mut tx, sql.to_owned()).await.unwrap();
        }
        end(tx, ending).await;
        let free =
            format!("SELECT CASE WHEN pg_try_advisory_lock({key}) AND pg_advisory_unlock({key}) THEN 1 ELSE 0 END");
        eventually("the lock of a session is free", async || {
            let free: i32 = sqlx::query_scalar(AssertSqlSafe(free.clone())).fetch_one(&mut beside).await.unwrap();
            free == 1
        })
        .await;
        // All sessions at once, so that the one in question is among them.
        let mut all = Vec::new();
        for _ in 0..SESSIONS {
            all.push(within(db.begin()).await.unwrap());
        }
        for mut tx in all {
            let tenant = "SELECT coalesce(current_setting('app.tenant', true), '')";
            let tenant: String = sqlx::query_scalar(tenant).fetch_one(&mut *tx).await.unwrap();
            assert_eq!(tenant, "");
            tx.commit().await.unwrap();
        }
    }
    world.end(db).await;
}

#[tokio::test]
async fn closing_a_pool_waits_for_the_sessions_that_are_looked_over() {
    let world = World::<Postgres>::new().await;
    let looked_over = Arc::new(AtomicUsize::new(0));
    let builder = TxPool::<Postgres>::builder().max_connections(2).after_release({
        let looked_over = Arc::clone(&looked_over);
        move |_| {
            let looked_over = Arc::clone(&looked_over);
            Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                looked_over.fetch_add(1, Ordering::SeqCst);
                Ok(true)
            })
        }
    });
    let db = builder.connect_with(world.options.clone()).await.unwrap();
    run(&db, "SELECT 1", End::Commit).await;
    let report = within(db.close(Duration::from_secs(30))).await;
    assert!(report.is_clean(), "{report}");
    assert_eq!(looked_over.load(Ordering::SeqCst), 1);
    world.end(db).await;
}
