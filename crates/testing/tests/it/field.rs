//! Tests as users write them: peers in the setup, tasks in the operation, workers on threads. Code that is right in one
//! plain runtime is clean here, and wrong code is found wherever the peer was spawned.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::time::Duration;

use cancel_safe_guard::critical;
use cancel_safe_testing::{Explore, Outcome, Report, Way};
use futures_util::StreamExt as _;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::task::{JoinSet, yield_now};
use tokio::time::{sleep, timeout};

const MS: Duration = Duration::from_millis(1);

fn explore() -> Explore {
    Explore::new().paused_time(true)
}

async fn within_a_minute(future: impl Future<Output = ()>) -> Result<(), String> {
    timeout(Duration::from_secs(60), future).await.map_err(|_| "called again it never ends".to_owned())
}

#[test]
fn a_set_of_tasks_can_be_emptied_after_the_drop() {
    let empty = async |set: &Mutex<JoinSet<u8>>| while set.lock().await.join_next().await.is_some() {};
    for yields in 0..3 {
        explore()
            .run(
                async || {
                    let mut set = JoinSet::new();
                    for number in 0..3 {
                        set.spawn(async move {
                            for _ in 0..yields {
                                yield_now().await;
                            }
                            number
                        });
                    }
                    Mutex::new(set)
                },
                empty,
                async |set, outcome| match outcome {
                    // The tasks end with their runtime, and then there is nothing to wait for.
                    Outcome::Dropped { way: Way::Shutdown, .. } => Ok(()),
                    _ => within_a_minute(empty(set)).await,
                },
            )
            .assert_clean();
    }
}

#[test]
fn a_wake_that_the_runtime_has_put_off_outlives_the_drop() {
    let setup = async || {
        let yielding = (0..2).map(|number| async move {
            yield_now().await;
            number
        });
        Mutex::new(futures_util::stream::iter(yielding).buffered(2))
    };
    // With its runtime such a wake goes too, and the stream with it.
    let report = explore().ways([Way::Eager, Way::Settled]).run(
        setup,
        async |stream| stream.lock().await.next().await,
        async |stream, _outcome| within_a_minute(async { while stream.lock().await.next().await.is_some() {} }).await,
    );
    report.assert_clean();
}

#[test]
fn what_a_peer_in_the_setup_has_sent_is_there_when_all_is_settled() {
    let waiting = Cell::new(0);
    let seen = Cell::new(0);
    let report = explore().budgets([]).ways([Way::Settled]).run(
        async || {
            let (send, receive) = mpsc::unbounded_channel();
            drop(tokio::spawn(async move {
                sleep(MS).await;
                send.send(7).unwrap();
                std::future::pending::<()>().await;
            }));
            Mutex::new(receive)
        },
        async |receive| receive.lock().await.recv().await,
        async |receive, outcome| {
            if let Outcome::Dropped { point: 1, .. } = outcome {
                waiting.set(waiting.get() + 1);
                // No time passes here: the message has arrived or not.
                seen.set(seen.get() + usize::from(receive.lock().await.try_recv().is_ok()));
            }
            Ok(())
        },
    );
    report.assert_clean();
    assert!(waiting.get() > 0);
    assert_eq!(seen.get(), waiting.get());
}

fn transfers_in_children(explore: &Explore, finish: bool) -> Report {
    explore.run(
        async || (Arc::new(AtomicI64::new(60)), Arc::new(AtomicI64::new(40))),
        async |(from, to)| {
            let mut set = JoinSet::new();
            for _ in 0..2 {
                let (from, to) = (Arc::clone(from), Arc::clone(to));
                set.spawn(async move {
                    sleep(MS).await;
                    if finish {
                        from.fetch_sub(10, SeqCst);
                        to.fetch_add(10, SeqCst);
                        return;
                    }
                    from.fetch_sub(10, SeqCst);
                    sleep(MS).await;
                    to.fetch_add(10, SeqCst);
                });
            }
            while set.join_next().await.is_some() {}
        },
        async |(from, to), _outcome| match from.load(SeqCst) + to.load(SeqCst) {
            100 => Ok(()),
            sum => Err(format!("money gone: {sum}")),
        },
    )
}

#[test]
fn a_task_that_dies_between_two_of_its_awaits_is_found() {
    let report = transfers_in_children(&explore(), false);
    let failure = report.failures().iter().find(|it| it.step() > 0);
    let failure = failure.unwrap_or_else(|| panic!("nothing was found between polls of tasks; {report}"));
    assert!(failure.message().starts_with("money gone"), "{report}");
    assert!(report.task_points() > 0);
    let text = failure.to_string();
    assert!(text.contains("polls of tasks") && text.contains("CANCEL_SAFE_ONLY=1+"), "{text}");
    assert!(!text.contains(".only("), "only() knows no step: {text}");
    assert_eq!(transfers_in_children(&explore().tasks(false), false).task_points(), 0);
    transfers_in_children(&explore(), true).assert_clean();
}

