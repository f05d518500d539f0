//! The attempts at a transaction in a loop: every invariant of a closure holds for them too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{Attempts, CommitOutcome, Retry, TransactionGuard, TxError};
use futures_util::FutureExt;
use sqlx::{Postgres, Sqlite};

use crate::commit::works_as_before;
use crate::on_all;
use crate::stuck::Transient;
use crate::world::{PATIENCE, SOON, TestDb, World};

on_all!(
    a_loop_repeats_what_passes_and_commits_once,
    a_loop_ends_with_what_lasts,
    a_loop_makes_no_more_attempts_than_it_has,
    a_guard_that_was_dropped_is_over_before_the_next_attempt,
    a_guard_that_was_committed_by_hand_is_followed_by_none,
    work_over_its_time_is_given_up_and_rolled_back,
    an_end_that_is_dropped_is_a_rollback_or_a_commit_and_never_both,
);

const AT_ONCE: Duration = Duration::ZERO;

async fn a_loop_repeats_what_passes_and_commits_once<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let hooks = Arc::new(AtomicU32::new(0));
    let mut attempts = db.tx().timeout(PATIENCE).retry(Retry::attempts(5).backoff(AT_ONCE, AT_ONCE)).attempts();
    let mut made = 0;
    let value = loop {
        let mut tx = attempts.next().await.unwrap();
        made += 1;
        let work = async {
            world.insert(&mut tx, made).await?;
            let hooks = Arc::clone(&hooks);
            tx.after_commit(move || {
                hooks.fetch_add(1, Ordering::Relaxed);
            });
            if made < 3 { Err(D::transient(&mut tx).await) } else { Ok("done") }
        };
        let worked = attempts.within(work).await;
        if let Some(value) = attempts.end(tx, worked).await.unwrap() {
            break value;
        }
        // The attempt is already over.
        assert!(world.committed().await.is_empty());
    };
    assert_eq!((value, made, world.committed().await), ("done", 3, vec![3]));
    assert_eq!(hooks.load(Ordering::Relaxed), 1);
    no_attempt(&mut attempts, "committed").await;
    world.end(db).await;
}

async fn no_attempt<D: TestDb>(attempts: &mut Attempts<D>, why: &str) {
    let error = attempts.next().await.unwrap_err();
    assert!(matches!(error, TxError::NoAttempt { reason } if reason.contains(why)), "{error:?}");
}

async fn a_loop_ends_with_what_lasts<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut attempts = db.tx().retry(Retry::attempts(5)).idempotent().attempts();
    let mut tx = attempts.next().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let ended = attempts.end(tx, Err::<(), _>(TxError::application("overdrawn"))).await;
    assert_eq!(ended.unwrap_err().to_string(), "overdrawn");
    no_attempt(&mut attempts, "failed").await;
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

async fn a_loop_makes_no_more_attempts_than_it_has<D: Transient>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut attempts = db.tx().retry(Retry::attempts(2).backoff(AT_ONCE, AT_ONCE)).attempts();
    let mut tx = attempts.next().await.unwrap();
    let passing = D::transient(&mut tx).await;
    assert!(attempts.end(tx, Err::<(), _>(passing)).await.unwrap().is_none());
    let mut tx = attempts.next().await.unwrap();
    let passing = D::transient(&mut tx).await;
    assert!(attempts.end(tx, Err::<(), _>(passing)).await.is_err());
    no_attempt(&mut attempts, "failed").await;

    // Now with guards that are dropped, by a caller that asks for more attempts.
    let mut attempts = db.tx().retry(Retry::attempts(2).backoff(AT_ONCE, AT_ONCE)).attempts();
    for _ in 0..2 {
        drop(attempts.next().await.unwrap());
    }
    no_attempt(&mut attempts, "all attempts").await;
    world.end(db).await;
}

