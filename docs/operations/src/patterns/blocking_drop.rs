//! A destructor that blocks
//!
//! A drop runs on the thread of its caller: a timeout, a `select!`, a server that cancels a thousand requests. While it
//! waits, everything else on that thread waits too. Do only what is quick in a destructor, and leave what is slow to a thread
//! of its own or to an explicit `close`.

use std::time::Duration;

use cancel_safe_testing::{Explore, Report};
use tokio::time::sleep;

// Broken:
struct BadResource;

impl Drop for BadResource {
    fn drop(&mut self) {
        std::thread::sleep(Duration::from_millis(500)); // flushes, say
    }
}

async fn work_bad() {
    let _resource = BadResource;
    use_it().await;
}

// Mended:
struct GoodResource;

impl GoodResource {
    async fn close(self) {
        let flush = || std::thread::sleep(Duration::from_millis(500));
        drop(tokio::task::spawn_blocking(flush).await);
    }
}

async fn work_good() {
    let resource = GoodResource;
    use_it().await;
    resource.close().await;
}

// Judged:
async fn use_it() {
    sleep(Duration::from_millis(10)).await;
}

fn explore(work: impl AsyncFn()) -> Report {
    let explore = Explore::new().paused_time(true).drop_within(Duration::from_millis(400)).budgets([0]);
    explore.run(async || (), async |()| work().await, async |(), _outcome| Ok(()))
}

pub(super) fn broken() -> Report {
    explore(work_bad)
}

pub(super) fn mended() -> Report {
    explore(work_good)
}
