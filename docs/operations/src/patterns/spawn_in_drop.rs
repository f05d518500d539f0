//! A cleanup that is spawned by a destructor
//!
//! `Drop` is not async, so it spawns whatever has to wait. Nobody waits for that task: if the runtime ends first, the
//! cleanup never happens. `Reaper::defer` spawns it too, and counts what was lost; the end of the program can wait for it
//! with `drain`. Better still, call an explicit `close`, while somebody is there to see it fail, and keep the destructor
//! for callers who forget.

use std::cell::RefCell;
use std::time::Duration;

use cancel_safe_guard::{Drain, Reaper};
use cancel_safe_testing::{Explore, Outcome, Report};
use tokio::sync::mpsc;
use tokio::time::sleep;

// Broken:
struct BadAsyncResource(Lease);

impl Drop for BadAsyncResource {
    fn drop(&mut self) {
        let lease = self.0.clone();
        tokio::spawn(async move { lease.give_back().await });
    }
}

async fn work_bad(lease: Lease) {
    let _resource = BadAsyncResource(lease);
    sleep(Duration::from_millis(10)).await;
}

// Mended:
async fn work_good(reaper: &Reaper, lease: Lease) {
    let resource = reaper.defer(|| async move { lease.give_back().await });
    sleep(Duration::from_millis(10)).await;
    resource.run().await; // closed while somebody waits; a drop does it afterwards
}

// Judged:
#[derive(Clone)]
struct Lease(mpsc::Sender<()>);

impl Lease {
    async fn give_back(&self) {
        sleep(Duration::from_millis(10)).await;
        self.0.send(()).await.unwrap();
    }
}

struct World {
    reaper: Reaper,
    lease: Lease,
    returned: RefCell<mpsc::Receiver<()>>,
}

fn explore(work: impl AsyncFn(&Reaper, Lease)) -> Report {
    Explore::new().paused_time(true).settle_for(Duration::from_millis(50)).run(
        async || {
            let (lease, returned) = mpsc::channel(4);
            World { reaper: Reaper::new(), lease: Lease(lease), returned: returned.into() }
        },
        async |world| work(&world.reaper, world.lease.clone()).await,
        async |world, outcome| {
            let Drain { lost, .. } = world.reaper.drain(Duration::from_secs(1)).await;
            let given_back = world.returned.borrow_mut().try_recv().is_ok();
            let never_polled = matches!(outcome, Outcome::Dropped { point: 0, .. });
            match given_back || never_polled || lost > 0 {
                true => Ok(()),
                false => Err("the lease was not given back, and nobody was told".to_owned()),
            }
        },
    )
}

pub(super) fn broken() -> Report {
    explore(async |_, lease| work_bad(lease).await)
}

pub(super) fn mended() -> Report {
    explore(async |reaper, lease| work_good(reaper, lease).await)
}