async fn a_guard_that_was_dropped_is_over_before_the_next_attempt<D: TestDb>() {
    let world = World::<D>::new().await;
    // With a second connection the next attempt could be had at once.
    let db = world.pool(2).await;
    let mut attempts = db.tx().retry(Retry::attempts(2).backoff(AT_ONCE, AT_ONCE)).attempts();
    let mut tx = attempts.next().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    let handle = tx.outcome_handle();
    drop(D::execute(&mut tx, D::SLOW.to_owned()).now_or_never());
    drop(tx);
    let mut tx = attempts.next().await.unwrap();
    assert_eq!(handle.try_outcome(), Some(CommitOutcome::RolledBack));
    world.insert(&mut tx, 1).await.unwrap();
    assert!(attempts.end(tx, Ok::<_, TxError>(())).await.unwrap().is_some());
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn a_guard_that_was_committed_by_hand_is_followed_by_none<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut attempts = db.tx().retry(Retry::attempts(5)).idempotent().attempts();
    let mut tx = attempts.next().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    tx.commit().await.unwrap();
    no_attempt(&mut attempts, "committed").await;
    assert_eq!(world.committed().await, [1]);
    world.end(db).await;
}

async fn work_over_its_time_is_given_up_and_rolled_back<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let (limit, start) = (Duration::from_millis(200), Instant::now());
    let mut attempts = db.tx().timeout(limit).retry(Retry::default()).idempotent().attempts();
    let mut tx = attempts.next().await.unwrap();
    let work = async {
        world.insert(&mut tx, 1).await?;
        D::execute(&mut tx, D::SLOW.to_owned()).await?;
        Ok::<_, TxError>(())
    };
    let worked = attempts.within(work).await;
    assert!(worked.as_ref().is_err_and(TxError::is_timeout), "{worked:?}");
    let error = attempts.end(tx, worked).await.unwrap_err();
    assert!(matches!(error, TxError::Timeout { timeout } if timeout == limit), "{error:?}");
    assert!(start.elapsed() < SOON);
    no_attempt(&mut attempts, "failed").await;
    works_as_before(&world, &db).await;
    assert_eq!(world.committed().await, [77]);
    world.end(db).await;
}

async fn an_end_that_is_dropped_is_a_rollback_or_a_commit_and_never_both<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    for (n, worked) in [(1, Ok(())), (2, Err(TxError::application("on purpose")))] {
        let mut attempts = db.tx().retry(Retry::attempts(2).backoff(AT_ONCE, AT_ONCE)).attempts();
        let mut tx: TransactionGuard<D> = attempts.next().await.unwrap();
        world.insert(&mut tx, n).await.unwrap();
        let handle = tx.outcome_handle();
        drop(attempts.end(tx, worked).now_or_never());
        let committed = handle.outcome().await == CommitOutcome::Committed;
        assert_eq!(committed, n == 1);
        assert_eq!(world.committed().await, [1]);
        no_attempt(&mut attempts, if committed { "committed" } else { "failed" }).await;
    }
    world.end(db).await;
}

/// The begin fails transiently each time, and each failure counts.
#[tokio::test]
async fn a_begin_that_fails_in_passing_is_an_attempt() {
    let world = World::<Sqlite>::new().await;
    let db = world.impatient_pool().await;
    let writer = db.tx().immediate().begin().await.unwrap();
    let mut attempts = db.tx().immediate().retry(Retry::attempts(3).backoff(AT_ONCE, AT_ONCE)).attempts();
    let error = attempts.next().await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    no_attempt(&mut attempts, "failed").await;
    // A more patient caller gets the lock later.
    let patient = Retry::attempts(1_000_000).backoff(Duration::from_millis(1), Duration::from_millis(5));
    let mut attempts = db.tx().immediate().timeout(PATIENCE).retry(patient).attempts();
    let (next, ()) = tokio::join!(attempts.next(), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        writer.rollback().await.unwrap();
    });
    next.unwrap().rollback().await.unwrap();
    world.end(db).await;
}

