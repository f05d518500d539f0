//! Every name and signature of the public API, used once as its users write it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cancel_safe_tx_guard::{
    CloseReport, CommitError, CommitOutcome, OutcomeHandle, Retry, TransactionGuard, TxError, TxEvent, TxPool,
};
use futures_util::FutureExt;
use sqlx::pool::PoolOptions;
use sqlx::{MySql, Postgres, Sqlite};

use crate::on_all;
use crate::world::{MYSQL, POSTGRES, TestDb, World, url};

on_all!(the_guard, the_wrapped_pool, the_closure, the_pending_commit, the_events);

async fn the_guard<D: TestDb>() {
    let world = World::<D>::new().await;
    let builder = TxPool::<D>::builder().max_connections(8).acquire_timeout(Duration::from_secs(5));
    let db: TxPool<D> = builder.connect_with(world.options.clone()).await.unwrap();
    let mut tx: TransactionGuard<D> = TransactionGuard::new(&db).await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let conn: &mut D::Connection = &mut tx;
    world.insert(conn, 2).await.unwrap();
    let handle: OutcomeHandle = tx.outcome_handle();
    tx.commit().await.unwrap();
    assert_eq!(handle.outcome().await, CommitOutcome::Committed);

    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 3).await.unwrap();
    let handle = tx.outcome_handle();
    tx.rollback().await.unwrap();
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);

    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 4).await.unwrap();
    let handle = tx.outcome_handle();
    drop(tx);
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);

    let mut tx = db.begin().await.unwrap();
    let insert = |n: i64| format!("INSERT INTO {} (n) VALUES ({n})", world.table);
    let (five, six) = (insert(5), insert(6));
    let kept = tx.savepoint(async move |sp| {
        D::execute(sp, five).await?;
        Ok::<_, TxError>(5)
    });
    assert_eq!(kept.await.unwrap(), 5);
    let undone: Result<(), TxError> = tx
        .savepoint(async move |sp| {
            D::execute(sp, six).await?;
            Err(TxError::application("on purpose"))
        })
        .await;
    assert!(matches!(undone, Err(TxError::Application(_))));
    match tx.commit_within(Duration::from_secs(20)).await {
        Ok(()) => {}
        Err(CommitError::Pending(handle)) => assert_eq!(handle.outcome().await, CommitOutcome::Committed),
        Err(error) => panic!("{error}"),
    }
    assert_eq!(world.committed().await, [1, 2, 5]);
    let report: CloseReport = db.close(Duration::from_secs(20)).await;
    assert!(report.is_clean(), "{report}");
    world.run(format!("DROP TABLE {}", world.table)).await;
}

async fn the_wrapped_pool<D: TestDb>() {
    let world = World::<D>::new().await;
    let sqlx_pool = PoolOptions::<D>::new().connect_with(world.options.clone()).await.unwrap();
    let db = TxPool::wrap(sqlx_pool);
    let mut tx: TransactionGuard<D> = TransactionGuard::new(&db).await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

/// Inside a task, with captures that nothing else borrows.
async fn the_closure<D: TestDb>() {
    fn shared<T: Clone + Send + Sync + 'static>(it: T) -> T {
        it
    }
    let world = World::<D>::new().await;
    let db = shared(world.pool(2).await);
    let hooks = Arc::new(AtomicU32::new(0));
    let task = tokio::spawn({
        let (db, hooks) = (db.clone(), Arc::clone(&hooks));
        let insert = format!("INSERT INTO {} (n) VALUES (1)", world.table);
        async move {
            let written = db.tx().serializable().timeout(Duration::from_secs(20)).retry(Retry::default()).idempotent();
            let n = written
                .run(async move |tx| {
                    D::execute(tx, insert.clone()).await?;
                    let hooks = Arc::clone(&hooks);
                    tx.after_commit(move || hooks.store(1, Ordering::Relaxed));
                    Ok::<_, TxError>(1)
                })
                .await?;
            let read = db.tx().serializable().read_only().timeout(Duration::from_secs(20)).retry(Retry::default());
            let one = read
                .run(async move |tx| {
                    Ok::<_, TxError>(D::numbers(tx, "SELECT count(*) FROM (SELECT 1) AS one".to_owned()).await?.len())
                })
                .await?;
            Ok::<_, TxError>((n, one))
        }
    });
    assert_eq!(task.await.unwrap().unwrap(), (1, 1));
    assert_eq!(hooks.load(Ordering::Relaxed), 1);
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn the_pending_commit<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let outcome = match tx.commit_within(Duration::ZERO).await {
        Ok(()) => CommitOutcome::Committed,
        Err(CommitError::Pending(handle)) => handle.outcome().await,
        Err(error) => panic!("{error}"),
    };
    assert_eq!(outcome, CommitOutcome::Committed);
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn the_events<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut events = db.events();
    drop(db.begin().await.unwrap());
    assert_eq!(events.next().await, Some(TxEvent::ImplicitRollback));
    for n in 1.. {
        let mut tx = db.begin().await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        // A commit that ends at its first poll is not late.
        if tx.commit().now_or_never().is_none() {
            break;
        }
    }
    let mut told = events.next().await;
    if told == Some(TxEvent::CancelSent) {
        // The machine is busy, and the rollback above took its time.
        told = events.next().await;
    }
    assert_eq!(told, Some(TxEvent::LateOutcome(CommitOutcome::Committed)));
    world.end(db).await;
}

#[tokio::test]
async fn a_url_opens_each_database() -> Result<(), TxError> {
    let db = TxPool::<Postgres>::connect(&url(POSTGRES)).await?;
    let mut tx: TransactionGuard<Postgres> = TransactionGuard::new(&db).await?;
    let (one,): (i32,) = sqlx::query_as("SELECT $1::int").bind(1).fetch_one(&mut *tx).await?;
    assert_eq!(one, 1);
    tx.commit().await?;
    let n = db
        .tx()
        .run(async move |tx| {
            sqlx::query("SELECT $1::int").bind(1).execute(&mut **tx).await?;
            tx.savepoint(async move |sp| Ok::<_, TxError>(sqlx::query("SELECT 1").execute(&mut **sp).await?)).await?;
            Ok::<_, TxError>(1)
        })
        .await?;
    assert_eq!(n, 1);
    TxPool::<MySql>::connect(&url(MYSQL)).await?.begin().await?.commit().await?;
    TxPool::<Sqlite>::connect("sqlite::memory:").await?.begin().await?.rollback().await
}