#[test]
fn a_task_of_a_task_is_found_too() {
    let report = explore().budgets([]).run(
        async || (Arc::new(AtomicI64::new(60)), Arc::new(AtomicI64::new(40))),
        async |(from, to)| {
            let (from, to) = (Arc::clone(from), Arc::clone(to));
            let mut outer = JoinSet::new();
            outer.spawn(async move {
                let mut inner = JoinSet::new();
                inner.spawn(async move {
                    from.fetch_sub(10, SeqCst);
                    yield_now().await;
                    to.fetch_add(10, SeqCst);
                });
                while inner.join_next().await.is_some() {}
            });
            while outer.join_next().await.is_some() {}
        },
        async |(from, to), _outcome| match from.load(SeqCst) + to.load(SeqCst) {
            100 => Ok(()),
            sum => Err(format!("money gone: {sum}")),
        },
    );
    assert!(report.failures().iter().any(|it| it.step() > 0), "{report}");
}

#[test]
fn the_end_of_a_setups_own_tasks_is_not_held_against_the_code() {
    let ask = |explore: Explore| {
        explore.budgets([]).run(
            async || {
                let (ask, mut asked) = mpsc::channel::<oneshot::Sender<u8>>(1);
                drop(tokio::spawn(async move {
                    while let Some(reply) = asked.recv().await {
                        let _ = reply.send(7);
                    }
                }));
                ask
            },
            async |ask| {
                let (reply, answer) = oneshot::channel();
                drop(ask.send(reply).await);
                drop(answer.await);
            },
            async |ask, _outcome| {
                let (reply, answer) = oneshot::channel();
                ask.send(reply).await.map_err(|_| "the actor is gone".to_owned())?;
                answer.await.map(drop).map_err(|_| "the actor is gone".to_owned())
            },
        )
    };
    let report = ask(explore());
    report.assert_clean();
    assert!(report.notes()[0].starts_with("1 task of the setup ends with its runtime"), "{report}");
    assert!(report.to_string().contains("note: 1 task of the setup"), "{report}");
    let asked_for = ask(explore().ways([Way::Shutdown]));
    assert!(asked_for.failures().iter().all(|it| it.message() == "the actor is gone"), "{asked_for}");
    assert!(!asked_for.is_clean() && asked_for.notes().is_empty(), "{asked_for}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_end_of_a_setups_sockets_is_not_held_against_the_code() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    let report = Explore::new().budgets([]).run(
        async || {
            let (here, there) = tokio::net::UnixStream::pair().unwrap();
            (Mutex::new(here), Mutex::new(there))
        },
        async |_| yield_now().await,
        async |(here, there), _outcome| {
            here.lock().await.write_u8(7).await.map_err(|error| error.to_string())?;
            there.lock().await.read_u8().await.map(drop).map_err(|error| error.to_string())
        },
    );
    report.assert_clean();
    assert!(report.notes()[0].starts_with("2 sockets of the setup end with their runtime"), "{report}");
}

#[test]
fn a_scope_names_the_line_where_it_drops() {
    let line = line!() + 6;
    let report = explore().budgets([]).ways([Way::Scope]).run(
        async || (Cell::new(0), Cell::new(0)),
        async |(begun, done)| {
            critical(sleep(MS)).await;
            begun.set(1);
            sleep(MS).await;
            done.set(1);
        },
        async |(begun, done), outcome| match outcome {
            Outcome::Dropped { point: 0, .. } => Err("it was polled".to_owned()),
            _ if begun.get() == done.get() => Ok(()),
            _ => Err("half".to_owned()),
        },
    );
    assert!(!report.is_clean());
    for failure in report.failures() {
        assert_eq!(failure.message(), "half");
        assert_eq!(failure.site().map(|site| site.line()), Some(line), "{report}");
        assert!(failure.point() > 1, "{failure}");
    }
    // Of the first the scope was cancelled before its first poll.
    assert_eq!(report.failures()[0].point(), 2, "{report}");
    // It is seen again by the point at which the scope was cancelled.
    let text = report.failures()[0].to_string();
    assert!(text.contains("CANCEL_SAFE_ONLY=0:scope:natural"), "{text}");
}

