//! Workers that share a job on a real PostgreSQL.

#[cfg(unix)]
pub(crate) mod pooler;
pub(crate) mod proxy;
pub(crate) mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cancel_safe_resumable::{ItemError, PgStore, ResumableTask, Retry, TaskError};
use futures_util::future::join_all;
use futures_util::{FutureExt, StreamExt};
use tokio_util::sync::CancellationToken;

use self::world::{FOR_EVER, PGBOUNCER, World, assert_complete, numbers, pool, recorded, url, work};
use crate::support::eventually;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_share_a_job_and_each_item_is_handed_out_by_one_of_them() {
    let world = World::new().await;
    let workers = (0..4).map(|_| tokio::spawn(work(numbers(world.store()).concurrency(8), 1005)));
    let mut handed_out = Vec::new();
    for worker in join_all(workers).await {
        handed_out.extend(worker.unwrap().unwrap().into_iter().map(|done| done.index));
    }
    handed_out.sort_unstable();
    assert_eq!(handed_out, (0..1005).collect::<Vec<_>>());
    assert_complete(&world.store(), 1005).await;
    assert_eq!(world.number("SELECT taken_over::bigint FROM {s}.progress").await, 0);
    world.end().await;
}

#[tokio::test]
async fn a_complete_job_runs_nothing_again() {
    let world = World::new().await;
    work(numbers(world.store()), 25).await.unwrap();
    let run = numbers(world.store()).stream(0..25, |_, _| async { Err(ItemError::permanent("it ran again")) });
    let summary = run.finish().await.unwrap();
    assert_eq!((summary.total, summary.completed, summary.restored, summary.quarantined), (25, 0, 25, 0));
    // A job without items is complete as soon as it exists.
    let none = ResumableTask::builder("none").store(world.store()).stream(0..0, |_, x: u64| async move { Ok(x) });
    assert_eq!(none.finish().await.unwrap().total, 0);
    assert!(recorded(&world.store(), "none").await.unwrap().is_empty());
    world.end().await;
}

#[tokio::test]
async fn two_jobs_in_one_schema_do_not_meet() {
    let world = World::new().await;
    let other = ResumableTask::builder("other").store(world.store());
    let other = other.stream(0..35, |_, x: u64| async move { Ok(x + 1) });
    let (numbers, other) = tokio::join!(work(numbers(world.store()), 45), other.finish());
    assert_eq!(numbers.unwrap().len(), 45);
    assert_eq!(other.unwrap().completed, 35);
    assert_complete(&world.store(), 45).await;
    let other = recorded(&world.store(), "other").await.unwrap();
    assert!(other.len() == 35 && other.iter().all(|done| done.result == Ok(done.index as u64 + 1)));
    world.end().await;
}

#[tokio::test]
async fn a_worker_with_another_version_or_input_is_refused_and_changes_nothing() {
    let world = World::new().await;
    work(numbers(world.store()), 35).await.unwrap();
    let before = world.number("SELECT sum(epoch + seq)::bigint FROM {s}.range").await;
    let other = numbers(world.store()).version("2");
    let error = work(other, 35).await.unwrap_err();
    assert!(matches!(&error, TaskError::VersionMismatch { field: "version", .. }), "{error}");
    work(numbers(world.store()).version("2").accept_version("1"), 35).await.unwrap();
    let other = numbers(world.store()).key(|x| x.to_string());
    let error = work(other, 35).await.unwrap_err();
    assert!(matches!(&error, TaskError::VersionMismatch { field: "identity", .. }), "{error}");
    // A different item, one too many, one too few: each is reported at the range that begins before it.
    for (input, range) in [
        ((0..35).map(|x| if x == 27 { 99 } else { x }).collect::<Vec<u64>>(), 20),
        ((0..36).collect(), 30),
        ((0..34).collect(), 30),
        ((0..41).collect(), 30),
        (Vec::new(), 0),
    ] {
        let run = numbers(world.store()).stream(input, |_, x| async move { Ok(x) });
        let error = run.finish().await.unwrap_err();
        assert!(matches!(&error, TaskError::InputMismatch { index, .. } if *index == range), "{error}");
    }
    // The first worker has decided on the size of a range.
    work(numbers(world.store().range_items(7)), 35).await.unwrap();
    assert_eq!(world.number("SELECT sum(epoch + seq)::bigint FROM {s}.range").await, before);
    world.end().await;
}