/// Its SQL has ended the transaction, and it is unknown whether by a commit.
#[tokio::test]
async fn an_attempt_of_which_nobody_knows_the_end_is_followed_by_another_only_if_that_does_no_harm() {
    let world = World::<Postgres>::new().await;
    let db = world.pool(1).await;
    let retry = Retry::attempts(2).backoff(AT_ONCE, AT_ONCE);
    for idempotent in [false, true] {
        let tx = db.tx().retry(retry);
        let mut attempts = if idempotent { tx.idempotent() } else { tx }.attempts();
        let mut tx = attempts.next().await.unwrap();
        sqlx::raw_sql("COMMIT").execute(&mut *tx).await.unwrap();
        drop(tx);
        match idempotent {
            true => attempts.next().await.unwrap().rollback().await.unwrap(),
            false => no_attempt(&mut attempts, "not known").await,
        }
    }
    world.end(db).await;
}

/// The next attempt waits for a guard that its owner keeps, but no longer than the deadline.
#[tokio::test]
async fn a_guard_that_is_kept_lets_the_next_attempt_wait_until_the_deadline() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(2).await;
    let limit = Duration::from_millis(200);
    let mut attempts = db.tx().timeout(limit).retry(Retry::attempts(2).backoff(AT_ONCE, AT_ONCE)).attempts();
    let kept = attempts.next().await.unwrap();
    let error = attempts.next().await.unwrap_err();
    assert!(matches!(error, TxError::Timeout { timeout } if timeout == limit), "{error:?}");
    kept.rollback().await.unwrap();
    world.end(db).await;
}

/// The pause between two attempts counts as part of the time.
#[tokio::test]
async fn a_pause_ends_at_the_deadline() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(1).await;
    let (limit, start) = (Duration::from_millis(200), Instant::now());
    // A random pause of up to this length is shorter than the limit only once in a hundred thousand times.
    let retry = Retry::attempts(u32::MAX).backoff(Duration::from_secs(20_000), Duration::from_secs(20_000));
    let mut attempts = db.tx().timeout(limit).retry(retry).attempts();
    drop(attempts.next().await.unwrap());
    let error = attempts.next().await.unwrap_err();
    assert!(matches!(error, TxError::Timeout { timeout } if timeout == limit), "{error:?}");
    assert!((limit..SOON).contains(&start.elapsed()));
    world.end(db).await;
}

/// A refused commit is final, although it is rolled back.
#[tokio::test]
async fn a_commit_that_is_refused_is_followed_by_no_attempt() {
    let world = World::<Postgres>::new().await;
    let table = &world.table;
    let parent = format!("ADD COLUMN parent BIGINT REFERENCES {table} (n) DEFERRABLE INITIALLY DEFERRED");
    world.run(format!("ALTER TABLE {table} {parent}")).await;
    let db = world.pool(1).await;
    let mut attempts = db.tx().retry(Retry::attempts(5)).idempotent().attempts();
    let mut tx = attempts.next().await.unwrap();
    Postgres::execute(&mut tx, format!("INSERT INTO {table} (n, parent) VALUES (1, 2)")).await.unwrap();
    let error = attempts.end(tx, Ok::<_, TxError>(())).await.unwrap_err();
    assert!(matches!(error, TxError::Database(_)), "{error:?}");
    no_attempt(&mut attempts, "failed").await;
    world.end(db).await;
}

/// Without a deadline the wait is ten seconds, which pass at once on a paused clock.
#[tokio::test]
async fn a_guard_that_is_kept_without_a_deadline_is_not_waited_for_for_ever() {
    let world = World::<Sqlite>::new().await;
    let db = world.pool(2).await;
    let mut attempts = db.tx().retry(Retry::attempts(2).backoff(AT_ONCE, AT_ONCE)).attempts();
    let kept = attempts.next().await.unwrap();
    tokio::time::pause();
    let start = tokio::time::Instant::now();
    no_attempt(&mut attempts, "has not ended").await;
    assert!(start.elapsed() >= Duration::from_secs(10), "{:?}", start.elapsed());
    tokio::time::resume();
    // This error decides nothing: once the transaction has ended, the next attempt may be made.
    kept.rollback().await.unwrap();
    attempts.next().await.unwrap().rollback().await.unwrap();
    world.end(db).await;
}
