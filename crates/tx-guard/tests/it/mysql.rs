//! What MySQL and MariaDB do by themselves: roll back after a deadlock, commit before a DDL, lose a prepared statement.

use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitError, CommitOutcome, Isolation, Retry, TransactionGuard, TxError, TxPool};
use futures_util::FutureExt;
use sqlx::pool::PoolOptions;
use sqlx::{AssertSqlSafe, Connection, MySql};

use crate::commit::works_as_before;
use crate::world::{TestDb, World, eventually, mostly_within};

type Guard = TransactionGuard<MySql>;

async fn rows(world: &World<MySql>, numbers: impl IntoIterator<Item = i64>) {
    let mut conn = world.plain().await;
    for n in numbers {
        world.insert(&mut conn, n).await.unwrap();
    }
    conn.close().await.unwrap();
}

async fn update(world: &World<MySql>, tx: &mut sqlx::MySqlConnection, n: i64) -> Result<(), sqlx::Error> {
    MySql::execute(tx, format!("UPDATE {} SET v = v + 1 WHERE n = {n}", world.table)).await
}

/// Makes a transaction the victim of a deadlock: it locks row 1 and then wants row 2, and another one does the reverse.
/// InnoDB ends the one that has changed fewer rows.
async fn become_a_victim(world: &World<MySql>, tx: &mut sqlx::MySqlConnection) -> sqlx::Error {
    let mut other = world.plain().await;
    let mut other = other.begin().await.unwrap();
    for n in 2..=5 {
        update(world, &mut other, n).await.unwrap();
    }
    update(world, &mut *tx, 1).await.unwrap();
    let (ours, theirs) = tokio::join!(update(world, tx, 2), update(world, &mut other, 1));
    theirs.unwrap();
    other.rollback().await.unwrap();
    ours.unwrap_err()
}

fn number(error: &sqlx::Error) -> Option<u16> {
    let error = error.as_database_error()?.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>()?;
    Some(error.number())
}

#[tokio::test]
async fn a_deadlock_that_was_swallowed_is_no_commit() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    swallow_a_deadlock(&world, &db).await;
    world.end(db).await;
}

#[tokio::test]
async fn a_deadlock_that_was_swallowed_is_no_commit_on_a_wrapped_pool() {
    let world = World::<MySql>::new().await;
    let pool = PoolOptions::<MySql>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    swallow_a_deadlock(&world, &db).await;
    world.end(db).await;
    pool.close().await;
}

async fn swallow_a_deadlock(world: &World<MySql>, db: &TxPool<MySql>) {
    rows(world, 1..=5).await;
    for nested in [false, true] {
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        world.insert(&mut tx, 11).await.unwrap();
        let victim = if nested {
            // Forgotten, so that sqlx still counts two levels when none is left on the server.
            let mut inner = std::mem::ManuallyDrop::new(tx.begin().await.unwrap());
            become_a_victim(world, &mut inner).await
        } else {
            become_a_victim(world, &mut tx).await
        };
        assert_eq!(number(&victim), Some(1213), "{victim:?}");
        // If the session committed by itself, this row would be committed now.
        world.insert(&mut tx, 12).await.unwrap();
        let error = tx.commit().await.unwrap_err();
        assert!(matches!(error, TxError::Lost { .. }), "nested: {nested}: {error:?}");
        assert_ne!(handle.outcome().await, CommitOutcome::Committed);
        assert_eq!(world.committed().await, [1, 2, 3, 4, 5]);
    }
    works_as_before(world, db).await;
}

/// The same on plain sqlx: the commit returns Ok, the row before is lost and the row after was committed on its own.
#[tokio::test]
async fn plain_sqlx_says_ok_after_a_deadlock() {
    let world = World::<MySql>::new().await;
    rows(&world, 1..=5).await;
    let mut conn = world.plain().await;
    let mut tx = conn.begin().await.unwrap();
    world.insert(&mut tx, 11).await.unwrap();
    assert_eq!(number(&become_a_victim(&world, &mut tx).await), Some(1213));
    world.insert(&mut tx, 12).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1, 2, 3, 4, 5, 12]);
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn the_victim_of_a_deadlock_is_run_again() {
    let world = World::<MySql>::new().await;
    rows(&world, 1..=5).await;
    let db = world.pool(1).await;
    let mut attempts = 0;
    let run = db.tx().retry(Retry::default()).run(async |tx: &mut Guard| {
        attempts += 1;
        world.insert(tx, 10 + attempts).await?;
        if attempts == 1 { Err(become_a_victim(&world, tx).await.into()) } else { Ok::<_, TxError>(()) }
    });
    run.await.unwrap();
    assert_eq!(world.committed().await, [1, 2, 3, 4, 5, 12]);
    world.end(db).await;
}

