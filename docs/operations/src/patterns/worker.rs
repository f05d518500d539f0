//! A worker that ignores its token
//!
//! A spawned task lives on when its parent is gone, and a token that it never checks does not stop it. A
//! `TaskGroup` leaves nothing behind: a drop aborts its tasks, and a stop tells them first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use cancel_safe_shutdown::TaskGroup;
use cancel_safe_testing::{Explore, Report};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

// Broken:
async fn spawn_worker_bad(alive: Arc<AtomicU32>) {
    let token = CancellationToken::new();
    let _cancelled_on_drop = token.clone().drop_guard();
    tokio::spawn(async move {
        let _alive = Alive::count(&alive);
        loop {
            do_work().await; // never looks at the token
        }
    });
    sleep(Duration::from_millis(50)).await;
}

// Mended:
async fn spawn_worker_good(alive: Arc<AtomicU32>) {
    let workers = TaskGroup::new();
    let worker = async move {
        let _alive = Alive::count(&alive);
        loop {
            do_work().await;
        }
    };
    workers.spawn("worker", worker).expect("an open group");
    sleep(Duration::from_millis(50)).await;
    let ended = workers.shutdown(Duration::from_secs(1)).await;
    assert_eq!(ended.cancelled, ["worker"]);
}

// Judged:
async fn do_work() {
    sleep(Duration::from_millis(10)).await;
}

struct Alive(Arc<AtomicU32>);

impl Alive {
    fn count(alive: &Arc<AtomicU32>) -> Self {
        alive.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(alive))
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn explore(serve: impl AsyncFn(Arc<AtomicU32>)) -> Report {
    Explore::new().paused_time(true).run(
        async || Arc::<AtomicU32>::default(),
        async |alive| serve(Arc::clone(alive)).await,
        async |alive, _outcome| {
            sleep(Duration::from_secs(2)).await;
            match alive.load(Ordering::Relaxed) {
                0 => Ok(()),
                workers => Err(format!("{workers} worker goes on, and nobody can stop it")),
            }
        },
    )
}

pub(super) fn broken() -> Report {
    explore(spawn_worker_bad)
}

pub(super) fn mended() -> Report {
    explore(spawn_worker_good)
}
