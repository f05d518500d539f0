//! Transactions of sqlx nested in a guard, and cuts inside them.

use cancel_safe_tx_guard::{CommitOutcome, TxError};
use sqlx::{Connection, Postgres, Sqlite};

use crate::fuzz::cut::cut;
use crate::on_all;
use crate::relied::takes_dropped_begins_back;
use crate::world::{TestDb, World};

on_all!(a_raw_rollback_lets_no_later_write_stand);

/// Then sqlx rolls back twice, which ends the guard's transaction; the statements after that do not pass the guard.
///
/// A version of sqlx that takes a dropped `begin` back goes one level too far, so the nested `commit` commits the
/// whole: then the outcome is unknown.
async fn a_begin_cancelled_inside_a_nested_transaction_lets_nothing_stand<D: TestDb>(may_stand: bool) {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut lost = 0;
    // SQLite's thread may answer before the first poll is over, and then a round has nothing to cancel.
    for _ in 0..200 {
        for polls in 1.. {
            let mut tx = db.begin().await.unwrap();
            world.insert(&mut tx, 1).await.unwrap();
            let handle = tx.outcome_handle();
            let mut nested = tx.begin().await.unwrap();
            world.insert(&mut nested, 2).await.unwrap();
            let whole = cut(nested.begin(), Some(polls)).await.is_some();
            drop(world.insert(&mut nested, 3).await);
            drop(nested.commit().await);
            match tx.commit().await {
                Ok(()) => world.run(format!("DELETE FROM {}", world.table)).await,
                Err(error) => {
                    assert!(matches!(error, TxError::Lost { .. } | TxError::Aborted { .. }), "{error:?}");
                    lost += 1;
                }
            }
            let stands = !world.committed().await.is_empty();
            assert!(!stands || may_stand, "a write was committed by itself after {polls} polls");
            if stands {
                assert_eq!(handle.outcome().await, CommitOutcome::Unknown, "after {polls} polls");
                world.run(format!("DELETE FROM {}", world.table)).await;
            }
            if whole {
                break;
            }
        }
        if lost > 0 {
            break;
        }
    }
    assert!(lost > 0, "no cancelled begin did any harm, so this test shows nothing");
    world.end(db).await;
}

async fn a_raw_rollback_lets_no_later_write_stand<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(1).await;
    let mut tx = db.begin().await.unwrap();
    world.insert(&mut tx, 1).await.unwrap();
    D::execute(&mut tx, "ROLLBACK".to_owned()).await.unwrap();
    // MySQL accepts the insert, but does not commit it.
    drop(world.insert(&mut tx, 2).await);
    assert!(tx.commit().await.is_err());
    assert!(world.committed().await.is_empty());
    crate::commit::works_as_before(&world, &db).await;
    world.end(db).await;
}

#[tokio::test]
async fn a_begin_cancelled_inside_a_nested_transaction_lets_nothing_stand_on_sqlite() {
    a_begin_cancelled_inside_a_nested_transaction_lets_nothing_stand::<Sqlite>(false).await;
}

#[tokio::test]
async fn a_begin_cancelled_inside_a_nested_transaction_lets_nothing_stand_on_postgres() {
    let may_stand = takes_dropped_begins_back().await;
    a_begin_cancelled_inside_a_nested_transaction_lets_nothing_stand::<Postgres>(may_stand).await;
}