#[tokio::test]
async fn what_cannot_be_done_by_many_is_refused_before_anything_is_opened() {
    let world = World::new().await;
    for builder in [
        numbers(world.store()).ordered(),
        numbers(world.store()).at_most_once(),
        numbers(world.store()).revalidate(|_, _| true),
        numbers(world.store()).retry_quarantined(true),
        numbers(world.store()).parallel(4),
        numbers(world.store()).checkpoint_every_items(100),
        numbers(world.store().answer_within(Duration::ZERO)),
        numbers(world.store().range_items(0)),
        numbers(world.store().lease(Duration::ZERO)),
        numbers(world.store().schema("")),
        numbers(world.store().schema("x".repeat(64))),
    ] {
        let error = work(builder, 5).await.unwrap_err();
        assert!(matches!(error, TaskError::Config(_)), "{error}");
    }
    let error = recorded(&world.store(), "numbers").await.unwrap_err();
    assert!(matches!(error, TaskError::Config(_)), "{error}");
    world.end().await;
}

#[test]
fn without_a_runtime_or_its_clock_a_job_is_refused_and_nothing_panics() {
    let whole = tokio::runtime::Runtime::new().unwrap();
    // The pool is made where it can be.
    let world = whole.block_on(World::new());
    let run = || work(numbers(world.store()), 5);
    let process = || numbers(world.store()).process_tx(0..5, async |_, x: u64| Ok(x * 2));
    let without_clock = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let refused = [
        run().now_or_never().unwrap().map(drop),
        process().now_or_never().unwrap().map(drop),
        without_clock.block_on(run()).map(drop),
        without_clock.block_on(process()).map(drop),
    ];
    for refused in refused {
        assert!(matches!(refused, Err(TaskError::Config(_))), "{refused:?}");
    }
    whole.block_on(async {
        run().await.unwrap();
        world.clone().end().await;
    });
}

/// The records of an unfinished range wait for ever, and the rest does not.
#[tokio::test]
async fn the_longest_checkpoint_interval_is_one_for_ever() {
    let world = World::new().await;
    work(numbers(world.store()).checkpoint_every(Duration::MAX), 25).await.unwrap();
    assert_complete(&world.store(), 25).await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_first_workers_one_makes_the_tables_and_the_job() {
    let world = World::new().await;
    let workers = (0..8).map(|_| tokio::spawn(work(numbers(world.store()), 95)));
    let done: Vec<_> = join_all(workers).await.into_iter().map(|worker| worker.unwrap().unwrap().len()).collect();
    assert_eq!(done.iter().sum::<usize>(), 95);
    assert_eq!(world.number("SELECT count(*) FROM {s}.schema_version").await, 1);
    world.end().await;
}

#[tokio::test]
async fn somebody_elses_schema_and_a_newer_version_are_refused_untouched() {
    let world = World::new().await;
    world.run("CREATE SCHEMA {s}; CREATE TABLE {s}.theirs (n int)").await;
    let error = work(numbers(world.store()), 5).await.unwrap_err();
    assert!(matches!(error, TaskError::Config(_)), "{error}");
    assert_eq!(world.number("SELECT count(*) FROM pg_tables WHERE schemaname = '{s}'").await, 1);
    world.run("DROP TABLE {s}.theirs").await;
    // An administrator may have created an empty one for us.
    work(numbers(world.store()), 5).await.unwrap();
    world.run("UPDATE {s}.schema_version SET version = 2").await;
    let error = work(numbers(world.store()), 5).await.unwrap_err();
    assert!(matches!(error, TaskError::NewerFormat { needs: 2, .. }), "{error}");
    let error = recorded(&world.store(), "numbers").await.unwrap_err();
    assert!(matches!(error, TaskError::NewerFormat { .. }), "{error}");
    world.end().await;
}

#[tokio::test]
async fn a_name_of_a_schema_is_no_sql() {
    let world = World::new().await;
    let odd = format!("{}\"; DROP TABLE x; --", world.schema);
    let store = world.store().schema(&odd);
    work(numbers(store.clone()), 5).await.unwrap();
    assert_complete(&store, 5).await;
    world.run(&format!("DROP SCHEMA \"{}\" CASCADE", odd.replace('"', "\"\""))).await;
    world.end().await;
}

/// The lease would last for an hour: a worker that takes over earlier got a returned range.
#[tokio::test]
async fn a_dropped_run_records_what_it_had_and_gives_its_ranges_back_at_once() {
    let world = World::new().await;
    let finished = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&finished);
    let mut run = numbers(world.store()).concurrency(4).stream(0..40, move |_, x| {
        let counter = Arc::clone(&counter);
        async move {
            if x >= 15 {
                std::future::pending::<()>().await;
            }
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(x * 2)
        }
    });
    while finished.load(Ordering::Relaxed) < 15 {
        let polled = tokio::time::timeout(Duration::from_millis(10), run.next()).await;
        assert!(!matches!(polled, Ok(None)));
    }
    drop(run);
    let rest = work(numbers(world.store()), 40).await.unwrap();
    // Which range is claimed first depends on which was given back first.
    let mut indexes: Vec<_> = rest.iter().map(|done| done.index).collect();
    indexes.sort_unstable();
    assert_eq!(indexes, (15..40).collect::<Vec<_>>());
    assert_complete(&world.store(), 40).await;
    world.end().await;
}

