//! The upkeep of a pool's sessions: their number, their age, hooks and changing credentials.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cancel_safe_tx_guard::{TxError, TxPool, TxPoolBuilder};
use sqlx::{Postgres, Sqlite};

use crate::on_all;
use crate::silence::{backend, within};
use crate::world::{TestDb, World, eventually};

/// Counts what is called.
#[derive(Clone, Default)]
struct Count(Arc<AtomicUsize>);

impl Count {
    fn up(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst)
    }

    fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// Commits one transaction.
async fn works<D: TestDb>(world: &World<D>, db: &TxPool<D>, n: i64) {
    let mut tx = within(db.begin()).await.unwrap();
    world.insert(&mut tx, n).await.unwrap();
    within(tx.commit()).await.unwrap();
}

async fn a_hook_runs_on_each_new_session<D: TestDb>() {
    let world = World::<D>::new().await;
    let opened = Count::default();
    let db = TxPool::<D>::builder().max_connections(2).after_connect({
        let opened = opened.clone();
        move |conn| {
            opened.up();
            Box::pin(D::execute(conn, "SELECT 1".to_owned()))
        }
    });
    let db = db.connect_with(world.options.clone()).await.unwrap();
    assert_eq!(opened.get(), 1);
    let (one, two) = (db.begin().await.unwrap(), db.begin().await.unwrap());
    assert_eq!(opened.get(), 2);
    one.commit().await.unwrap();
    two.commit().await.unwrap();
    works(&world, &db, 1).await;
    assert_eq!(opened.get(), 2);
    world.end(db).await;
}

async fn a_hook_that_fails_on_a_new_session_is_an_error_of_connecting<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = TxPool::<D>::builder().after_connect(|conn| Box::pin(D::execute(conn, "NO SQL".to_owned())));
    let error = db.connect_with(world.options.clone()).await.unwrap_err();
    assert!(error.is_connect(), "{error:?}");
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// The hook refuses the second session, but not the one after it.
async fn a_hook_ahead_of_begin_that_fails_costs_its_session<D: TestDb>() {
    let world = World::<D>::new().await;
    let (opened, begun) = (Count::default(), Count::default());
    let db = TxPool::<D>::builder().max_connections(1);
    let db = db.after_connect({
        let opened = opened.clone();
        move |_| {
            opened.up();
            Box::pin(async { Ok(()) })
        }
    });
    let db = db.before_begin({
        let begun = begun.clone();
        move |conn| {
            let refused = begun.up() == 1;
            Box::pin(D::execute(conn, if refused { "NO SQL" } else { "SELECT 1" }.to_owned()))
        }
    });
    let db = db.connect_with(world.options.clone()).await.unwrap();
    works(&world, &db, 1).await;
    assert_eq!((opened.get(), begun.get()), (1, 1));
    works(&world, &db, 2).await;
    assert_eq!((opened.get(), begun.get()), (2, 3));
    assert_eq!(world.committed().await, [1, 2]);
    world.end(db).await;
}

async fn a_hook_ahead_of_begin_that_always_fails_is_an_error<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = TxPool::<D>::builder().before_begin(|_| Box::pin(async { Err(sqlx::Error::RowNotFound) }));
    let db = db.connect_with(world.options.clone()).await.unwrap();
    let error = within(db.begin()).await.unwrap_err();
    assert!(matches!(error.as_sqlx(), Some(sqlx::Error::RowNotFound)), "{error:?}");
    world.end(db).await;
}

/// It runs when the transaction has ended, and decides whether the session is kept.
async fn a_hook_behind_each_transaction_decides_what_is_kept<D: TestDb>() {
    let world = World::<D>::new().await;
    let (opened, released) = (Count::default(), Count::default());
    let db = TxPool::<D>::builder().max_connections(1);
    let db = db.after_connect({
        let opened = opened.clone();
        move |_| {
            opened.up();
            Box::pin(async { Ok(()) })
        }
    });
    let db = db.after_release({
        let released = released.clone();
        move |conn| {
            let nth = released.up();
            Box::pin(async move {
                D::execute(conn, "SELECT 1".to_owned()).await?;
                match nth {
                    0 | 1 => Ok(true),
                    2 => Ok(false),
                    3 => Err(sqlx::Error::RowNotFound),
                    4 => panic!("a hook may do anything"),
                    _ => Ok(true),
                }
            })
        }
    });
    let db = db.connect_with(world.options.clone()).await.unwrap();
    let mut seen = Vec::new();
    for n in 0..7 {
        works(&world, &db, n).await;
        seen.push(opened.get());
    }
    assert_eq!(seen, [1, 1, 1, 2, 3, 4, 4]);
    within(db.begin()).await.unwrap().rollback().await.unwrap();
    world.end(db).await;
}

