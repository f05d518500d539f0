//! What an owning scope can do and a borrowing one cannot, and that both reach the same result.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_scoped::TokioScope;
use cancel_safe_examples::scope::{borrowing, owning};
use cancel_safe_shutdown::TaskGroup;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const SOON: Duration = Duration::from_millis(50);
const LONG: Duration = Duration::from_millis(600);

fn texts() -> Vec<String> {
    (0..20).map(|text| format!("one two\nthree {text}\n")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_count_the_same_words() {
    let borrowed = borrowing(&texts());
    assert_eq!(borrowed.get("three"), Some(&20));
    assert_eq!(owning(texts()).await.unwrap(), borrowed);
    assert_eq!(owning(Vec::new()).await.unwrap(), BTreeMap::new());
}

#[tokio::test]
async fn a_scope_that_owns_works_on_one_thread() {
    assert_eq!(owning(texts()).await.unwrap().get("one"), Some(&20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_timeout_ends_the_tasks_of_a_scope_that_owns_and_waits_for_those_of_one_that_borrows() {
    let ended = CancellationToken::new();
    let guard = ended.clone().drop_guard();
    let owned = TaskGroup::scope(async move |group| {
        group.spawn("sleeper", async move {
            let _guard = guard;
            std::future::pending::<()>().await;
        })
    });
    assert!(timeout(SOON, owned).await.is_err());
    timeout(Duration::from_secs(60), ended.cancelled()).await.expect("a task outlives its scope");

    let begun = Instant::now();
    let borrowed = async {
        TokioScope::scope_and_block(|scope| scope.spawn(sleep(LONG)));
    };
    // It has no await: the timeout checks its clock when everything is over.
    assert!(timeout(SOON, borrowed).await.is_ok());
    assert!(begun.elapsed() >= LONG);
}
