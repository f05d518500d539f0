//! `try_join!` and the sibling
//!
//! `tokio::try_join!` returns at the first error and drops the other branches where they stand.
//! `guard::join_then_try` runs all of them to their ends and then returns the first error. No cancellation is needed for
//! this to go wrong: a branch fails, and nothing drops the whole.

use std::cell::Cell;
use std::time::Duration;

use cancel_safe_guard::join_then_try;
use cancel_safe_testing::{Explore, Outcome, Report};
use tokio::time::sleep;

// Broken:
async fn save_both_bad(pair: &Pair) -> Result<(), &'static str> {
    tokio::try_join!(pair.save(), refused()).map(drop)
}

// Mended:
async fn save_both_good(pair: &Pair) -> Result<(), &'static str> {
    join_then_try((pair.save(), refused())).await.map(drop)
}

// Judged:
#[derive(Default)]
struct Pair {
    left: Cell<u32>,
    right: Cell<u32>,
}

impl Pair {
    async fn save(&self) -> Result<(), &'static str> {
        self.left.set(1);
        sleep(Duration::from_millis(20)).await;
        self.right.set(1);
        Ok(())
    }
}

async fn refused() -> Result<(), &'static str> {
    sleep(Duration::from_millis(10)).await;
    Err("no route to host")
}

fn explore(save: impl AsyncFn(&Pair) -> Result<(), &'static str>) -> Report {
    // A drop of the whole drops both branches in either case, so only an answer is judged.
    Explore::new().paused_time(true).run(
        async || Pair::default(),
        save,
        async |pair, outcome| match (outcome, pair.left.get() == pair.right.get()) {
            (Outcome::Completed(Err(error)), false) => Err(format!("{error:?} is told, and half of the pair is saved")),
            _ => Ok(()),
        },
    )
}

pub(super) fn broken() -> Report {
    explore(save_both_bad)
}

pub(super) fn mended() -> Report {
    explore(save_both_good)
}
