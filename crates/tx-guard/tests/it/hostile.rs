//! Hostile uses: outside any runtime, between two runtimes, past the deadline, against the answer.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use cancel_safe_tx_guard::{CommitMode, CommitOutcome, TxError, TxEvent, TxPool};
use futures_util::{FutureExt, StreamExt};
use sqlx::pool::PoolOptions;
use sqlx::{AssertSqlSafe, Connection, MySql, Postgres, Sqlite};
use tokio::time::timeout;

use crate::commit::works_as_before;
use crate::on_all;
use crate::world::{PATIENCE, TestDb, World, eventually};

on_all!(
    a_commit_after_the_end_of_its_runtime_tells_the_truth,
    a_nested_transaction_that_was_forgotten_harms_nobody,
    everything_ends_outside_any_runtime,
    a_closure_outside_any_runtime_is_an_error,
    a_pool_outlives_the_runtime_it_was_opened_in,
    closing_waits_for_the_hooks_and_events_of_a_dropped_commit,
    a_late_commit_whose_hook_panics_is_told,
    work_that_ends_after_its_deadline_is_not_committed,
    those_who_wait_when_the_pool_is_closed_are_told,
    a_guard_whose_runtime_has_ended_ends_on_another,
);

/// The nested transaction is committed with the whole, and the session is in order for its next user.
async fn a_nested_transaction_that_was_forgotten_harms_nobody<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for n in 1..=3 {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        std::mem::forget(tx.begin().await.unwrap());
        tx.commit().await.unwrap();
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, 10 + n).await.unwrap();
        tx.commit().await.unwrap();
    }
    assert_eq!(world.committed().await, [1, 2, 3, 11, 12, 13]);
    world.end(db).await;
}

/// Polls on a thread without a runtime; the connection's runtime is the test's.
async fn outside<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> T {
    let thread = std::thread::spawn(move || block_on(future));
    let joined = tokio::task::spawn_blocking(move || thread.join()).await.unwrap();
    joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The smallest possible executor.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(std::thread::current())).into();
    let mut context = std::task::Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::park_timeout(PATIENCE),
        }
    }
}

async fn everything_ends_outside_any_runtime<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(2).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    outside(tx.commit()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 2).await.unwrap();
    outside(tx.commit_within(PATIENCE)).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 3).await.unwrap();
    drop(timeout(Duration::from_millis(20), D::execute(&mut tx, D::SLOW.to_owned())).await);
    outside(tx.rollback()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    let insert = format!("INSERT INTO {} (n) VALUES (4)", world.table);
    // The future is created on that thread, so it need not be `Send`.
    let savepoint = move || {
        block_on(async {
            tx.savepoint(async |sp| Ok::<_, TxError>(D::execute(sp, insert).await?)).await?;
            tx.commit().await
        })
    };
    tokio::task::spawn_blocking(|| std::thread::spawn(savepoint).join().unwrap()).await.unwrap().unwrap();
    let begun = outside({
        let db = db.clone();
        async move { db.begin().await.map(drop) }
    });
    assert!(matches!(begun.await, Err(TxError::NoRuntime)));
    outside({
        let db = db.clone();
        async move { db.close(PATIENCE).await }
    })
    .await;
    assert!(matches!(db.begin().await, Err(TxError::Closed)));
    // Outside a runtime, closing does not wait.
    eventually("all are closed", async || db.metrics().size == 0).await;
    let closed = db.metrics();
    assert_eq!(closed.closed_with_pool + closed.closed_failed, closed.opened, "{closed:?}");
    assert!(closed.closed_with_pool > 0, "{closed:?}");
    assert_eq!(world.committed().await, [1, 2, 4]);
    world.end(db).await;
}

async fn a_closure_outside_any_runtime_is_an_error<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let connecting = TxPool::<D>::builder().connect_with(world.options.clone());
    let connected = outside(async move { connecting.now_or_never() }).await;
    assert!(matches!(connected, Some(Err(TxError::NoRuntime))), "{connected:?}");
    let tx = db.tx().timeout(PATIENCE);
    let ran = outside(async move { tx.run(async move |_| Ok(())).now_or_never() }).await;
    assert!(matches!(ran, Some(Err(TxError::NoRuntime))), "{ran:?}");
    world.end(db).await;
}