/// MySQL undoes only the statement and keeps the transaction, whose rest can be committed or run again.
#[tokio::test]
async fn a_lock_that_was_waited_for_too_long_is_run_again_and_may_be_swallowed() {
    let world = World::<MySql>::new().await;
    rows(&world, 1..=2).await;
    let db = world.pool(1).await;
    let mut other = world.plain().await;
    let mut other = other.begin().await.unwrap();
    update(&world, &mut other, 1).await.unwrap();

    let impatient = "SET innodb_lock_wait_timeout = 1".to_owned();
    let mut tx = db.begin().await.unwrap();
    MySql::execute(&mut tx, impatient.clone()).await.unwrap();
    world.insert(&mut tx, 10).await.unwrap();
    assert_eq!(number(&update(&world, &mut tx, 1).await.unwrap_err()), Some(1205));
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1, 2, 10]);

    let mut attempts = 0;
    let run = db.tx().retry(Retry::attempts(2)).run(async |tx: &mut Guard| {
        attempts += 1;
        MySql::execute(tx, impatient.clone()).await?;
        update(&world, tx, 1).await?;
        Ok::<_, TxError>(())
    });
    assert_eq!(number(run.await.unwrap_err().as_sqlx().unwrap()), Some(1205));
    assert_eq!(attempts, 2);
    other.rollback().await.unwrap();
    world.end(db).await;
}

#[tokio::test]
async fn a_ddl_is_refused_but_has_committed_what_came_before_it() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    MySql::execute(&mut tx, format!("CREATE TABLE {}_b (n INT)", world.table)).await.unwrap_err();
    world.insert(&mut tx, 2).await.unwrap_err();
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
    // As documented. A temporary table commits nothing, and is allowed.
    assert_eq!(world.committed().await, [1]);
    let mut tx = db.begin().await.unwrap();
    MySql::execute(&mut tx, format!("CREATE TEMPORARY TABLE {}_b (n INT)", world.table)).await.unwrap();
    world.insert(&mut tx, 3).await.unwrap();
    tx.commit().await.unwrap();
    works_as_before(&world, &db).await;
    world.end(db).await;
}

const SETTINGS: &str = "SELECT CAST(@@innodb_lock_wait_timeout AS SIGNED)
    UNION ALL SELECT CAST(@@lock_wait_timeout AS SIGNED)";

/// Whether the limits match the rest of `seconds` when the transaction began (less on a busy machine), plus a little.
fn limits_of(seconds: i64, settings: &[i64]) -> bool {
    settings.len() == 2 && settings.iter().all(|limit| (1..=seconds + 1).contains(limit))
}

#[tokio::test]
async fn a_deadline_limits_the_session_and_the_next_transaction_has_its_own_limits() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let settings = async |tx: &mut Guard| Ok::<_, TxError>(MySql::numbers(tx, SETTINGS.to_owned()).await?);
    let before = db.tx().run(settings).await.unwrap();
    let limited = db.tx().timeout(Duration::from_secs(3)).run(settings).await.unwrap();
    assert!(limits_of(3, &limited), "{limited:?}");
    assert_eq!(db.tx().run(settings).await.unwrap(), before);
    // With another isolation level, to see that the server understands the whole message.
    let all = db.tx().isolation(Isolation::ReadCommitted).read_only().timeout(Duration::from_secs(20)).run(settings);
    let limited = all.await.unwrap();
    assert!(limits_of(20, &limited), "{limited:?}");
    db.tx().serializable().run(settings).await.unwrap();
    world.end(db).await;
}

