//! A server that is stopped while its requests are running, and what it must still do for each of them.
//!
//! ```text
//! cargo run -p cancel-safe-guard --example cleanup
//! ```
//!
//! Each request counts itself (a drop guard), borrows a lease (a deferred asynchronous clean-up) and writes its record
//! (a shield). All requests are aborted at once; the drain before the end waits for what they owe. If a lease or a
//! record that was begun is lost, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cancel_safe_guard::{Guard, Reaper};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What the outside world has seen of the server.
#[derive(Default)]
struct World {
    running: AtomicU64,
    leases: AtomicU64,
    begun: AtomicU64,
    written: AtomicU64,
}

async fn request(world: Arc<World>, reaper: Reaper, number: u64) {
    // Counted down on every way out: a return, a panic, a drop.
    world.running.fetch_add(1, Ordering::Relaxed);
    let counted = Arc::clone(&world);
    let _running = Guard::new(move || {
        counted.running.fetch_sub(1, Ordering::Relaxed);
    });
    // Given back on every way out too, although that takes an await.
    world.leases.fetch_add(1, Ordering::Relaxed);
    let borrowed = Arc::clone(&world);
    let _lease = reaper.defer(move || async move {
        sleep(Duration::from_millis(3)).await;
        borrowed.leases.fetch_sub(1, Ordering::Relaxed);
    });
    sleep(Duration::from_millis(number % 20)).await;
    // Once begun, it is finished, whoever drops this request.
    let record = Arc::clone(&world);
    reaper
        .shield(async move {
            record.begun.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(5)).await;
            record.written.fetch_add(1, Ordering::Relaxed);
        })
        .await;
    sleep(Duration::from_secs(60)).await; // the rest of its work
}

#[tokio::main]
async fn main() -> ExitCode {
    let (world, reaper) = (Arc::new(World::default()), Reaper::new());
    let mut requests = JoinSet::new();
    for number in 0..200 {
        requests.spawn(request(Arc::clone(&world), reaper.clone(), number));
    }
    sleep(Duration::from_millis(10)).await;
    requests.shutdown().await;

    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "stopped: {} requests running, {} leases out, {} of {} records written",
        count(&world.running),
        count(&world.leases),
        count(&world.written),
        count(&world.begun),
    );
    let drain = reaper.drain(Duration::from_secs(5)).await;
    println!(
        "drained: {} requests running, {} leases out, {} of {} records written ({} finished, {} late, {} lost)",
        count(&world.running),
        count(&world.leases),
        count(&world.written),
        count(&world.begun),
        drain.finished,
        drain.timed_out,
        drain.lost,
    );
    let nothing_is_owed = count(&world.leases) == 0 && count(&world.written) == count(&world.begun);
    if drain.is_clean() && nothing_is_owed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