on_all!(
    a_hook_runs_on_each_new_session,
    a_hook_that_fails_on_a_new_session_is_an_error_of_connecting,
    a_hook_ahead_of_begin_that_fails_costs_its_session,
    a_hook_ahead_of_begin_that_always_fails_is_an_error,
    a_hook_behind_each_transaction_decides_what_is_kept,
);

async fn sessions(world: &World<Postgres>) -> usize {
    let mut other = world.plain().await;
    let sql = format!("SELECT pid::bigint FROM pg_stat_activity WHERE application_name = '{}'", world.table);
    Postgres::numbers(&mut other, sql).await.unwrap().len()
}

async fn counted(world: &World<Postgres>, builder: TxPoolBuilder<Postgres>) -> TxPool<Postgres> {
    builder.connect_with(world.options.clone().application_name(&world.table)).await.unwrap()
}

/// There is one more session for cancelling.
#[tokio::test]
async fn so_many_sessions_are_kept_as_are_asked_for() {
    let world = World::<Postgres>::new().await;
    let builder = TxPool::<Postgres>::builder().max_connections(5).min_connections(3);
    let db = counted(&world, builder.idle_timeout(Duration::from_millis(50))).await;
    eventually("three are open", async || sessions(&world).await == 4).await;
    // A connection that is idle beside four others would be closed.
    eventually("they are at rest", async || db.metrics().idle == 3).await;
    let mut guards = Vec::new();
    for _ in 0..5 {
        guards.push(db.begin().await.unwrap());
    }
    assert_eq!(sessions(&world).await, 6);
    for guard in guards {
        guard.rollback().await.unwrap();
    }
    eventually("the others are closed", async || sessions(&world).await == 4).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(sessions(&world).await, 4);
    let now = db.metrics();
    assert_eq!((now.opened, now.closed_idle), (5, 2), "those that are kept are the ones there were: {now:?}");
    world.end(db).await;
}

#[tokio::test]
async fn a_session_that_is_idle_for_long_or_old_is_closed() {
    let world = World::<Postgres>::new().await;
    let short = Duration::from_millis(50);
    for builder in [
        TxPool::<Postgres>::builder().idle_timeout(short).max_lifetime(None),
        TxPool::<Postgres>::builder().idle_timeout(None).max_lifetime(short),
    ] {
        let db = counted(&world, builder).await;
        works_and_rolls_back(&db).await;
        eventually("only the one for cancelling is left", async || sessions(&world).await == 1).await;
        works_and_rolls_back(&db).await;
        assert!(db.close(crate::world::PATIENCE).await.is_clean());
        eventually("all are closed", async || sessions(&world).await == 0).await;
    }
    world.run(format!("DROP TABLE {}", world.table)).await;
}

async fn works_and_rolls_back(db: &TxPool<Postgres>) {
    within(db.begin()).await.unwrap().rollback().await.unwrap();
}

/// Its age is checked when it is taken and when it is given back, not only periodically.
#[tokio::test]
async fn a_session_that_is_too_old_is_given_to_nobody() {
    let world = World::<Postgres>::new().await;
    let lifetime = Duration::from_millis(300);
    let db = counted(&world, TxPool::<Postgres>::builder().max_connections(1).max_lifetime(lifetime)).await;
    let before = backend(&db).await;
    let tx = db.begin().await.unwrap();
    tokio::time::sleep(lifetime).await;
    tx.commit().await.unwrap();
    assert_ne!(backend(&db).await, before);
    let now = db.metrics();
    assert_eq!((now.closed_unfit, now.closed_failed), (0, 0), "it was too old, and that alone: {now:?}");
    world.end(db).await;
}

/// The task that would have closed it has ended with its runtime.
#[test]
fn a_session_that_grew_too_old_while_it_was_idle_is_given_to_nobody() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let lifetime = Duration::from_millis(100);
    let first = runtime();
    let (world, db) = first.block_on(async {
        let world = World::<Sqlite>::new().await;
        let builder = TxPool::<Sqlite>::builder().max_connections(1).max_lifetime(lifetime);
        let db = builder.connect_with(world.options.clone()).await.unwrap();
        eventually("one is at rest", async || db.metrics().idle == 1).await;
        (world, db)
    });
    drop(first);
    runtime().block_on(async {
        tokio::time::sleep(lifetime).await;
        let before = db.metrics();
        assert_eq!((before.opened - before.closed_expired, before.idle), (1, 1), "{before:?}");
        works(&world, &db, 1).await;
        let after = db.metrics();
        assert!(after.opened > before.opened && after.closed_expired > before.closed_expired, "{after:?}");
        assert_eq!(after.closed_failed, 0, "{after:?}");
        world.end(db).await;
    });
}