/// A pool in a `static`, and tests with separate runtimes.
async fn a_pool_outlives_the_runtime_it_was_opened_in<D: TestDb>() {
    let world = World::<D>::new().await;
    let options = world.options.clone();
    let insert = move |n: i64, table: &str| format!("INSERT INTO {table} (n) VALUES ({n})");
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let table = world.table.clone();
    let outlives = move || {
        let first = runtime();
        let db = first.block_on(async {
            let db = TxPool::<D>::builder().max_connections(2).connect_with(options).await.unwrap();
            let mut tx = db.begin().await.unwrap();
            D::execute(&mut tx, insert(1, &table)).await.unwrap();
            tx.commit().await.unwrap();
            db
        });
        drop(first);
        runtime().block_on(async {
            let mut tx = db.begin().await.unwrap();
            D::execute(&mut tx, insert(2, &table)).await.unwrap();
            tx.commit().await.unwrap();
            let mut tx = db.begin().await.unwrap();
            drop(timeout(Duration::from_millis(20), D::execute(&mut tx, D::SLOW.to_owned())).await);
            drop(tx);
            assert!(db.close(PATIENCE).await.is_clean());
        });
    };
    tokio::task::spawn_blocking(outlives).await.unwrap();
    assert_eq!(world.committed().await, [1, 2]);
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// It may work for a while, as long as it never has to wait, and then fail inside COMMIT.
#[tokio::test]
async fn a_session_of_a_runtime_that_has_ended_is_not_used_again() {
    let world = World::<Postgres>::new().await;
    let options = world.options.clone();
    let outlives = move || {
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let session = async |db: &TxPool<Postgres>| {
            let mut tx = db.begin().await.unwrap();
            let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
            pid
        };
        let first = runtime();
        let builder = TxPool::<Postgres>::builder().max_connections(1);
        let db = first.block_on(builder.connect_with(options)).unwrap();
        let pid = first.block_on(session(&db));
        assert_eq!(first.block_on(session(&db)), pid);
        // The rest of the commit's answer is read on the first runtime, which would take the session with it.
        first.block_on(eventually("it is at rest", async || db.metrics().idle == 1));
        drop(first);
        runtime().block_on(async {
            assert_ne!(session(&db).await, pid);
            assert_eq!((db.metrics().opened, db.metrics().closed_failed), (2, 1));
            assert!(db.close(PATIENCE).await.is_clean());
        });
    };
    tokio::task::spawn_blocking(outlives).await.unwrap();
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// Nothing is left that could wait for it, and it would hold the lock for hours.
#[tokio::test]
async fn a_slow_statement_whose_runtime_has_ended_is_interrupted_on_sqlite() {
    let world = World::<Sqlite>::new().await;
    let (options, insert) = (world.options.clone(), format!("INSERT INTO {} (n) VALUES (1)", world.table));
    let outlived = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tx = runtime.block_on(async {
            let db = TxPool::<Sqlite>::builder().max_connections(1).connect_with(options).await.unwrap();
            let mut tx = db.begin().await.unwrap();
            Sqlite::execute(&mut tx, insert).await.unwrap();
            timeout(Duration::from_millis(50), Sqlite::execute(&mut tx, Sqlite::SLOW.to_owned())).await.unwrap_err();
            tx
        });
        drop(runtime);
        let handle = tx.outcome_handle();
        drop(tx);
        handle.try_outcome()
    };
    let told = tokio::task::spawn_blocking(outlived).await.unwrap();
    assert_eq!(told, Some(CommitOutcome::RolledBack));
    // This waits for the lock.
    timeout(PATIENCE, world.insert(&mut world.plain().await, 1)).await.expect("it is still locked").unwrap();
    assert_eq!(world.committed().await, [1]);
}

/// Outside any runtime: using the ended runtime must not panic.
async fn a_commit_after_the_end_of_its_runtime_tells_the_truth<D: TestDb>() {
    let world = World::<D>::new().await;
    let (options, insert) = (world.options.clone(), format!("INSERT INTO {} (n) VALUES (1)", world.table));
    let outlived = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let tx = runtime.block_on(async {
            let db = TxPool::<D>::builder().max_connections(1).connect_with(options).await.unwrap();
            let mut tx = db.begin().await.unwrap();
            D::execute(&mut tx, insert).await.unwrap();
            tx
        });
        let handle = tx.outcome_handle();
        drop(runtime);
        let committed = block_on(tx.commit());
        (committed.is_ok(), handle.try_outcome())
    };
    let thread = std::thread::spawn(outlived);
    let (committed, told) = tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
    let rows = world.committed().await;
    match told {
        Some(CommitOutcome::Committed) => assert!(committed && rows == [1], "{rows:?}"),
        Some(CommitOutcome::RolledBack) => assert!(!committed && rows.is_empty(), "{rows:?}"),
        told => assert!(!committed && told == Some(CommitOutcome::Unknown), "{told:?}"),
    }
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// SQLite has its own thread, and an in-memory database ends with its connection.
#[test]
fn sqlite_needs_no_runtime_of_its_own() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let (db, tx) = first.block_on(async {
        let db = TxPool::<Sqlite>::builder().max_connections(1).connect("sqlite::memory:").await.unwrap();
        let mut tx = db.begin().await.unwrap();
        Sqlite::execute(&mut tx, "CREATE TABLE t (n BIGINT); INSERT INTO t VALUES (1)".to_owned()).await.unwrap();
        (db, tx)
    });
    drop(first);
    // Outside any runtime, and after its own runtime has ended.
    block_on(tx.commit()).unwrap();
    runtime().block_on(async {
        let mut tx = db.begin().await.unwrap();
        assert_eq!(Sqlite::numbers(&mut tx, "SELECT n FROM t".to_owned()).await.unwrap(), [1]);
        tx.rollback().await.unwrap();
        db.close(PATIENCE).await;
    });
}

