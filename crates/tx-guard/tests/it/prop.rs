//! Many transactions at once, dropped at random moments: the handles agree with the table.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cancel_safe_tx_guard::{CommitOutcome, OutcomeHandle, TxPool};

use crate::on_all;
use crate::world::{TestDb, World};

const TASKS: i64 = 6;
const TRANSACTIONS: i64 = 40;

on_all!(under_random_drops_the_outcomes_equal_the_table);

type Handles = Arc<Mutex<Vec<(i64, OutcomeHandle)>>>;

#[expect(clippy::print_stdout, reason = "a random test prints its seed")]
async fn under_random_drops_the_outcomes_equal_the_table<D: TestDb>() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let world = Arc::new(World::<D>::new().await);
    let db = world.pool(3).await;
    let handles = Handles::default();
    let tasks = (0..TASKS).map(|task| {
        let (world, db, handles) = (Arc::clone(&world), db.clone(), Arc::clone(&handles));
        let mut random = fastrand::Rng::with_seed(seed.wrapping_add(task.unsigned_abs()));
        async move {
            for n in 0..TRANSACTIONS {
                let moment = Duration::from_micros(random.u64(..4_000));
                let transaction = transaction(&world, &db, task * TRANSACTIONS + n, &handles);
                drop(tokio::time::timeout(moment, transaction).await);
            }
        }
    });
    futures_util::future::join_all(tasks).await;
    let handles = std::mem::take(&mut *handles.lock().unwrap());
    let mut committed = BTreeSet::new();
    for (n, handle) in handles {
        match handle.outcome().await {
            CommitOutcome::Committed => drop(committed.insert(n)),
            outcome => assert_eq!(outcome, CommitOutcome::RolledBack),
        }
    }
    // Each transaction has written two rows.
    let rows: BTreeSet<i64> = committed.iter().flat_map(|n| [2 * n, 2 * n + 1]).collect();
    assert_eq!(world.committed().await, rows.into_iter().collect::<Vec<_>>());
    world.end(db).await;
}

async fn transaction<D: TestDb>(world: &World<D>, db: &TxPool<D>, n: i64, handles: &Handles) {
    let mut tx = db.begin().await.unwrap();
    handles.lock().unwrap().push((n, tx.outcome_handle()));
    world.insert(&mut tx, 2 * n).await.unwrap();
    world.insert(&mut tx, 2 * n + 1).await.unwrap();
    tx.commit().await.unwrap();
}
