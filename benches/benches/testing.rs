//! The cost of each question of `cancel-safe-testing`, on operations of 50 and 200 awaits with paused time.
//!
//! The work of one exploration is fixed, and takes seconds, so each is timed as a whole; the best of three runs counts.

#![expect(clippy::print_stdout, reason = "the figures are printed")]

use std::time::{Duration, Instant};

use cancel_safe_testing::{Explore, Report};
use tokio::task::JoinSet;
use tokio::time::sleep;

const TIMES: usize = 3;

async fn awaits(count: usize) {
    for _ in 0..count {
        sleep(Duration::from_millis(1)).await;
    }
}

/// The same number of awaits, in two tasks.
async fn awaits_in_tasks(count: usize) {
    let mut set = JoinSet::new();
    for _ in 0..2 {
        set.spawn(awaits(count / 2));
    }
    while set.join_next().await.is_some() {}
}

fn explore() -> Explore {
    Explore::new().paused_time(true).budgets([]).timeout(Duration::from_secs(600))
}

fn main() {
    println!("{:<34}{:>8}{:>8}{:>8}{:>12}{:>12}", "question", "awaits", "points", "runs", "ms", "ms a run");
    for count in [50, 200] {
        time("run", count, &|| explore().run(async || (), async |()| awaits(count).await, async |(), _| Ok(())));
        time("run, starved too (1, 2, 3)", count, &|| {
            let starved = explore().budgets([1, 2, 3]);
            starved.run(async || (), async |()| awaits(count).await, async |(), _| Ok(()))
        });
        time("run, of two tasks", count, &|| {
            explore().run(async || (), async |()| awaits_in_tasks(count).await, async |(), _| Ok(()))
        });
        time("cancel_safe", count, &|| {
            // Each call waits once, so that calls that are dropped again and again still end.
            let calls = explore().calls(count);
            let wait = async |interval: &mut tokio::time::Interval| {
                interval.tick().await;
            };
            calls.cancel_safe(async || tokio::time::interval(Duration::from_millis(1)), wait, async |_| ())
        });
        time("suspended", count, &|| {
            let rival = async |(): &()| sleep(Duration::from_millis(1)).await;
            explore().suspended(async || (), async |()| awaits(count).await, rival, async |(), _, ()| Ok(()))
        });
    }
}

fn time(question: &str, awaits: usize, explore: &dyn Fn() -> Report) {
    let mut least = Duration::MAX;
    let mut counts = (0, 0);
    for _ in 0..TIMES {
        let begun = Instant::now();
        let report = explore();
        least = least.min(begun.elapsed());
        report.assert_clean();
        counts = (report.points() + report.task_points(), report.runs());
    }
    let (points, runs) = counts;
    let ms = least.as_secs_f64() * 1e3;
    let each = ms / f64::from(u32::try_from(runs).unwrap_or(u32::MAX));
    println!("{question:<34}{awaits:>8}{points:>8}{runs:>8}{ms:>12.0}{each:>12.2}");
}