/// Drops a commit with a hook that has begun but not ended. A commit that ends at its first poll does not count.
async fn drop_a_commit<D: TestDb, H: FnOnce() + Send + 'static>(
    world: &World<D>,
    db: &TxPool<D>,
    hook: impl Fn() -> H,
) {
    for n in 1.. {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        tx.after_commit(hook());
        if AssertUnwindSafe(tx.commit()).catch_unwind().now_or_never().is_none() {
            return;
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "a hook that takes its time is what this is about")]
async fn closing_waits_for_the_hooks_and_events_of_a_dropped_commit<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut events = db.events();
    let ran = Arc::new(AtomicBool::new(false));
    drop_a_commit(&world, &db, || {
        let ran = Arc::clone(&ran);
        move || {
            std::thread::sleep(Duration::from_millis(200));
            ran.store(true, Ordering::Release);
        }
    })
    .await;
    assert!(db.close(PATIENCE).await.is_clean());
    assert!(ran.load(Ordering::Acquire), "closed before the hook has run");
    assert_eq!(events.next().now_or_never(), Some(Some(TxEvent::LateOutcome(CommitOutcome::Committed))));
    world.end(db).await;
}

async fn a_late_commit_whose_hook_panics_is_told<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut events = db.events();
    drop_a_commit(&world, &db, || || panic!("on purpose")).await;
    let event = timeout(PATIENCE, events.next()).await.expect("it is told");
    assert_eq!(event, Some(TxEvent::LateOutcome(CommitOutcome::Committed)));
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// The thread was busy, so no timeout could fire.
#[expect(clippy::disallowed_methods, reason = "a thread that is kept busy is what this is about")]
async fn work_that_ends_after_its_deadline_is_not_committed<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let limit = Duration::from_secs(2);
    let insert = format!("INSERT INTO {} (n) VALUES (1)", world.table);
    let ran = db.tx().timeout(limit).run(async move |tx| {
        D::execute(tx, insert.clone()).await?;
        std::thread::sleep(limit);
        Ok(())
    });
    let error = ran.await.unwrap_err();
    assert!(matches!(error, TxError::Timeout { .. }), "{error:?}");
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn those_who_wait_when_the_pool_is_closed_are_told<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let held = db.begin().await.unwrap();
    let waiting = Arc::new(AtomicU32::new(0));
    let waiters: Vec<_> = (0..8)
        .map(|_| {
            let (db, waiting) = (db.clone(), Arc::clone(&waiting));
            tokio::spawn(async move {
                let mut begin = std::pin::pin!(db.begin());
                assert!((&mut begin).now_or_never().is_none());
                waiting.fetch_add(1, Ordering::Relaxed);
                begin.await.map(drop)
            })
        })
        .collect();
    eventually("all wait", async || waiting.load(Ordering::Relaxed) == 8).await;
    assert_eq!(db.close(Duration::from_millis(50)).await.in_use, 1);
    for waiter in waiters {
        let begun = timeout(PATIENCE, waiter).await.expect("it is told").unwrap();
        assert!(matches!(begun, Err(TxError::Closed)), "{begun:?}");
    }
    drop(held);
    world.end(db).await;
}

