//! Ten jobs of one import, with a second for all of them, and every way in which a job can end.
//!
//! ```text
//! cargo run -p cancel-safe-shutdown --example jobs
//! ```
//!
//! Jobs complete, fail, panic, are dropped, stop when they are told to, or ignore it. At the deadline the group ends
//! them all, and the result names each job once. If one is missing, the exit code is 1.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::process::ExitCode;
use std::time::Duration;

use cancel_safe_shutdown::{BoxError, Rejected, TaskGroup, WorkerContext};
use tokio::time::{Instant, sleep};

/// Reads pages until it is told to stop; then it keeps what it has.
async fn follow(cx: WorkerContext) {
    let mut pages = 0;
    while cx.token().run_until_cancelled(sleep(Duration::from_millis(300))).await.is_some() {
        pages += 1;
    }
    let why = cx.reason().map(|reason| reason.to_string()).unwrap_or_default();
    println!("follow: told to stop ({why}), {pages} pages kept");
}

/// Starts the jobs, each by its name.
fn start(group: &TaskGroup) -> Result<(), Box<dyn std::error::Error>> {
    for part in 1..=5_u64 {
        group.spawn(format!("part {part}"), sleep(Duration::from_millis(100 * part)))?;
    }
    group.spawn("parse", async { Err::<(), BoxError>("line 3: no such column".into()) })?;
    group.spawn("index", async { panic!("the index has no root") })?;
    // Without a context, a job is dropped at its next await.
    group.spawn("upload", sleep(Duration::from_secs(3_600)))?;
    // With one it is told, and has the grace.
    group.spawn_with("follow", follow)?;
    group.spawn_with("stubborn", |_cx| sleep(Duration::from_secs(3_600)))?;
    Ok(())
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn std::error::Error>> {
    // The panic is in the result, with its message.
    std::panic::set_hook(Box::new(|_| ()));
    let begun = Instant::now();
    let group = TaskGroup::new().grace(Duration::from_millis(300));
    start(&group)?;
    sleep(Duration::from_secs(1)).await;
    group.cancel_all_because("the second is over").await;

    // A cancelled group is closed, and gives back what it does not run.
    let refused: Result<(), Rejected<_>> = group.spawn("late", sleep(Duration::ZERO));
    println!("late: {}", refused.map_or_else(|rejected| rejected.to_string(), |()| "started".to_owned()));

    let result = group.wait().await;
    println!("completed: {}", result.completed.join(", "));
    println!("cancelled: {}", result.cancelled.join(", "));
    for (job, error) in &result.failed {
        println!("failed:    {job}: {error}");
    }
    for (job, message) in &result.panicked {
        println!("panicked:  {job}: {message}");
    }
    for straggler in &result.stragglers {
        println!("straggler: {straggler}");
    }
    println!("after {:.1} s", begun.elapsed().as_secs_f64());

    let ends = [result.completed.len(), result.cancelled.len(), result.failed.len(), result.panicked.len()];
    let as_promised = ends == [6, 1, 1, 1] && result.stragglers.len() == 1;
    Ok(if as_promised { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