/// It has shown that it answers. The limit is only for sessions that were used before.
#[tokio::test]
async fn a_begin_on_a_session_that_was_opened_just_now_may_take_its_time() {
    let world = World::<Postgres>::new().await;
    let begun = Count::default();
    let builder = TxPool::<Postgres>::builder().max_connections(1).begin_timeout(Duration::from_millis(50));
    let builder = builder.before_begin({
        let begun = begun.clone();
        move |_| {
            begun.up();
            Box::pin(async {
                tokio::time::sleep(Duration::from_millis(300)).await;
                Ok(())
            })
        }
    });
    let db = builder.connect_with(world.options.clone()).await.unwrap();
    works(&world, &db, 1).await;
    assert_eq!((begun.get(), db.metrics().opened), (2, 2), "the first one was too slow, and the second was not");
    world.end(db).await;
}

#[tokio::test]
async fn a_pool_that_is_gone_has_no_task_any_more() {
    let world = World::<Postgres>::new().await;
    let metrics = tokio::runtime::Handle::current().metrics();
    let before = metrics.num_alive_tasks();
    let db = counted(&world, TxPool::<Postgres>::builder().min_connections(2)).await;
    eventually("two are open", async || sessions(&world).await == 3).await;
    drop(db);
    eventually("all are closed", async || sessions(&world).await == 0).await;
    eventually("no task is left", async || metrics.num_alive_tasks() <= before).await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

/// The password of the role changes for each session.
#[tokio::test]
async fn each_session_is_opened_with_the_latest_credentials() {
    let world = World::<Postgres>::new().await;
    let role = world.table.clone();
    world.run(format!("CREATE ROLE {role} LOGIN; GRANT ALL ON {role} TO {role}")).await;
    let asked = Count::default();
    let (options, count) = (world.options.clone().username(&role).application_name(&role), asked.clone());
    let db = TxPool::<Postgres>::builder().max_connections(2);
    let db = db.connect_with_fn(move || {
        let (options, nth) = (options.clone(), count.up());
        async move { if nth < 3 { Ok(options) } else { Err(sqlx::Error::WorkerCrashed) } }
    });
    let db = db.await.unwrap();
    let before = asked.get();
    let one = db.begin().await.unwrap();
    let two = db.begin().await.unwrap();
    assert_eq!(asked.get(), before + 1);
    one.rollback().await.unwrap();
    two.rollback().await.unwrap();
    world
        .run(format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{role}'"))
        .await;
    eventually("all are ended", async || sessions(&world).await == 0).await;
    let error = within(db.begin()).await.unwrap_err();
    assert!(error.is_connect(), "{error:?}");
    assert!(db.close(crate::world::PATIENCE).await.is_clean());
    world.run(format!("DROP OWNED BY {role}; DROP ROLE {role}; DROP TABLE {role}")).await;
}

#[tokio::test]
async fn a_setting_out_of_its_range_is_named() {
    let world = World::<Postgres>::new().await;
    let builder = TxPool::<Postgres>::builder;
    for (builder, named) in [
        (builder().max_connections(0), "max_connections"),
        (builder().max_connections(2).min_connections(3), "min_connections"),
        (builder().max_lifetime(Duration::ZERO), "max_lifetime"),
    ] {
        let error = builder.connect_with(world.options.clone()).await.unwrap_err();
        assert!(matches!(error, TxError::InvalidOption { option, .. } if option == named), "{error:?}");
        assert!(error.to_string().contains(named), "{error}");
    }
    // A minimum equal to the maximum is allowed.
    let db = builder().max_connections(1).min_connections(1).connect_with(world.options.clone()).await.unwrap();
    assert!(db.close(crate::world::PATIENCE).await.is_clean());
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn the_connection_for_cancelling_follows_the_options() {
    let world = World::<Postgres>::new().await;
    let (options, asked) = (world.options.clone(), Count::default());
    let table = world.table.clone();
    let rotating = move || {
        let name = format!("{table}_{}", asked.up());
        std::future::ready(Ok(options.clone().application_name(&name)))
    };
    let db = TxPool::<Postgres>::builder().max_connections(2).connect_with_fn(rotating).await.unwrap();
    let mut one = db.begin().await.unwrap();
    let pid: i32 = sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(&mut *one).await.unwrap();
    let mut two = db.begin().await.unwrap();
    let show = "SELECT current_setting('application_name')";
    let [old, new]: [String; 2] = [
        sqlx::query_scalar(show).fetch_one(&mut *one).await.unwrap(),
        sqlx::query_scalar(show).fetch_one(&mut *two).await.unwrap(),
    ];
    assert_ne!(old, new);
    // The connection for cancelling has the old name, too.
    let ended = format!(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '{old}' AND pid <> {pid}"
    );
    world.run(ended).await;
    let slow = Postgres::execute(&mut one, Postgres::SLOW.to_owned());
    assert!(tokio::time::timeout(Duration::from_millis(50), slow).await.is_err(), "it was not slow");
    drop(one);
    let mut beside = world.plain().await;
    let named = format!("SELECT count(*) FROM pg_stat_activity WHERE application_name = '{new}'");
    eventually("it is opened anew", async || Postgres::numbers(&mut beside, named.clone()).await.unwrap() == [2]).await;
    two.rollback().await.unwrap();
    world.end(db).await;
}
