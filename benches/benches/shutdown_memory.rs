//! The heap memory of a waiting named task, beside a `JoinSet` task and a plain one. These are counts, not times: one
//! run is enough.
#![expect(clippy::print_stdout, reason = "the table is the result")]

use std::alloc::System;
use std::future::pending;

use cancel_safe_shutdown::{TaskGroup, WorkerContext};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tokio::task::JoinSet;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const TASKS: usize = 10_000;

/// Spawns all the tasks, lets each reach its await, and prints the memory of one.
async fn weigh(name: &str, mut spawn: impl FnMut()) {
    let region = Region::new(ALLOCATOR);
    (0..TASKS).for_each(|_| spawn());
    for _ in 0..TASKS {
        tokio::task::yield_now().await;
    }
    let heap = region.change();
    let bytes = heap.bytes_allocated.saturating_sub(heap.bytes_deallocated) / TASKS;
    println!("{name:<44} {bytes:>6} {:>12.2}", heap.allocations as f64 / TASKS as f64);
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    println!("{:<44} {:>6} {:>12}", "", "bytes", "allocations");
    weigh("tokio::spawn", || drop(tokio::spawn(pending::<()>()))).await;
    let mut set = JoinSet::new();
    weigh("JoinSet", || drop(set.spawn(pending::<()>()))).await;
    let group = TaskGroup::new();
    weigh("TaskGroup", || group.spawn("task", pending::<()>()).expect("an open group")).await;
    let told = TaskGroup::new();
    let work = |cx: WorkerContext| async move { cx.cancelled().await };
    weigh("TaskGroup, with a context that it awaits", || told.spawn_with("task", work).expect("an open group")).await;
}