/// Its connection is useless by then, except on SQLite.
async fn a_guard_whose_runtime_has_ended_ends_on_another<D: TestDb>() {
    let world = World::<D>::new().await;
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (options, table) = (world.options.clone(), world.table.clone());
    let ends = move || {
        for n in 1..=3 {
            let first = runtime();
            let (db, tx) = first.block_on(async {
                let db = TxPool::<D>::builder().max_connections(2).connect_with(options.clone()).await.unwrap();
                let mut tx = db.begin().await.unwrap();
                D::execute(&mut tx, format!("INSERT INTO {table} (n) VALUES ({n})")).await.unwrap();
                (db, tx)
            });
            drop(first);
            let handle = tx.outcome_handle();
            runtime().block_on(async {
                let committed = match n {
                    1 => tx.commit().await.is_ok(),
                    2 => tx.commit_within(PATIENCE).await.is_ok(),
                    _ => tx.rollback().await.is_err_and(|_| false),
                };
                assert_eq!(handle.outcome().await == CommitOutcome::Committed, committed, "{n}");
                assert!(db.close(PATIENCE).await.is_clean());
            });
        }
    };
    tokio::task::spawn_blocking(ends).await.unwrap();
    assert!(!world.committed().await.contains(&3));
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn no_number_of_connections_is_too_large_to_be_refused() {
    for many in [u32::MAX, 1 << 31, 1 << 20] {
        let pool = TxPool::<Sqlite>::builder().max_connections(many).connect("sqlite::memory:").await;
        assert!(matches!(pool, Err(TxError::InvalidOption { option: "max_connections", .. })), "{many}: {pool:?}");
    }
    for limit in [Duration::ZERO, Duration::MAX] {
        let builder = TxPool::<Sqlite>::builder().acquire_timeout(limit).connect_timeout(Duration::MAX);
        let db = builder.connect("sqlite::memory:").await.unwrap();
        db.begin().await.unwrap().commit_within(Duration::MAX).await.unwrap();
        db.tx().timeout(Duration::MAX).run(async |_| Ok::<_, TxError>(())).await.unwrap();
        assert!(db.close(Duration::MAX).await.is_clean());
    }
}

/// After a COPY that was dropped halfway sqlx is one answer behind, so COMMIT gets the answer to the statements before
/// it.
#[tokio::test]
async fn the_answer_to_another_message_is_no_commit() {
    let world = World::<Postgres>::new().await;
    world.run(format!("ALTER TABLE {} ADD UNIQUE (v) DEFERRABLE INITIALLY DEFERRED", world.table)).await;
    for mode in [CommitMode::Verified, CommitMode::Resolvable] {
        for read in 0..6 {
            let db = world.pool(1).await;
            let mut tx = db.begin().await.unwrap();
            tx.set_commit_mode(mode);
            let handle = tx.outcome_handle();
            let mut copy = tx.copy_out_raw("COPY (SELECT generate_series(1, 3)) TO STDOUT").await.unwrap();
            for _ in 0..read {
                drop(copy.next().await);
            }
            drop(copy);
            // The two rows have the same v, which is noticed only at COMMIT.
            for n in 1..=2 {
                let sql = format!("SELECT 7, 8; INSERT INTO {} (n) VALUES ({n}), (10 + {n})", world.table);
                drop(sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *tx).await);
            }
            let committed = tx.commit().await;
            assert!(committed.is_err(), "{mode:?}, {read} read");
            assert_ne!(handle.outcome().await, CommitOutcome::Committed, "{mode:?}, {read} read");
            works_as_before(&world, &db).await;
            assert_eq!(world.committed().await, [77]);
            world.run(format!("DELETE FROM {}", world.table)).await;
            assert!(db.close(PATIENCE).await.is_clean());
        }
    }
    world.run(format!("DROP TABLE {}", world.table)).await;
}
/// A password with a slash in it leads to the host `user`, and its rest is a part of the database's name.
#[tokio::test]
async fn a_url_with_a_password_that_is_not_encoded_is_refused_without_it() {
    for url in ["postgres://user:12/secret@127.0.0.1/db", "postgres://user:se/secret@127.0.0.1/db?a=b"] {
        let error = TxPool::<Postgres>::connect(url).await.unwrap_err();
        assert!(matches!(error, TxError::InvalidUrl { .. }), "{error:?}");
        assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
    }
    let error = TxPool::<MySql>::connect("mysql://user:12/secret@127.0.0.1/db").await.unwrap_err();
    assert!(matches!(error, TxError::InvalidUrl { .. }), "{error:?}");
    assert!(!format!("{error} {error:?}").contains("secret"), "{error:?}");
}

