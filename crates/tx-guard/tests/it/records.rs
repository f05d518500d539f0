//! Records: which transaction an event is about.

use std::time::Duration;

use cancel_safe_tx_guard::TxEvent;
use tokio::time::timeout;

use crate::on_all;
use crate::world::{TestDb, World};

on_all!(a_record_says_which_transaction_it_is_about);

async fn a_record_says_which_transaction_it_is_about<D: TestDb>() {
    let world = World::<D>::new().await;
    let db = world.pool(2).await;
    let mut events = db.events();
    let mut slow = db.tx().named("slow").begin().await.unwrap();
    let nameless = db.begin().await.unwrap();
    let nap = Duration::from_millis(50);
    assert!(timeout(nap, D::execute(&mut slow, D::SLOW.to_owned())).await.is_err());
    let handle = slow.outcome_handle();
    drop(slow);
    let dropped = events.record().await.unwrap();
    assert_eq!((dropped.event, dropped.name), (TxEvent::ImplicitRollback, Some("slow")));
    assert!(dropped.after >= nap, "{dropped:?}");
    let cancelled = events.record().await.unwrap();
    assert_eq!((cancelled.event, cancelled.name), (TxEvent::CancelSent, Some("slow")));
    assert_eq!(cancelled.transaction, dropped.transaction);
    assert!(cancelled.after >= dropped.after);
    handle.outcome().await;
    drop(nameless);
    let other = events.record().await.unwrap();
    assert_eq!((other.event, other.name), (TxEvent::ImplicitRollback, None));
    assert_ne!(other.transaction, dropped.transaction);
    world.end(db).await;
}
