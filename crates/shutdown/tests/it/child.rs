//! The programs that run as child processes and get signals. Each prints READY when it is where the test wants it.
#![expect(clippy::print_stderr, reason = "a program talks to its test")]

use std::future::pending;
use std::io::{Read, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cancel_safe_shutdown::{Application, Phase, Report, Restart, Signal, StopReason, WorkerContext};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::stdio::{dup2_stderr, dup2_stdout};
use tokio::runtime::Builder;

/// The variable that turns this test binary into one of the programs.
pub(crate) const PROGRAM: &str = "SHUTDOWN_TEST_PROGRAM";
/// The deadline of the programs that run into it.
pub(crate) const DEADLINE: Duration = Duration::from_millis(800);
/// How long the programs that must be stopped would continue.
pub(crate) const STALL: Duration = Duration::from_secs(60);
/// The number of workers in programs with many.
pub(crate) const MANY: usize = 10_000;
/// A deadline that nobody waits for.
const FAR: Duration = Duration::from_secs(600);

/// Does nothing as a test. If [`PROGRAM`] is set, this process is the program of that name.
#[test]
fn child_program() {
    let Ok(name) = std::env::var(PROGRAM) else { return };
    let (_, program) = PROGRAMS.iter().find(|(known, _)| *known == name).unwrap();
    let code = program();
    // A test cannot return its exit code the way a `main` does.
    let number = (0..=u8::MAX).find(|number| ExitCode::from(*number) == code).unwrap();
    std::process::exit(number.into());
}

type Program = fn() -> ExitCode;

const PROGRAMS: &[(&str, Program)] = &[
    ("cooperative", || app(FAR).worker("good", cooperative).run()),
    ("early", early),
    ("ignores", || app(DEADLINE).worker("good", cooperative).worker("deaf", deaf).run()),
    ("ignores for long", || app(FAR).worker("deaf", deaf).run()),
    ("drains", || app(FAR).worker("drain", drains).run()),
    ("is impatient", || app(FAR).second_signal_after(Duration::ZERO).worker("deaf", deaf).run()),
    ("panics", || app(FAR).worker("good", cooperative).worker("broken", panics).run()),
    ("fails", || app(FAR).worker("good", cooperative).worker("broken", fails).run()),
    ("blocks in a group", || app(DEADLINE).worker("hasher", blocks_in_a_group).run()),
    ("blocks elsewhere", || app(DEADLINE).worker("hasher", blocks_elsewhere).run()),
    ("spins on many threads", || app(DEADLINE).worker("spin", spins).run()),
    ("spins on one thread", || app(DEADLINE).runtime(Builder::new_current_thread()).worker("spin", spins).run()),
    ("spins for long", || app(FAR).runtime(Builder::new_current_thread()).worker("spin", spins).run()),
    ("drops slowly", || app(DEADLINE).runtime(Builder::new_current_thread()).worker("slow", drops_slowly).run()),
    ("stops itself and spins", stops_itself_and_spins),
    ("pauses the clock", || {
        app(DEADLINE).runtime(Builder::new_current_thread()).worker("frozen", pauses_the_clock).run()
    }),
    ("reports for ever", || Application::new("child").worker("good", cooperative).on_report(|_| stall(STALL)).run()),
    ("reports for ever at the deadline", || {
        let app = Application::new("child").shutdown_timeout(DEADLINE).worker("deaf", deaf);
        app.on_report(|_| stall(STALL)).run()
    }),
    ("reports slowly at the deadline", || {
        let app = Application::new("child").shutdown_timeout(DEADLINE).worker("deaf", deaf);
        let slow = |report: &Report| {
            stall(Duration::from_millis(100));
            eprintln!("{report}");
        };
        app.on_report(slow).run()
    }),
    ("overrides the code", || overriding(DEADLINE).worker("good", cooperative).run()),
    ("overrides the code of a straggler", || overriding(DEADLINE).worker("deaf", deaf).run()),
    ("reports when told twice", || {
        let app = Application::new("child").shutdown_timeout(FAR).worker("good", cooperative);
        let app = app.second_signal_after(Duration::ZERO);
        let slow = |_: &Report| {
            eprintln!("REPORTING");
            stall(STALL);
        };
        app.on_report(slow).run()
    }),
    ("serves", || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let report = runtime.block_on(app(FAR).worker("deaf", deaf).serve()).unwrap();
        eprintln!("RETURNED");
        ExitCode::from(report.exit_code())
    }),
    ("completes", || app(FAR).worker("one", |_: WorkerContext| async {}).run()),
    ("runs inside a runtime", || {
        Builder::new_current_thread().build().unwrap().block_on(async { app(FAR).worker("good", cooperative).run() })
    }),
    #[cfg(feature = "tracing")]
    ("logs for ever", || {
        tracing::subscriber::set_global_default(Deaf).unwrap();
        Application::new("child").shutdown_timeout(DEADLINE).worker("deaf", deaf).run()
    }),
    ("wedges one of 1 threads", || wedged(threads(1)).run()),
    ("wedges one of 2 threads", || wedged(threads(2)).shutdown_timeout(FAR).run()),
    ("wedges one of 4 threads", || wedged(threads(4)).shutdown_timeout(FAR).run()),
    ("wedges the current thread", || wedged(Builder::new_current_thread()).run()),
    ("wedges the current thread before a closure", || {
        let app = app(DEADLINE * 2).runtime(Builder::new_current_thread());
        app.phase("storage", |phase| phase.worker("db", journals)).phase("ingress", wedge).run()
    }),
    ("spins without a name on one thread", || {
        let app = app(DEADLINE).runtime(Builder::new_current_thread());
        app.worker("innocent", spins_without_a_name).run()
    }),
    ("spins without a name on many threads", || app(DEADLINE).worker("innocent", spins_without_a_name).run()),
    ("blocks without a name", || app(DEADLINE).worker("hasher", |cx| blocks_without_a_name(cx, STALL)).run()),
    ("blocks without a name for a moment", || {
        app(FAR).worker("hasher", |cx| blocks_without_a_name(cx, DEADLINE)).run()
    }),
    ("parks without a name", || app(FAR).worker("pool", parks_without_a_name).run()),
    ("fails in silence", || {
        let stamp = |_: WorkerContext| async { Err::<(), _>(std::io::Error::other("disk full")) };
        Application::new("clock").worker("stamp", stamp).run()
    }),
    ("stops in silence", || Application::new("child").worker("good", cooperative).run()),
    ("completes in silence", || Application::new("child").worker("one", |_: WorkerContext| async {}).run()),
    ("is deaf in silence", || Application::new("child").shutdown_timeout(DEADLINE).worker("deaf", deaf).run()),
    ("runs inside a runtime in silence", || {
        let runtime = Builder::new_current_thread().build().unwrap();
        runtime.block_on(async { Application::new("child").worker("good", cooperative).run() })
    }),
    ("is deaf behind a full pipe", || {
        let app = Application::new("child").shutdown_timeout(DEADLINE);
        app.worker("deaf", fills_the_standard_error).run()
    }),
    ("has many that are deaf", || {
        let app = app(DEADLINE).runtime(Builder::new_current_thread());
        let deaf = |_: WorkerContext| pending::<()>();
        let app = (0..MANY).fold(app, |app, number| app.worker(format!("deaf {number}"), deaf));
        app.worker("good", cooperative).run()
    }),
    ("reloads", || {
        let app = app(FAR).on_signal(Signal::Hangup, |cx| eprintln!("RELOADED {:?}", cx.signal()));
        app.worker("good", cooperative).run()
    }),
    ("acts badly", || {
        let app = app(FAR).on_signal(Signal::User1, |_| panic!("in an action"));
        let app = app.on_signal(Signal::User2, |_| {
            eprintln!("ACTING");
            stall(STALL);
        });
        app.worker("good", cooperative).run()
    }),
    ("is looked at", || {
        let app = app(FAR).phase("first", |phase| phase.worker("parked", marks).ready_within(FAR));
        app.worker("spin", spins).run()
    }),
    ("reads its mask", || {
        let app = app(FAR).on_signal(Signal::Hangup, |_| eprintln!("RELOADED"));
        app.worker("good", cooperative).run()
    }),
    ("wedges its start", || {
        let app = app(DEADLINE).runtime(Builder::new_current_thread());
        let app = app.phase("storage", |phase| phase.worker("spin", spins).ready_within(FAR));
        app.phase("ingress", |phase| phase.worker("good", cooperative)).run()
    }),
    ("service", || {
        // Its output is for the test.
        dup2_stdout(std::io::stderr()).unwrap();
        crate::service::main()
    }),
    ("drains before it stops", || drains_later().run()),
    ("drains for long", || drains_later().drain_delay(STALL).run()),
    ("drains before it stops, also for a person", || drains_later().drain_on_interrupt().run()),
    ("becomes ready when told", becomes_ready_when_told),
    ("wedges when told", wedges_when_told),
    ("lists its threads", || app(FAR).worker("lists", lists_its_threads).run()),
    ("fails past its restarts", || {
        let policy = Restart::OnFailure.intensity(2, FAR).backoff(Duration::from_millis(1), Duration::from_millis(2));
        app(FAR).restart(policy).worker("good", cooperative).worker("broken", fails).run()
    }),
];

