//! The example `transfer`, on each database.

#[expect(dead_code, reason = "its `main` is for the command line")]
#[path = "../../examples/transfer.rs"]
mod transfer;

use crate::world::{MYSQL, POSTGRES, url};

async fn money_is_conserved(database: Option<String>) {
    let settings = transfer::Settings { database, transfers: 300, accounts: 20, limit_ms: 60_000, seed: None };
    let summary = transfer::start(settings).await.unwrap();
    assert!(summary.is_right(), "{summary}");
    assert!(summary.committed > 0 && summary.dropped_rolled_back > 0, "{summary}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_is_conserved_on_sqlite() {
    money_is_conserved(None).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_is_conserved_on_postgres() {
    money_is_conserved(Some(url(POSTGRES))).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_is_conserved_on_mysql() {
    money_is_conserved(Some(url(MYSQL))).await;
}