#[test]
fn a_blocking_worker_in_the_setup_gets_a_thread_of_its_own() {
    for workers in [1, 2] {
        let report = Explore::new().budgets([]).run(
            async || {
                let queues = (0..workers).map(|_| {
                    let (ask, asked) = std::sync::mpsc::channel::<oneshot::Sender<u8>>();
                    drop(tokio::task::spawn_blocking(move || {
                        while let Ok(reply) = asked.recv() {
                            let _ = reply.send(7);
                        }
                    }));
                    ask
                });
                queues.collect::<Vec<_>>()
            },
            async |queues| {
                for queue in queues {
                    let (reply, answer) = oneshot::channel();
                    queue.send(reply).unwrap();
                    assert_eq!(answer.await, Ok(7));
                }
                tokio::fs::metadata("/").await.map(drop).unwrap();
            },
            async |_, _outcome| Ok(()),
        );
        report.assert_clean();
        let jobs = if workers == 1 { "1 blocking job did" } else { "2 blocking jobs did" };
        assert!(report.notes().iter().any(|note| note.starts_with(jobs)), "{report}");
    }
}

#[test]
fn a_run_that_begins_anew_with_one_more_thread_has_forgotten_the_first_attempt() {
    let report = Explore::new().budgets([]).ways([Way::Eager]).run(
        async || {
            // Never ends, so that the first attempt is given up.
            let (keep, kept) = std::sync::mpsc::channel::<()>();
            drop(tokio::task::spawn_blocking(move || kept.recv()));
            let file = cancel_safe_testing::scratch_dir().join("file");
            let is_fresh = !file.exists();
            std::fs::write(file, "").unwrap();
            (keep, is_fresh)
        },
        async |_| yield_now().await,
        async |(_, is_fresh), _outcome| if *is_fresh { Ok(()) } else { Err("an old directory".to_owned()) },
    );
    report.assert_clean();
}

#[test]
fn a_future_that_was_made_and_never_polled_is_point_0_of_a_function_that_makes_it() {
    /// Counts when it is called, not when it is polled.
    fn count_at_once(count: &Cell<u32>) -> impl Future<Output = ()> {
        count.set(count.get() + 1);
        yield_now()
    }
    let seen = |report: Report| report.failures().iter().any(|it| it.point() == 0 && it.message() == "counted");
    let check = async |count: &Cell<u32>, outcome: Outcome<()>| match outcome {
        Outcome::Dropped { point: 0, .. } if count.get() > 0 => Err("counted".to_owned()),
        _ => Ok(()),
    };
    assert!(seen(explore().budgets([]).run(async || Cell::new(0), count_at_once, check)));
    // The body of an async closure has not begun at point 0, so what it would call was not called.
    assert!(!seen(explore().budgets([]).run(async || Cell::new(0), async |count| count_at_once(count).await, check)));
}

#[test]
fn a_change_before_the_first_leaf_is_found_although_the_leaf_is_ready() {
    let line = line!() + 5;
    let report = explore().run(
        async || (Mutex::new(()), Cell::new(0)),
        async |(lock, step)| {
            step.set(1);
            drop(lock.lock().await);
            step.set(2);
        },
        async |(_, step), _outcome| if step.get() == 1 { Err("half".to_owned()) } else { Ok(()) },
    );
    crate::assert_caught(&report, file!(), line, "half");
}

#[test]
fn blocking_jobs_that_wait_for_the_operation_or_for_each_other_are_no_hang() {
    let fine = |report: Report| assert!(report.failures().is_empty(), "{report}");
    let explore = || Explore::new().budgets([]);
    // The job ends when the operation allows it.
    fine(explore().run(
        async || (),
        async |()| {
            let (send, mut receive) = mpsc::channel(1);
            let job = tokio::task::spawn_blocking(move || while receive.blocking_recv().is_some() {});
            for number in 0..3 {
                send.send(number).await.unwrap();
            }
            drop(send);
            job.await.unwrap();
        },
        async |(), _outcome| Ok(()),
    ));
    // The job needs another one.
    fine(explore().run(
        async || (),
        async |()| {
            let handle = tokio::runtime::Handle::current();
            let job = tokio::task::spawn_blocking(move || handle.block_on(tokio::fs::metadata("/")).is_ok());
            assert!(job.await.unwrap());
        },
        async |(), _outcome| Ok(()),
    ));
    // The job waits for what the operation holds.
    fine(explore().run(
        async || Arc::new(Mutex::new(())),
        async |lock| {
            let guard = lock.lock().await;
            let other = Arc::clone(lock);
            let job = tokio::task::spawn_blocking(move || drop(other.blocking_lock()));
            sleep(MS).await;
            drop(guard);
            job.await.unwrap();
        },
        async |_lock, _outcome| Ok(()),
    ));
}