fn app(deadline: Duration) -> Application {
    Application::new("child").shutdown_timeout(deadline).on_report(|report| eprintln!("{report}"))
}

fn overriding(deadline: Duration) -> Application {
    app(deadline).exit_code(|report| match report.reason() {
        StopReason::Signal(number) => u8::try_from(128 + number).ok(),
        _ => None,
    })
}

/// Continues for its drain delay.
fn drains_later() -> Application {
    app(FAR).drain_delay(DEADLINE).worker("good", cooperative)
}

/// A runtime with `number` threads.
fn threads(number: usize) -> Builder {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(number);
    builder
}

/// A database to flush after a phase whose worker stops yielding.
fn wedged(runtime: Builder) -> Application {
    app(DEADLINE * 2).runtime(runtime).phase("storage", |phase| phase.worker("db", flushes)).phase("ingress", wedge)
}

/// A worker that takes its thread for itself.
fn wedge(phase: Phase) -> Phase {
    let spin = |cx: WorkerContext| async move {
        ready();
        // Once timers have been at work here.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let begun = Instant::now();
        while begun.elapsed() < STALL && !cx.is_cancelled() {}
        eprintln!("SPIN TOLD");
        stall(STALL);
    };
    phase.worker("spin", spin).timeout(Duration::from_millis(500))
}