/// A `begin` that is cancelled in a nested transaction of sqlx removes that transaction's level, so the nested `commit`
/// is a COMMIT. If that is dropped at once, it waits in the queue of the connection's thread behind a statement, and
/// the guard's own COMMIT is behind it.
#[tokio::test]
async fn a_foreign_commit_that_waits_ahead_of_the_guards_own_is_refused() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(1).await;
    let mut cut = 0;
    for _ in 0..1000 {
        if cut == 10 {
            break;
        }
        let mut tx = db.begin().await.unwrap();
        let handle = tx.outcome_handle();
        let mut nested = tx.begin().await.unwrap();
        world.insert(&mut nested, 1).await.unwrap();
        if nested.begin().now_or_never().is_some() {
            // The connection's thread was so fast that there was nothing to cancel.
            continue;
        }
        cut += 1;
        world.insert(&mut nested, 2).await.unwrap();
        let a_while =
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 300000) SELECT count(*) FROM n";
        drop(Sqlite::execute(&mut nested, a_while.to_owned()).now_or_never());
        drop(nested.commit().now_or_never());
        let error = tx.commit().await.unwrap_err();
        assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
        assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
        assert!(world.committed().await.is_empty());
    }
    assert_eq!(cut, 10, "nothing could be cut");
    world.end(db).await;
}

/// If a transaction is dropped at about the end of its statement, the cancel comes at about the end of its rollback.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cancel_is_left_on_a_connection_of_a_wrapped_sqlite_pool() {
    let world = World::<Sqlite>::new().await;
    let pool = PoolOptions::<Sqlite>::new().max_connections(1).connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(pool.clone());
    let count = |rows: u64| {
        format!(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {rows}) SELECT count(*) FROM n"
        )
    };
    for round in 0..300 {
        let mut tx = db.begin().await.unwrap();
        let statement = Sqlite::execute(&mut tx, count(1000 + round % 100 * 200));
        drop(timeout(Duration::from_micros(10), statement).await);
        drop(tx);
        let mut conn = pool.acquire().await.unwrap();
        let own = Sqlite::execute(&mut conn, count(2000)).await;
        own.unwrap_or_else(|error| panic!("in round {round} the statement of another was cancelled: {error}"));
    }
    world.end(db).await;
    pool.close().await;
}
