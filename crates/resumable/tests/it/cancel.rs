//! Every operation, dropped at every await point and started again at once.

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
};

use cancel_safe_resumable::{FileStore, ResumableTask, TaskError, map};
use cancel_safe_testing::{Explore, Outcome, Report, Way, scratch_dir};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::support::in_full;

const ITEMS: u64 = 4;

/// How often each item ran to its end, over all runs of one checkpoint.
struct Scene {
    path: PathBuf,
    ends: RefCell<[u32; ITEMS as usize]>,
}

impl Scene {
    fn new() -> Self {
        Self { path: scratch_dir().join("job.ckpt"), ends: RefCell::default() }
    }

    async fn work(&self, x: u64) -> u64 {
        tokio::task::yield_now().await;
        self.ends.borrow_mut()[x as usize] += 1;
        x * 2
    }
}

/// Drops a computation at every point, starts it again at once, and checks that its results are right and that no
/// completed item ran again: completed items are recorded, however the run ends.
fn explore(computation: impl AsyncFn(&Scene) -> Result<Vec<u64>, String>) -> Report {
    Explore::new().run(
        async || Scene::new(),
        &computation,
        async |scene, outcome| {
            let expected: Vec<u64> = (0..ITEMS).map(|x| x * 2).collect();
            if let Outcome::Completed(results) = outcome
                && results.as_ref() != Ok(&expected)
            {
                return Err(format!("completed with {results:?}"));
            }
            let again = computation(scene).await;
            if again.as_ref() != Ok(&expected) {
                return Err(format!("started again: {again:?}"));
            }
            let ends = scene.ends.borrow();
            if ends.iter().any(|times| *times != 1) {
                return Err(format!("the items came to their end {ends:?} times"));
            }
            Ok(())
        },
    )
}

async fn process(scene: &Scene) -> Result<Vec<u64>, String> {
    let mut task = ResumableTask::new((0..ITEMS).collect(), scene.path.clone(), CancellationToken::new());
    task.process(|x| scene.work(x)).await.map_err(|error| error.to_string())
}

#[test]
fn a_dropped_process_goes_on_without_running_anything_twice() {
    explore(process).publish("resumable", "ResumableTask::process").assert_clean();
}

#[test]
fn a_dropped_map_goes_on_without_running_anything_twice() {
    let computation =
        async |scene: &Scene| map(&scene.path, 0..ITEMS, |x| scene.work(x)).await.map_err(|error| error.to_string());
    explore(computation).publish("resumable", "map").assert_clean();
}

/// The tutorials' scheme: all results are rewritten as JSON at a fixed interval of items.
async fn rewritten_json(scene: &Scene) -> Result<Vec<u64>, String> {
    let read = tokio::fs::read(&scene.path).await.unwrap_or_default();
    let mut results: Vec<u64> = serde_json::from_slice(&read).unwrap_or_default();
    for x in results.len() as u64..ITEMS {
        results.push(scene.work(x).await);
        if results.len() % 2 == 1 {
            continue;
        }
        let text = serde_json::to_vec(&results).map_err(|error| error.to_string())?;
        tokio::fs::write(&scene.path, text).await.map_err(|error| error.to_string())?;
    }
    Ok(results)
}

#[test]
fn the_same_check_catches_a_rewritten_json_file() {
    let report = explore(rewritten_json);
    assert!(!report.is_clean(), "the broken twin must be caught: {report}");
}

/// A run whose items need no borrowed state, so that it can be dropped and seen from outside.
async fn run(path: &Path) -> Result<Vec<u64>, TaskError> {
    let builder = ResumableTask::builder("run").store(FileStore::at(path)).concurrency(2).ordered();
    let mut run = builder.stream(0..ITEMS, |_, x| async move {
        tokio::task::yield_now().await;
        Ok(x * 2)
    });
    let mut results = Vec::new();
    while let Some(done) = run.next().await {
        results.extend(done.result.ok());
    }
    run.finish().await.map(|_| results)
}

/// Drops a run in some ways and checks that it continues to the right results.
fn explore_run(ways: &[Way], operation: impl AsyncFn(&Path) -> Result<Vec<u64>, TaskError>) -> Report {
    explore_as(&Explore::new().ways(ways.iter().copied()), operation)
}

fn explore_as(explore: &Explore, operation: impl AsyncFn(&Path) -> Result<Vec<u64>, TaskError>) -> Report {
    explore.run(
        async || scratch_dir().join("job.ckpt"),
        async |path| operation(path).await,
        async |path, _| match run(path).await {
            Ok(results) if results == [0, 2, 4, 6] => Ok(()),
            other => Err(format!("started again: {other:?}")),
        },
    )
}

#[test]
fn a_dropped_run_goes_on() {
    let ways = [Way::Eager, Way::Settled, Way::Shutdown, Way::Panic];
    explore_run(&ways, run).publish("resumable", "Run::next").assert_clean();
}

#[test]
fn a_dropped_finish_goes_on() {
    let finish = async |path: &Path| {
        let builder = ResumableTask::builder("run").store(FileStore::at(path)).concurrency(2);
        let run = builder.stream(0..ITEMS, |_, x| async move {
            tokio::task::yield_now().await;
            Ok(x * 2)
        });
        run.finish().await.map(|_| Vec::new())
    };
    let ways = [Way::Eager, Way::Settled, Way::Shutdown];
    explore_run(&ways, finish).publish("resumable", "Run::finish").assert_clean();
}

#[test]
fn a_dropped_run_of_tasks_goes_on() {
    let tasks = async |path: &Path| {
        let builder = ResumableTask::builder("run").store(FileStore::at(path)).parallel(2).ordered();
        let mut run = builder.stream(0..ITEMS, |_, x| async move {
            tokio::task::yield_now().await;
            Ok(x * 2)
        });
        let mut results = Vec::new();
        while let Some(done) = run.next().await {
            results.extend(done.result.ok());
        }
        run.finish().await.map(|_| results)
    };
    let ways = [Way::Eager, Way::Settled, Way::Shutdown];
    explore_run(&ways, tasks).publish("resumable", "Run::next(parallel)").assert_clean();
}

#[test]
fn a_dropped_collect_goes_on() {
    let collect = async |path: &Path| {
        let builder = ResumableTask::builder("run").store(FileStore::at(path)).concurrency(2);
        let work = |_, x| async move {
            tokio::task::yield_now().await;
            Ok(x * 2)
        };
        builder.collect(0..ITEMS, work).await
    };
    let ways = [Way::Eager, Way::Settled, Way::Shutdown, Way::Panic];
    explore_run(&ways, collect).publish("resumable", "Builder::collect").assert_clean();
}

#[test]
fn a_run_that_crashed_goes_on() {
    // A process for each point. A starved budget stops at the same points that the other ways visit.
    let budgets = if in_full() { 0..4 } else { 0..0 };
    let explore = Explore::new().ways([Way::Crash]).budgets(budgets);
    explore_as(&explore, run).publish("resumable", "Run::next(crash)").assert_clean();
}