/// Works a millisecond at a time.
async fn flushes(cx: WorkerContext) {
    let token = cx.token();
    while token.run_until_cancelled(tokio::time::sleep(Duration::from_millis(1))).await.is_some() {}
    eprintln!("DB FLUSHED");
}

/// Does its work in a closure, which no wedged runtime can hold up.
async fn journals(cx: WorkerContext) {
    let group = cx.group();
    let journal = |cx: WorkerContext| {
        while !cx.is_cancelled() {
            stall(Duration::from_millis(1));
        }
        eprintln!("CLOSURE FLUSHED");
    };
    group.spawn_blocking("journal", journal).unwrap();
    cx.cancelled().await;
    drop(group.wait().await);
}

async fn spins_without_a_name(cx: WorkerContext) {
    drop(tokio::spawn(async {
        ready();
        stall(STALL);
    }));
    cx.cancelled().await;
}

async fn blocks_without_a_name(cx: WorkerContext, time: Duration) {
    let hash = move || {
        ready();
        stall(time);
        eprintln!("WRITTEN");
    };
    drop(tokio::task::spawn_blocking(hash));
    cx.cancelled().await;
}

async fn parks_without_a_name(cx: WorkerContext) {
    for _ in 0..3 {
        drop(tokio::spawn(pending::<()>()));
    }
    ready();
    cx.cancelled().await;
}

/// From now on, writes to a full pipe that nobody reads.
async fn fills_the_standard_error(cx: WorkerContext) {
    let (_reader, mut writer) = std::io::pipe().unwrap();
    ready();
    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
    while writer.write(&[b'.'; 4096]).is_ok() {}
    fcntl_setfl(&writer, OFlags::empty()).unwrap();
    dup2_stderr(&writer).unwrap();
    cx.cancelled().await;
    pending().await
}

fn ready() {
    eprintln!("READY");
}

#[expect(clippy::disallowed_methods, reason = "a blocked thread is what the program is about")]
fn stall(duration: Duration) {
    std::thread::sleep(duration);
}

/// Says that it is ready before it runs, and continues when its standard input ends.
fn early() -> ExitCode {
    let app = app(FAR).worker("good", cooperative);
    ready();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    app.run()
}

async fn cooperative(cx: WorkerContext) {
    ready();
    cx.cancelled().await;
}

/// Takes longer to end than the time between two copies of a signal.
async fn drains(cx: WorkerContext) {
    ready();
    cx.cancelled().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    eprintln!("DRAINED");
}

async fn deaf(cx: WorkerContext) {
    ready();
    cx.cancelled().await;
    cx.mark("wait for ever");
    eprintln!("STOPPING");
    pending().await
}