#[tokio::test]
async fn a_wrapped_session_has_its_settings_back_however_its_transaction_ends() {
    let world = World::<MySql>::new().await;
    let options = PoolOptions::<MySql>::new().max_connections(1).after_connect(|conn, _| {
        Box::pin(async { MySql::execute(conn, "SET innodb_lock_wait_timeout = 33".to_owned()).await })
    });
    let pool = options.connect_with(world.options.clone()).await.unwrap();
    let settings = async || {
        let mut conn = pool.acquire().await.unwrap();
        // The session may write, and its write is committed at once.
        MySql::execute(&mut conn, format!("REPLACE INTO {} (n) VALUES (100)", world.table)).await.unwrap();
        assert!(world.committed().await.contains(&100));
        MySql::numbers(&mut conn, SETTINGS.to_owned()).await.unwrap()
    };
    let before = settings().await;
    assert_eq!(before[0], 33);
    let db = TxPool::wrap(pool.clone());
    let session = async || {
        let mut conn = pool.acquire().await.unwrap();
        MySql::numbers(&mut conn, "SELECT CAST(CONNECTION_ID() AS SIGNED)".to_owned()).await.unwrap()
    };
    for way in 0..6 {
        let same = session().await;
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        world.insert(&mut tx, way).await.unwrap();
        match way {
            0 => tx.commit().await.unwrap(),
            1 => tx.rollback().await.unwrap(),
            2 => drop(tx),
            3 => drop(tx.commit().now_or_never()),
            4 => {
                drop(MySql::execute(&mut tx, MySql::SLOW.to_owned()).now_or_never());
                drop(tx);
            }
            _ => {
                let is_cut = tx.begin().now_or_never().is_none();
                // The server may have been so fast that there was nothing to cut.
                assert_eq!(tx.commit().await.is_err(), is_cut);
            }
        }
        handle.outcome().await;
        assert_eq!(settings().await, before, "way {way}");
        let tx = db.tx().timeout(Duration::from_secs(20));
        let limited =
            tx.run(async |tx| Ok::<_, TxError>(MySql::numbers(tx, SETTINGS.to_owned()).await?)).await.unwrap();
        assert!(limits_of(20, &limited), "{limited:?}");
        assert_eq!(settings().await, before, "way {way}");
        if way < 3 {
            assert_eq!(session().await, same, "way {way}: it has them back because it is another one");
        }
    }
    world.end(db).await;
    pool.close().await;
}

/// Returns how long it took until the next transaction began.
async fn a_statement_dropped_while_it_is_prepared(world: &World<MySql>, db: &TxPool<MySql>, round: i64) -> Duration {
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, round).await.unwrap();
    let wide = format!("SELECT {} FROM {} WHERE n = ?", vec!["n, v"; 40].join(", "), world.table);
    // Each statement has its own text, so that each is prepared.
    let query = sqlx::query(AssertSqlSafe(format!("{wide} AND {round} = {round}"))).bind(round).fetch_all(&mut *tx);
    let moment = Duration::from_micros(20 * u64::try_from(round / 3).unwrap());
    drop(tokio::time::timeout(moment, query).await);
    let start = Instant::now();
    let committed = match round % 3 {
        0 => tx.commit().await.is_ok(),
        1 => tx.rollback().await.is_err_and(|_| false),
        _ => {
            drop(tx);
            false
        }
    };
    let told = handle.outcome().await;
    let there = world.committed().await.contains(&round);
    match told {
        CommitOutcome::Committed => assert!(committed && there, "round {round}"),
        CommitOutcome::RolledBack => assert!(!committed && !there, "round {round}"),
        _ => assert!(!committed, "round {round}"),
    }
    drop(db.begin().await.unwrap());
    start.elapsed()
}