#[tokio::test]
async fn a_cancelled_run_returns_when_all_is_durable_and_given_back() {
    let world = World::new().await;
    let token = CancellationToken::new();
    let cancel = token.clone();
    let run = numbers(world.store()).checkpoint_every(FOR_EVER).cancel(token).stream(0..40, move |_, x| {
        if x == 15 {
            cancel.cancel();
        }
        async move { Ok(x * 2) }
    });
    let error = run.finish().await.unwrap_err();
    assert!(error.is_cancelled(), "{error}");
    assert_eq!(world.number("SELECT count(*) FROM {s}.range WHERE lease_until IS NOT NULL").await, 0);
    let error = recorded(&world.store(), "numbers").await.unwrap_err();
    assert!(matches!(error, TaskError::Incomplete { done: 15.., total: 40, .. }), "{error}");
    let rest = work(numbers(world.store()), 40).await.unwrap();
    assert!(rest[0].index >= 15, "what was recorded ran again");
    assert_complete(&world.store(), 40).await;
    world.end().await;
}

#[tokio::test]
async fn failures_are_retried_counted_and_put_in_quarantine_once_for_all_workers() {
    let world = World::new().await;
    let builder = || {
        numbers(world.store())
            .retry(Retry::attempts(3).backoff(Duration::from_millis(1), Duration::from_millis(10)))
            .concurrency(4)
    };
    let failing = |context: cancel_safe_resumable::ItemContext, x: u64| async move {
        match x {
            7 => Err(ItemError::retry("it never works")),
            8 if context.attempt() < 3 => Err(ItemError::retry("not yet")),
            9 => Err(ItemError::permanent("it will never work")),
            x => Ok(x * 2),
        }
    };
    // Without room the run ends, and the item has all its attempts again.
    let error = builder().quarantine(1).stream(0..30, failing).finish().await.unwrap_err();
    assert!(error.is_quarantine_full(), "{error}");
    let mut run = builder().quarantine(2).stream(0..30, failing);
    let mut quarantined = Vec::new();
    while let Some(done) = run.next().await {
        if let Err(why) = done.result {
            quarantined.push((done.index, why.attempts));
        }
    }
    let summary = run.finish().await.unwrap();
    assert_eq!((summary.total, summary.quarantined), (30, 2));
    assert!(quarantined.iter().all(|entry| [(7, 3), (9, 1)].contains(entry)), "{quarantined:?}");
    let all = recorded(&world.store(), "numbers").await.unwrap();
    assert_eq!(all.len(), 30);
    let failed: Vec<_> =
        all.iter().filter(|done| done.result.is_err()).map(|done| (done.index, done.attempts)).collect();
    assert_eq!(failed, [(7, 3), (9, 1)]);
    // They are in quarantine for others, too.
    let summary = builder().stream(0..30, failing).finish().await.unwrap();
    assert_eq!((summary.restored, summary.quarantined), (30, 2));
    world.end().await;
}

#[tokio::test]
async fn keys_are_kept_and_must_differ() {
    let world = World::new().await;
    let keyed = || numbers(world.store()).key(|x| format!("item {x}"));
    let done = work(keyed(), 15).await.unwrap();
    assert!(done.iter().all(|done| done.key.as_deref() == Some(&*format!("item {}", done.index))));
    let read = recorded(&world.store(), "numbers").await.unwrap();
    assert_eq!(read[14].key.as_deref(), Some("item 14"));
    let double = numbers(world.store()).key(|x| (x % 10).to_string());
    let error = work(double, 15).await.unwrap_err();
    assert!(matches!(error, TaskError::DuplicateKey { first: 0, index: 10 }), "{error}");
    world.end().await;
}

