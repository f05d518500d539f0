//! The same exploration gives the same report, a hundred times out of a hundred, and a run is cheap.

use std::sync::Arc;
use std::time::{Duration, Instant};

use cancel_safe_testing::{Explore, Outcome, Report, Way, scratch_dir};
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio::time::sleep;

const TIMES: usize = 100;

fn assert_repeats(explore: impl Fn() -> Report) {
    let first = explore();
    assert!(first.points() + first.task_points() > 2, "{first}");
    for number in 1..TIMES {
        assert_eq!(explore(), first, "report {number} differs");
    }
}

#[test]
fn file_operations_repeat() {
    // The failures differ from way to way and from point to point, and are found each time.
    assert_repeats(|| {
        Explore::new().budgets([]).run(
            async || scratch_dir(),
            async |directory| {
                tokio::fs::write(directory.join("a"), b"a").await.unwrap();
                tokio::fs::create_dir(directory.join("b")).await.unwrap();
                tokio::fs::remove_file(directory.join("a")).await.unwrap();
            },
            async |directory, _outcome| match (directory.join("a").exists(), directory.join("b").exists()) {
                (false, false) => Ok(()),
                left => Err(format!("left behind: {left:?}")),
            },
        )
    });
}

#[test]
fn synchronisation_and_paused_time_repeat() {
    assert_repeats(|| {
        Explore::new().paused_time(true).budgets([1]).run(
            async || Arc::new(Mutex::new(Vec::new())),
            async |log| {
                let (send, mut receive) = mpsc::channel(1);
                let other = Arc::clone(log);
                let task = tokio::spawn(async move {
                    for number in 0..2 {
                        other.lock().await.push(number);
                        sleep(Duration::from_millis(7)).await;
                        let _ = send.send(number).await;
                    }
                });
                while let Some(number) = receive.recv().await {
                    log.lock().await.push(10 + number);
                }
                drop(task.await);
            },
            async |log, outcome| match (outcome, log.lock().await.as_slice()) {
                (Outcome::Completed(()), [0, 10, 1, 11] | [0, 1, 10, 11]) | (_, []) => Ok(()),
                (_, log) => Err(format!("{log:?}")),
            },
        )
    });
}

#[test]
fn tasks_of_the_operation_repeat() {
    assert_repeats(|| {
        Explore::new().paused_time(true).budgets([]).run(
            async || Arc::new(Mutex::new(Vec::new())),
            async |log| {
                let mut set = JoinSet::new();
                for number in 0..2 {
                    let log = Arc::clone(log);
                    set.spawn(async move {
                        log.lock().await.push(number);
                        sleep(Duration::from_millis(number)).await;
                        let path = scratch_dir().join(number.to_string());
                        drop(tokio::fs::write(path, b"a").await);
                        log.lock().await.push(10 + number);
                    });
                }
                while set.join_next().await.is_some() {}
            },
            async |log, _outcome| match log.lock().await.as_slice() {
                [] | [_, _, _, _] => Ok(()),
                log => Err(format!("{log:?}, {:?}", scratch_dir().read_dir().map(Iterator::count).ok())),
            },
        )
    });
}

#[test]
fn rivals_and_calls_repeat() {
    assert_repeats(|| {
        Explore::new().paused_time(true).budgets([]).suspended(
            async || (Mutex::new(0), scratch_dir()),
            async |(count, directory)| {
                drop(tokio::fs::write(directory.join("a"), b"a").await);
                let mut count = count.lock().await;
                sleep(Duration::from_millis(1)).await;
                *count += 1;
            },
            async |(count, _)| *count.lock().await,
            async |_, outcome, count| if count == 0 || outcome.is_completed() { Ok(()) } else { Err(String::new()) },
        )
    });
    assert_repeats(|| {
        Explore::new().paused_time(true).budgets([]).calls(2).cancel_safe(
            async || {
                let (send, receive) = mpsc::channel(1);
                drop(tokio::spawn(async move { while send.send(1).await.is_ok() {} }));
                (receive, 0)
            },
            async |(receive, sum)| {
                let first = receive.recv().await;
                *sum += first.unwrap_or(0);
                sleep(Duration::from_millis(3)).await;
                *sum
            },
            async |(_, sum)| *sum,
        )
    });
}

#[test]
fn a_run_is_cheap() {
    let started = Instant::now();
    let report = Explore::new().budgets([1, 2, 3]).ways([Way::Eager, Way::Settled, Way::Shutdown]).run(
        async || scratch_dir().join("a"),
        async |path| {
            for _ in 0..10 {
                tokio::fs::write(path, b"a").await.unwrap();
            }
        },
        async |path, _outcome| if path.exists() { Err("left behind".to_owned()) } else { Ok(()) },
    );
    let each = started.elapsed() / u32::try_from(report.runs()).unwrap();
    println!("{each:?} a run, {} runs, {} failures named", report.runs(), report.failures().len());
    // Ten milliseconds on an idle machine; this one may be busy.
    assert!(each < Duration::from_secs(1), "{each:?}");
}
