//! The log of a commit whose caller has gone: the error, which nothing else receives.

use std::error::Error;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use cancel_safe_tx_guard::{CommitOutcome, TxEvent};
use futures_util::FutureExt;
use sqlx::{Postgres, Sqlite};
use tokio::time::timeout;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::world::{PATIENCE, TestDb, World};

/// Keeps the warnings of the crate.
#[derive(Clone, Default)]
struct Listener(Arc<Mutex<String>>);

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("cancel_safe_tx_guard") && *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut Words(&mut self.0.lock().unwrap()));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Words<'a>(&'a mut String);

impl Visit for Words<'_> {
    fn record_error(&mut self, field: &Field, error: &(dyn Error + 'static)) {
        let mut next = Some(error);
        while let Some(error) = next {
            self.0.push_str(&format!("{field}: {error}; "));
            next = error.source();
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!("{field}: {value:?}; "));
    }
}

/// A constraint that is checked at the commit fails there.
async fn the_error_of_a_commit_without_a_caller_is_logged<D: TestDb>() {
    let world = World::<D>::new().await;
    let (parent, child) = (format!("{}_parent", world.table), format!("{}_child", world.table));
    let name = |sql: &str| sql.replace("PARENT", &parent).replace("CHILD", &child);
    world.run(name("CREATE TABLE PARENT (id BIGINT PRIMARY KEY)")).await;
    world.run(name("CREATE TABLE CHILD (id BIGINT REFERENCES PARENT DEFERRABLE INITIALLY DEFERRED)")).await;
    let db = world.pool(1).await;
    let mut events = db.events();
    let listener = Listener::default();
    // The runtime has one thread, so the listener also hears what happens after the drop.
    let _listening = tracing::subscriber::set_default(listener.clone());

    // If the database answers before the first poll is over, there is nothing to report late.
    let handle = loop {
        let mut tx = db.begin().await.unwrap();
        D::execute(&mut tx, name("INSERT INTO CHILD VALUES (1)")).await.unwrap();
        let handle = tx.outcome_handle();
        if tx.commit().now_or_never().is_none() {
            break handle;
        }
    };
    let told = async { while events.next().await != Some(TxEvent::LateOutcome(CommitOutcome::RolledBack)) {} };
    timeout(PATIENCE, told).await.unwrap();
    assert_eq!(handle.try_outcome(), Some(CommitOutcome::RolledBack));
    let logged = listener.0.lock().unwrap().clone();
    assert!(logged.contains("outcome: RolledBack") && logged.to_lowercase().contains("foreign key"), "{logged:?}");

    for table in [&child, &parent] {
        world.run(format!("DROP TABLE {table}")).await;
    }
    world.end(db).await;
}

#[tokio::test]
async fn the_error_of_a_commit_without_a_caller_is_logged_on_sqlite() {
    the_error_of_a_commit_without_a_caller_is_logged::<Sqlite>().await;
}

#[tokio::test]
async fn the_error_of_a_commit_without_a_caller_is_logged_on_postgres() {
    the_error_of_a_commit_without_a_caller_is_logged::<Postgres>().await;
}