#[tokio::test]
async fn a_block_that_is_missing_damaged_or_moved_is_corrupt() {
    let world = World::new().await;
    let store: PgStore = world.store();
    work(numbers(store.clone()), 30).await.unwrap();
    for damage in [
        "UPDATE {s}.block SET body = set_byte(body, 40, get_byte(body, 40) # 1) WHERE n = 1 AND seq = 1",
        "DELETE FROM {s}.block WHERE n = 1 AND seq = 1",
        "UPDATE {s}.block b SET body = (SELECT body FROM {s}.block o WHERE o.n = 2 AND o.seq = b.seq) WHERE n = 1",
        "INSERT INTO {s}.block SELECT job, n, 99, epoch, body FROM {s}.block WHERE n = 1 AND seq = 1;
         UPDATE {s}.range SET seq = seq + 1 WHERE n = 1",
        "UPDATE {s}.range SET finished = false WHERE n = 1",
    ] {
        world.run("CREATE TABLE IF NOT EXISTS {s}.b AS TABLE {s}.block; CREATE TABLE IF NOT EXISTS {s}.r AS TABLE {s}.range").await;
        world.run(damage).await;
        let error = recorded(&store, "numbers").await.unwrap_err();
        assert!(error.is_corrupt(), "{damage}: {error}");
        world.run("DELETE FROM {s}.block; DELETE FROM {s}.range; INSERT INTO {s}.range TABLE {s}.r; INSERT INTO {s}.block TABLE {s}.b").await;
        assert_complete(&store, 30).await;
    }
    // A worker that would continue such a range reports it, too.
    world.run("UPDATE {s}.range SET finished = false, done = 5 WHERE n = 1; DELETE FROM {s}.block WHERE n = 1").await;
    let error = work(numbers(store), 30).await.unwrap_err();
    assert!(error.is_corrupt(), "{error}");
    world.end().await;
}

/// A worker whose only thread stands still for longer than its lease, with the keeper of its leases, is fenced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stood_still_past_its_lease_is_fenced_and_writes_nothing() {
    let world = World::new().await;
    let (schema, thaw) = (world.schema.clone(), Arc::new(AtomicUsize::new(0)));
    let (frozen, thawed) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&thaw));
    let is_frozen = Arc::clone(&frozen);
    let zombie = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = PgStore::new(pool(&url(world::POSTGRES), 2)).schema(schema).range_items(10);
            let run = numbers(store.lease(Duration::from_secs(3))).stream(0..30, move |_, x| {
                if x == 5 {
                    is_frozen.store(1, Ordering::SeqCst);
                    while thawed.load(Ordering::SeqCst) == 0 {
                        std::thread::yield_now();
                    }
                }
                async move { Ok(x * 1000) }
            });
            run.finish().await
        })
    });
    eventually("the zombie stands still", || frozen.load(Ordering::SeqCst) == 1).await;
    let others = work(numbers(world.store().lease(FOR_EVER)), 30).await.unwrap();
    thaw.store(1, Ordering::SeqCst);
    let error = zombie.join().unwrap().unwrap_err();
    assert!(error.is_fenced(), "{error}");
    // The others ran everything that the zombie had not recorded before; its late results are nowhere.
    assert!(others.len() >= 25);
    let all = recorded(&world.store(), "numbers").await.unwrap();
    assert_eq!(all.len(), 30);
    assert!(all.iter().skip(5).all(|done| done.result == Ok(done.index as u64 * 2)), "a zombie wrote");
    assert_eq!(world.number("SELECT taken_over::bigint FROM {s}.progress").await, 1);
    world.end().await;
}

/// Foreign statements, prepared and bound in any of the pooler's sessions, beside ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_pooler_that_gives_each_transaction_another_session_nothing_is_lost_or_mixed_up() {
    let world = World::behind(&url(PGBOUNCER)).await;
    let stop = CancellationToken::new();
    let neighbours: Vec<_> = (0..4)
        .map(|_| {
            let (theirs, stop) = (pool(&url(PGBOUNCER), 2), stop.clone());
            tokio::spawn(async move {
                while !stop.is_cancelled() {
                    // The foreign ones may fail there, because they use no transaction.
                    drop(sqlx::query("SELECT $1::bigint, $2::text").bind(1i64).bind("x").execute(&theirs).await);
                    drop(
                        sqlx::query("SELECT n FROM generate_series(1, $1::bigint) n").bind(3i64).execute(&theirs).await,
                    );
                }
            })
        })
        .collect();
    let workers = (0..4).map(|_| tokio::spawn(work(numbers(world.store()).concurrency(8), 2005)));
    let mut handed_out = Vec::new();
    for worker in join_all(workers).await {
        handed_out.extend(worker.unwrap().unwrap().into_iter().map(|done| done.index));
    }
    stop.cancel();
    join_all(neighbours).await;
    handed_out.sort_unstable();
    assert_eq!(handed_out, (0..2005).collect::<Vec<_>>());
    assert_complete(&world.store(), 2005).await;
    world.end().await;
}