async fn marks(cx: WorkerContext) {
    let group = cx.group();
    group.spawn("connection", pending::<()>()).unwrap();
    cx.mark("halfway");
    cx.ready();
    cx.cancelled().await;
}

/// A phase that is ready at once, and a phase that is ready after a SIGHUP and drains until the next SIGHUP.
fn becomes_ready_when_told() -> ExitCode {
    let (told, hear) = tokio::sync::watch::channel(0_u32);
    let slow = move |cx: WorkerContext| {
        let mut hear = hear.clone();
        async move {
            eprintln!("STARTED");
            let (token, mut again) = (cx.token(), hear.clone());
            if token.run_until_cancelled(hear.changed()).await.is_some() {
                cx.ready();
                again.mark_unchanged();
                cx.cancelled().await;
            }
            eprintln!("TOLD");
            again.changed().await.unwrap();
        }
    };
    app(FAR)
        .on_signal(Signal::Hangup, move |_| told.send_modify(|times| *times += 1))
        .phase("storage", |phase| phase.worker("db", cooperative))
        .phase("ingress", |phase| phase.worker("slow", slow).ready_within(FAR).timeout(FAR))
        .run()
}

/// Takes the only thread for itself between a SIGHUP and a SIGUSR1.
fn wedges_when_told() -> ExitCode {
    static WEDGED: AtomicBool = AtomicBool::new(false);
    let work = |cx: WorkerContext| async move {
        let token = cx.token();
        while token.run_until_cancelled(tokio::time::sleep(Duration::from_millis(1))).await.is_some() {
            if WEDGED.load(Ordering::SeqCst) {
                eprintln!("WEDGED");
            }
            while WEDGED.load(Ordering::SeqCst) {
                stall(Duration::from_millis(1));
            }
        }
    };
    app(FAR)
        .runtime(Builder::new_current_thread())
        .on_signal(Signal::Hangup, |_| WEDGED.store(true, Ordering::SeqCst))
        .on_signal(Signal::User1, |_| WEDGED.store(false, Ordering::SeqCst))
        .worker("worker", work)
        .run()
}

/// Lists the threads of its process when told to stop.
async fn lists_its_threads(cx: WorkerContext) {
    ready();
    cx.cancelled().await;
    for thread in std::fs::read_dir("/proc/self/task").unwrap() {
        eprint!("{}", std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap_or_default());
    }
}

async fn panics(_: WorkerContext) {
    panic!("the pipe burst");
}

async fn fails(_: WorkerContext) -> Result<(), std::io::Error> {
    Err(std::io::Error::other("the disk is full"))
}

async fn blocks_in_a_group(cx: WorkerContext) {
    let group = cx.group();
    let hash = |cx: WorkerContext| {
        cx.mark("block 7");
        ready();
        stall(STALL);
    };
    group.spawn_blocking("hash", hash).unwrap();
    cx.cancelled().await;
    drop(group.wait().await);
}

async fn blocks_elsewhere(_: WorkerContext) {
    let hash = || {
        ready();
        stall(STALL);
    };
    tokio::task::spawn_blocking(hash).await.unwrap();
}

async fn spins(cx: WorkerContext) {
    cx.mark("sum");
    ready();
    let begun = Instant::now();
    while begun.elapsed() < STALL {
        if cx.is_cancelled() {
            eprintln!("STOPPING");
            stall(STALL);
        }
    }
}

async fn drops_slowly(_: WorkerContext) {
    struct Slow;
    impl Drop for Slow {
        fn drop(&mut self) {
            stall(STALL);
        }
    }
    let _slow = Slow;
    ready();
    pending::<()>().await;
}

fn stops_itself_and_spins() -> ExitCode {
    let app = app(DEADLINE).runtime(Builder::new_current_thread());
    let handle = app.shutdown_handle();
    let work = move |_: WorkerContext| async move {
        handle.cancel();
        stall(STALL);
    };
    app.worker("spin", work).run()
}

async fn pauses_the_clock(_: WorkerContext) {
    tokio::time::pause();
    ready();
    // With a task that is always ready, the paused clock never advances.
    loop {
        tokio::task::yield_now().await;
    }
}

/// A subscriber whose output nobody reads.
#[cfg(feature = "tracing")]
struct Deaf;

#[cfg(feature = "tracing")]
impl tracing::Subscriber for Deaf {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target().starts_with("cancel_safe_shutdown")
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        eprintln!("LOGGING");
        stall(STALL);
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}