/// sqlx loses its place in the answer when it is dropped while it prepares a statement.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_is_dropped_while_it_is_prepared_harms_nobody() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    // Less than the two seconds after which a session is given up.
    let mut rounds = 0..;
    let once = async || a_statement_dropped_while_it_is_prepared(&world, &db, rounds.next().unwrap()).await;
    mostly_within(Duration::from_millis(1_500), 60, once).await;
    works_as_before(&world, &db).await;
    world.end(db).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cancel_hits_the_next_transaction() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    for round in 0..300 {
        let mut tx = db.begin().await.unwrap();
        // The statement ends at about the time of its cancel, so the cancel often comes too late.
        drop(MySql::execute(&mut tx, "SELECT SLEEP(0.0015)".to_owned()).now_or_never());
        drop(tx);
        let mut next = db.begin().await.unwrap();
        // SLEEP returns 1 if it was interrupted.
        let interrupted = MySql::numbers(&mut next, "SELECT CAST(SLEEP(0.0005) AS SIGNED)".to_owned()).await;
        assert_eq!(interrupted.unwrap_or_else(|error| panic!("{round}: {error}")), [0], "{round}");
        next.commit().await.unwrap_or_else(|error| panic!("{round}: {error}"));
    }
    world.end(db).await;
}

#[tokio::test]
async fn a_session_that_was_killed_while_idle_is_replaced() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    let id: u64 = sqlx::query_scalar("SELECT CONNECTION_ID()").fetch_one(&mut *tx).await.unwrap();
    tx.rollback().await.unwrap();
    world.run(format!("KILL CONNECTION {id}")).await;
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// A global read lock keeps every COMMIT waiting, but no longer than its session waits for locks.
#[tokio::test]
async fn a_commit_that_has_waited_too_long_is_a_rollback() {
    let world = World::<MySql>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    MySql::execute(&mut tx, "SET SESSION lock_wait_timeout = 1".to_owned()).await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let mut other = world.plain().await;
    MySql::execute(&mut other, "FLUSH TABLES WITH READ LOCK".to_owned()).await.unwrap();
    let handle = tx.outcome_handle();
    let failed = tx.commit().await.unwrap_err();
    MySql::execute(&mut other, "UNLOCK TABLES".to_owned()).await.unwrap();
    other.close().await.unwrap();
    let why = std::error::Error::source(&failed).map(ToString::to_string).unwrap_or_default();
    assert!(!failed.is_unknown() && why.contains("Lock wait timeout"), "{failed}: {why}");
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert_eq!(world.committed().await, [0_i64; 0]);
    world.end(db).await;
}

/// A global read lock keeps every COMMIT waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_waits_is_handed_over_and_one_that_is_killed_is_in_doubt() {
    let world = World::<MySql>::new().await;
    let db = world.pool(2).await;
    for kill in [false, true] {
        let mut tx = db.begin().await.unwrap();
        let id: u64 = sqlx::query_scalar("SELECT CONNECTION_ID()").fetch_one(&mut *tx).await.unwrap();
        world.insert(&mut tx, i64::from(kill)).await.unwrap();
        let mut other = world.plain().await;
        MySql::execute(&mut other, "FLUSH TABLES WITH READ LOCK".to_owned()).await.unwrap();
        let handle = tx.outcome_handle();
        let commit = tokio::spawn(tx.commit_within(Duration::from_millis(200)));
        eventually("the commit waits for the lock", async || {
            let waits = format!(
                "SELECT CAST(count(*) AS SIGNED) FROM information_schema.processlist
                 WHERE id = {id} AND state LIKE 'Waiting for %'"
            );
            MySql::numbers(&mut other, waits).await.unwrap() == [1]
        })
        .await;
        if kill {
            MySql::execute(&mut other, format!("KILL CONNECTION {id}")).await.unwrap();
            let failed = commit.await.unwrap().unwrap_err();
            let in_doubt = failed.is_pending() || matches!(&failed, CommitError::Failed(error) if error.is_unknown());
            assert!(in_doubt, "{failed:?}");
            assert_eq!(handle.outcome().await, CommitOutcome::Unknown);
        } else {
            assert!(commit.await.unwrap().unwrap_err().is_pending());
        }
        MySql::execute(&mut other, "UNLOCK TABLES".to_owned()).await.unwrap();
        other.close().await.unwrap();
        if !kill {
            assert_eq!(handle.outcome().await, CommitOutcome::Committed);
        }
    }
    // The killed transaction may have been committed all the same.
    assert!([vec![0], vec![0, 1]].contains(&world.committed().await));
    world.end(db).await;
}