#[test]
fn a_task_of_the_setup_that_spins_does_not_starve_blocking_jobs() {
    let report = Explore::new().budgets([]).ways([Way::Eager]).run(
        async || {
            drop(tokio::spawn(async {
                loop {
                    yield_now().await;
                }
            }));
        },
        async |()| tokio::fs::metadata("/").await.map(drop).unwrap(),
        async |(), _outcome| Ok(()),
    );
    report.assert_clean();
}

#[test]
fn a_failure_of_a_run_that_completed_panicked_or_hung_is_seen_again_too() {
    let again = |report: &Report, explore: &dyn Fn(Explore) -> Report| {
        let failure = &report.failures()[0];
        let text = failure.to_string();
        let (_, only) = text.rsplit_once("CANCEL_SAFE_ONLY=").unwrap();
        let point = only.split(':').next().unwrap().parse().unwrap();
        let seen = explore(Explore::new().hang_after(100 * MS).only(point, failure.way(), failure.budget()));
        assert_eq!(seen.failures().first().map(|it| it.message()), Some(failure.message()), "{text}");
    };
    let refused = |explore: Explore| {
        explore.run(
            async || (),
            async |()| yield_now().await,
            async |(), outcome| if outcome.is_completed() { Err("no".to_owned()) } else { Ok(()) },
        )
    };
    again(&refused(Explore::new()), &refused);
    let panics = |explore: Explore| {
        explore.run(
            async || (),
            async |()| {
                yield_now().await;
                panic!("out of cheese")
            },
            async |(), _: Outcome<()>| Ok(()),
        )
    };
    let report = panics(Explore::new());
    assert!(report.failures()[0].to_string().starts_with("panicked after it had waited at"), "{report}");
    again(&report, &panics);
    let hangs = |explore: Explore| {
        explore.run(
            async || (),
            async |()| {
                yield_now().await;
                std::future::pending::<()>().await;
            },
            async |(), _| Ok(()),
        )
    };
    again(&hangs(Explore::new().hang_after(100 * MS)), &hangs);
}

#[cfg(target_os = "linux")]
#[test]
fn an_exploration_leaves_no_descriptor_open() {
    const CHILD: &str = "CANCEL_SAFE_TEST_DESCRIPTORS";
    let here = "field::an_exploration_leaves_no_descriptor_open";
    if std::env::var_os(CHILD).is_none() {
        // Alone in its process, because other tests have their own descriptors.
        assert!(crate::run_again(here, &[(CHILD, "")]).status.success());
        return;
    }
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let explore = |explore: Explore| {
        let check = async |_: &Mutex<u8>, _: Outcome<()>| Ok(());
        let operation = async |lock: &Mutex<u8>| {
            let _guard = lock.lock().await;
            drop(tokio::fs::metadata("/").await);
            drop(tokio::spawn(sleep(MS)).await);
        };
        explore.run(async || Mutex::new(0), operation, check).assert_clean();
        let rival = async |_: &Mutex<u8>| sleep(3 * MS).await;
        drop(explore.suspended(async || Mutex::new(0), operation, rival, async |_, _, ()| Ok(())));
        drop(explore.cancel_safe(async || Mutex::new(0), async |lock| operation(lock).await, async |_| ()));
        let hung = async |_: &Mutex<u8>| std::future::pending::<()>().await;
        drop(explore.clone().hang_after(50 * MS).run(async || Mutex::new(0), hung, check));
        // In about half of the cases the limit ends during a wait for a blocking job.
        for begins in (150..190).step_by(8) {
            let hung = async |_: &Mutex<u8>| {
                drop(tokio::spawn(async move {
                    sleep(begins * MS).await;
                    drop(tokio::task::spawn_blocking(|| std::thread::park_timeout(150 * MS)));
                }));
                std::future::pending::<()>().await;
            };
            let explore = explore.clone().paused_time(false).tasks(false).budgets([]).hang_after(200 * MS);
            drop(explore.only(2, Way::Eager, None).run(async || Mutex::new(0), hung, check));
        }
    };
    explore(Explore::new());
    let before = open();
    for paused in [true, false] {
        explore(Explore::new().paused_time(paused));
    }
    // A blocking thread that is just ending may hold its runtime for a moment.
    let limit = std::time::Instant::now() + Duration::from_secs(30);
    while open() > before && std::time::Instant::now() < limit {
        std::thread::park_timeout(MS);
    }
    assert!(open() <= before, "{} descriptors, and {before} before", open());
}
