//! async_singleflight: the caller that works for all is dropped. How many of the others work in its place?

#[path = "../verdict.rs"]
mod verdict;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cancel_safe_testing::{Explore, Way};
use futures_util::future::BoxFuture;
use futures_util::join;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// The group of the version at hand; the versions differ in types.
pub trait Flight: Send + Sync + 'static {
    fn work<'a>(&'a self, job: BoxFuture<'a, u32>) -> BoxFuture<'a, u32>;
}

struct Scene<G> {
    group: Arc<G>,
    /// The number of running jobs, and its maximum.
    running: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    others: RefCell<Vec<JoinHandle<u32>>>,
}

impl<G: Flight> Scene<G> {
    /// One of the callers that wait for the result of the first.
    fn other(&self) -> impl Future<Output = u32> + use<G> {
        let (group, running, most) = (self.group.clone(), self.running.clone(), self.most.clone());
        async move {
            let job = async {
                most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                sleep(Duration::from_millis(10)).await;
                running.fetch_sub(1, Ordering::SeqCst);
                7
            };
            group.work(Box::pin(job)).await
        }
    }
}

pub fn explore<G: Flight>(group: impl Fn() -> G) {
    // Not `Shutdown`: it would end the other callers as well.
    let report = Explore::new().paused_time(true).ways([Way::Eager, Way::Settled]).run(
        async || Scene {
            group: Arc::new(group()),
            running: Arc::default(),
            most: Arc::default(),
            others: RefCell::default(),
        },
        async |scene| {
            let job = async {
                sleep(Duration::from_millis(10)).await;
                sleep(Duration::from_millis(10)).await;
                7
            };
            let first = scene.group.work(Box::pin(job));
            let others = async { scene.others.replace(vec![tokio::spawn(scene.other()), tokio::spawn(scene.other())]) };
            join!(first, others).0
        },
        async |scene, _outcome| {
            for other in scene.others.take() {
                other.await.map_err(|error| error.to_string())?;
            }
            match scene.most.load(Ordering::SeqCst) {
                0 | 1 => Ok(()),
                most => Err(format!("{most} callers do the same work at the same time")),
            }
        },
    );
    verdict::tell(&report);
}
