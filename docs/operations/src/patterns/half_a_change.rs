//! Half of a change
//!
//! Two changes belong together, and there is an await between them. Code between two awaits always runs to completion: wait
//! and check first, change last. Changes that do not fit between two awaits belong in a [critical section](safety.md), a
//! transaction, or a file that is written as a whole.

use std::time::Duration;

use cancel_safe_testing::{Explore, Report};
use tokio::sync::Mutex;
use tokio::time::sleep;

// Broken:
async fn transfer_unsafe(from: &Mutex<u64>, to: &Mutex<u64>, amount: u64) {
    *from.lock().await -= amount;
    expensive_logging().await;
    *to.lock().await += amount;
}

// Mended:
type Balance = Mutex<u64>;

async fn transfer_safe(from: &Balance, to: &Balance, sum: u64) -> Result<(), Refused> {
    // Everybody locks in this order, or two transfers wait for each other.
    let (mut from, mut to) = (from.lock().await, to.lock().await);
    expensive_logging().await;
    let rest = from.checked_sub(sum).ok_or(Refused)?;
    (*from, *to) = (rest, *to + sum); // no await between them
    Ok(())
}

// Judged:
/// The funds are insufficient.
#[derive(Debug)]
struct Refused;

async fn expensive_logging() {
    sleep(Duration::from_millis(10)).await;
}

fn explore(transfer: impl AsyncFn(&(Mutex<u64>, Mutex<u64>))) -> Report {
    Explore::new().paused_time(true).run(
        async || (Mutex::new(100), Mutex::new(0)),
        transfer,
        async |(from, to), _outcome| match *from.lock().await + *to.lock().await {
            100 => Ok(()),
            sum => Err(format!("{sum} of 100 are left")),
        },
    )
}

pub(super) fn broken() -> Report {
    explore(async |(from, to)| transfer_unsafe(from, to, 30).await)
}

pub(super) fn mended() -> Report {
    explore(async |(from, to)| transfer_safe(from, to, 30).await.unwrap())
}
