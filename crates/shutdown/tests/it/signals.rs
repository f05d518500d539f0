//! Real signals to real processes: the exit code, the time and the report.
#![expect(clippy::print_stdout, reason = "how close a deadline was is worth a look, and fails nothing")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::child::{DEADLINE, MANY, PROGRAM, STALL};

/// The default time within which a second signal is a copy of the first, and a little more.
const QUIET: Duration = Duration::from_millis(1050);

/// How long anything may take on a busy machine before it counts as a hang. Well below [`STALL`], so that a program
/// that waits for its straggler is caught.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running program.
pub(crate) struct Program {
    child: Child,
    lines: Receiver<String>,
    stderr: String,
}

/// How a program ended.
pub(crate) struct Exit {
    pub(crate) code: Option<i32>,
    elapsed: Duration,
    pub(crate) stderr: String,
}

impl Program {
    /// Starts a program and waits until it is ready.
    pub(crate) fn ready(name: &str) -> Self {
        let mut program = Self::start(name);
        program.wait_for("READY");
        program
    }

    pub(crate) fn start(name: &str) -> Self {
        Self::spawn(name, Command::new(std::env::current_exe().unwrap()))
    }

    /// Starts a program as the child of GNU `timeout`, which forwards signals to it and then to the whole group, itself
    /// included, so that the program gets each twice.
    #[cfg(target_os = "linux")]
    fn ready_under_timeout(name: &str) -> Self {
        let mut command = Command::new("timeout");
        command.args([std::ffi::OsString::from("600"), std::env::current_exe().unwrap().into()]);
        let mut program = Self::spawn(name, command);
        program.wait_for("READY");
        program
    }

    pub(crate) fn spawn(name: &str, mut command: Command) -> Self {
        let mut child = command
            .args(["--exact", "child::child_program", "--nocapture"])
            .env(PROGRAM, name)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, lines) = channel();
        // Ends with the program, or when the test stops listening.
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        Self { child, lines, stderr: String::new() }
    }

    pub(crate) fn wait_for(&mut self, wanted: &str) {
        while !self.stderr.contains(wanted) {
            let line = self.lines.recv_timeout(PATIENCE);
            self.stderr += &line.unwrap_or_else(|_| panic!("no {wanted:?} in {:?}", self.stderr));
            self.stderr.push('\n');
        }
    }

    pub(crate) fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until the next signal no longer counts as a copy of the last one.
    #[expect(clippy::disallowed_methods, reason = "a lower bound of the time between two signals is what is asked for")]
    fn pause(self, time: Duration) -> Self {
        std::thread::sleep(time);
        self
    }

    /// Sends a signal and waits for the end.
    pub(crate) fn end_by(self, signal: Signal) -> Exit {
        let sent = Instant::now();
        self.send(signal);
        self.end(sent)
    }

    /// Waits for the end, which closes the standard error.
    pub(crate) fn end(mut self, since: Instant) -> Exit {
        drop(self.child.stdin.take());
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.stderr += &(line + "\n"),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("still running after {:?}: {}", since.elapsed(), self.stderr)
                }
            }
        }
        let code = self.child.wait().unwrap().code();
        Exit { code, elapsed: since.elapsed(), stderr: std::mem::take(&mut self.stderr) }
    }
}

impl Drop for Program {
    /// The program of a failed test does not outlive the test. A program that has ended cannot be killed, which does
    /// not matter.
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Exit {
    /// Asserts the code, and that the report contains each of the texts.
    #[track_caller]
    pub(crate) fn assert(&self, code: i32, texts: &[&str]) {
        assert_eq!(self.code, Some(code), "{}", self.stderr);
        for text in texts {
            assert!(self.stderr.contains(text), "no {text:?} in {}", self.stderr);
        }
    }

    /// Asserts that the program used its time up to the deadline, and kept the deadline.
    #[track_caller]
    pub(crate) fn assert_by_deadline(&self) {
        println!("{:?} past the deadline", self.elapsed.saturating_sub(DEADLINE));
        assert!(self.elapsed >= DEADLINE, "ended after {:?}, before its deadline", self.elapsed);
        assert!(self.elapsed < PATIENCE, "ended after {:?}", self.elapsed);
    }
}

/// Aborted; or abandoned, if the machine did not drop it within the 20 ms that an abort may take.
const CUT_DEAF: &str = "worker `deaf` of `main`: ab";

const _: () = assert!(PATIENCE.as_secs() < STALL.as_secs());

#[test]
fn a_cooperative_stop_by_sigterm_exits_0() {
    let exit = Program::ready("cooperative").end_by(Signal::TERM);
    exit.assert(0, &["stopped by SIGTERM", "worker `good` of `main`: completed"]);
}

#[test]
fn a_cooperative_stop_by_sigint_exits_0() {
    let exit = Program::ready("cooperative").end_by(Signal::INT);
    exit.assert(0, &["stopped by SIGINT", "worker `good` of `main`: completed"]);
}

#[test]
fn a_signal_between_new_and_run_stops_before_anything_starts() {
    let exit = Program::ready("early").end_by(Signal::TERM);
    exit.assert(0, &["stopped by SIGTERM", "worker `good` of `main`: cancelled"]);
    assert_eq!(exit.stderr.matches("READY").count(), 1, "the worker was started");
}

#[test]
fn a_worker_that_ignores_its_token_is_cut_at_the_deadline_and_named() {
    let exit = Program::ready("ignores").end_by(Signal::INT);
    exit.assert_by_deadline();
    exit.assert(
        70,
        &[
            CUT_DEAF,
            "parked at an await, spawned at",
            "child.rs:",
            "last mark `wait for ever`",
            "worker `good` of `main`: completed",
        ],
    );
}

/// How often each pair of signals is tried.
const TRIES: usize = 10;

#[test]
fn a_signal_delivered_twice_within_the_quiet_time_drains_like_one() {
    for apart in [0, 1, 5, 20, 100].map(Duration::from_millis) {
        for _ in 0..TRIES {
            let program = Program::ready("drains");
            program.send(Signal::TERM);
            let exit = program.pause(apart).end_by(Signal::TERM);
            exit.assert(0, &["DRAINED", "stopped by SIGTERM", "worker `drain` of `main`: completed"]);
        }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_signal_forwarded_by_timeout_drains_like_one() {
    for _ in 0..TRIES {
        let exit = Program::ready_under_timeout("drains").end_by(Signal::TERM);
        exit.assert(0, &["DRAINED", "stopped by SIGTERM", "worker `drain` of `main`: completed"]);
    }
}

#[test]
fn signals_of_two_kinds_within_the_quiet_time_are_one() {
    let program = Program::ready("drains");
    program.send(Signal::INT);
    program.end_by(Signal::TERM).assert(0, &["DRAINED"]);
}

#[test]
fn without_a_quiet_time_any_second_signal_ends_the_process_at_once() {
    let mut program = Program::ready("is impatient");
    program.send(Signal::TERM);
    program.wait_for("STOPPING");
    program.end_by(Signal::TERM).assert(143, &["exit code 143", "worker `deaf`"]);
}

#[test]
fn ten_thousand_deaf_workers_are_cut_at_the_deadline_on_one_thread() {
    let exit = Program::ready("has many that are deaf").end_by(Signal::TERM);
    exit.assert_by_deadline();
    exit.assert(70, &["worker `good` of `main`: completed"]);
    assert_eq!(exit.stderr.matches("worker `deaf ").count(), MANY, "some are not in the report");
}

#[test]
fn a_second_sigint_exits_130_at_once() {
    let mut program = Program::ready("ignores for long");
    program.send(Signal::INT);
    // The first has arrived, so that the system does not merge the two into one.
    program.wait_for("STOPPING");
    let exit = program.pause(QUIET).end_by(Signal::INT);
    println!("{:?} after the second signal", exit.elapsed);
    exit.assert(130, &["stopped by SIGINT", "exit code 130", "worker `deaf`", "parked at an await"]);
}

#[test]
fn a_second_signal_exits_even_if_the_runtime_is_wedged() {
    let mut program = Program::ready("spins for long");
    program.send(Signal::INT);
    // Reported by the watchdog, because the runtime is held up.
    program.wait_for("STOPPING");
    let exit = program.pause(QUIET).end_by(Signal::TERM);
    exit.assert(143, &["stopped by SIGINT", "worker `spin` of `main`: abandoned, blocked inside a poll"]);
}

#[test]
fn a_second_signal_does_not_wait_for_a_report_callback() {
    let mut program = Program::ready("reports when told twice");
    program.send(Signal::INT);
    program.wait_for("REPORTING");
    program.end_by(Signal::INT).assert(130, &[]);
}

#[test]
fn a_second_signal_ends_the_grace_inside_a_runtime_of_the_users() {
    let mut program = Program::ready("serves");
    program.send(Signal::INT);
    program.wait_for("STOPPING");
    program.pause(QUIET).end_by(Signal::INT).assert(70, &[CUT_DEAF, "parked at an await", "RETURNED"]);
}

#[test]
fn a_panic_exits_101_with_its_message() {
    let exit = Program::start("panics").end(Instant::now());
    exit.assert(101, &["worker `broken` panicked", "panicked: the pipe burst", "worker `good` of `main`: completed"]);
}

#[test]
fn an_error_exits_1_with_its_cause() {
    let exit = Program::start("fails").end(Instant::now());
    exit.assert(1, &["worker `broken` failed", "failed: the disk is full", "worker `good` of `main`: completed"]);
}

#[test]
fn an_error_past_the_restarts_exits_1() {
    Program::start("fails past its restarts").end(Instant::now()).assert(1, &["failed: the disk is full"]);
}

#[test]
fn a_blocking_closure_of_a_group_is_named_at_the_deadline() {
    let exit = Program::ready("blocks in a group").end_by(Signal::INT);
    exit.assert_by_deadline();
    exit.assert(
        70,
        &[
            "task `hash` of `hasher`: abandoned, inside a blocking closure, spawned at",
            "last mark `block 7`",
            // It waits for its group, which ends when the closure is abandoned: that may be quicker than its own abort.
            "worker `hasher` of `main`: ",
        ],
    );
}

#[test]
fn a_blocking_closure_that_nobody_named_does_not_hold_the_process() {
    let exit = Program::ready("blocks elsewhere").end_by(Signal::INT);
    exit.assert_by_deadline();
    exit.assert(70, &["worker `hasher` of `main`: ab", "parked at an await"]);
}

#[test]
fn a_worker_that_never_yields_is_named_on_a_multi_thread_runtime() {
    let exit = Program::ready("spins on many threads").end_by(Signal::INT);
    exit.assert_by_deadline();
    exit.assert(70, &["worker `spin` of `main`: abandoned, blocked inside a poll", "last mark `sum`"]);
}

#[test]
fn a_worker_that_never_yields_is_named_on_a_current_thread_runtime() {
    let exit = Program::ready("spins on one thread").end_by(Signal::INT);
    exit.assert_by_deadline();
    exit.assert(70, &["worker `spin` of `main`: abandoned, blocked inside a poll", "last mark `sum`"]);
}

#[test]
fn a_destructor_that_blocks_does_not_hold_the_process() {
    let exit = Program::ready("drops slowly").end_by(Signal::TERM);
    exit.assert_by_deadline();
    exit.assert(70, &["worker `slow` of `main`"]);
}

#[test]
fn a_handle_cancelled_by_a_wedged_worker_starts_the_deadline() {
    let exit = Program::start("stops itself and spins").end(Instant::now());
    exit.assert_by_deadline();
    exit.assert(70, &["stopped by a request", "worker `spin` of `main`: abandoned, blocked inside a poll"]);
}

#[test]
fn a_paused_clock_does_not_hold_the_watchdog() {
    let exit = Program::ready("pauses the clock").end_by(Signal::TERM);
    exit.assert_by_deadline();
    exit.assert(70, &["worker `frozen` of `main`"]);
}

#[test]
fn a_report_callback_that_hangs_is_not_waited_for() {
    Program::ready("reports for ever").end_by(Signal::TERM).assert(0, &[]);
    let exit = Program::ready("reports for ever at the deadline").end_by(Signal::TERM);
    exit.assert_by_deadline();
    exit.assert(70, &[]);
}

#[test]
fn a_report_callback_that_takes_a_moment_is_heard_at_the_deadline() {
    let exit = Program::ready("reports slowly at the deadline").end_by(Signal::TERM);
    exit.assert_by_deadline();
    exit.assert(70, &[CUT_DEAF]);
}

#[cfg(feature = "tracing")]
#[test]
fn a_log_that_hangs_is_not_waited_for() {
    let exit = Program::ready("logs for ever").end_by(Signal::TERM);
    exit.assert_by_deadline();
    exit.assert(70, &["LOGGING"]);
}

#[test]
fn the_exit_code_can_be_overridden_only_if_all_ended_in_time() {
    Program::ready("overrides the code").end_by(Signal::INT).assert(130, &["exit code 130"]);
    Program::ready("overrides the code").end_by(Signal::TERM).assert(143, &["exit code 143"]);
    Program::ready("overrides the code of a straggler").end_by(Signal::INT).assert(70, &["exit code 70"]);
}

#[test]
fn an_application_whose_workers_have_completed_exits_0() {
    Program::start("completes").end(Instant::now()).assert(0, &["stopped by all workers have completed"]);
}

#[test]
fn an_application_inside_a_runtime_is_not_started() {
    let exit = Program::start("runs inside a runtime").end(Instant::now());
    exit.assert(71, &["not started: an application cannot own a runtime inside another runtime"]);
}

#[test]
fn a_hangup_reloads_as_often_as_it_arrives_and_stops_nothing() {
    let mut program = Program::ready("reloads");
    program.send(Signal::HUP);
    program.wait_for("RELOADED Hangup");
    program.stderr.clear();
    program.send(Signal::HUP);
    program.wait_for("RELOADED Hangup");
    program.end_by(Signal::TERM).assert(0, &["stopped by SIGTERM"]);
}

#[test]
fn an_action_that_panics_or_hangs_keeps_no_signal_from_stopping() {
    let mut program = Program::ready("acts badly");
    for _ in 0..2 {
        program.stderr.clear();
        program.send(Signal::USR1);
        program.wait_for("in an action");
    }
    program.send(Signal::USR2);
    program.wait_for("ACTING");
    program.end_by(Signal::TERM).assert(0, &["stopped by SIGTERM"]);
}

#[test]
fn a_quit_lists_what_is_alive_and_where_it_is() {
    let mut program = Program::ready("is looked at");
    program.send(Signal::QUIT);
    program.wait_for("`child`: tasks alive: 3");
    program.wait_for("`parked` of `first`: parked at an await, spawned at");
    program.wait_for("last mark `halfway`");
    program.wait_for("`connection` of `parked`: parked at an await, spawned at");
    program.wait_for("`spin` of `main`: blocked inside a poll, spawned at");
    program.wait_for("last mark `sum`");
}

/// Starts a program from a shell with changed signal settings.
#[cfg(target_os = "linux")]
fn ready_under(shell: &[&str], name: &str) -> Program {
    let mut command = Command::new(shell[0]);
    command.args(&shell[1..]).arg(std::env::current_exe().unwrap());
    let mut program = Program::spawn(name, command);
    program.wait_for("READY");
    program
}

#[cfg(target_os = "linux")]
#[test]
fn a_hangup_that_nohup_ignores_stays_ignored() {
    let program = ready_under(&["nohup"], "reads its mask");
    program.send(Signal::HUP);
    let exit = program.end_by(Signal::TERM);
    exit.assert(0, &["stopped by SIGTERM"]);
    assert!(!exit.stderr.contains("RELOADED"), "{}", exit.stderr);
}

#[cfg(target_os = "linux")]
#[test]
fn a_signal_inherited_as_blocked_stops_all_the_same() {
    let block = ["env", "--block-signal=TERM", "--block-signal=INT", "--block-signal=HUP"];
    let mut program = ready_under(&block, "reads its mask");
    program.send(Signal::HUP);
    program.wait_for("RELOADED");
    program.end_by(Signal::TERM).assert(0, &["stopped by SIGTERM"]);
}

#[test]
fn a_person_at_a_terminal_waits_for_no_drain_delay() {
    for (name, signal) in
        [("drains before it stops", Signal::TERM), ("drains before it stops, also for a person", Signal::INT)]
    {
        let exit = Program::ready(name).end_by(signal);
        exit.assert(0, &[]);
        assert!(exit.elapsed >= DEADLINE, "{name} ended after {:?}", exit.elapsed);
    }
    // Its drain delay is longer than anything may take.
    Program::ready("drains for long").end_by(Signal::INT).assert(0, &["stopped by SIGINT"]);
}

#[test]
fn the_service_of_the_example_drains_on_a_signal() {
    let mut program = Program::start("service");
    program.wait_for("[HTTP] Handling request");
    let exit = program.end_by(Signal::TERM);
    exit.assert(
        0,
        &["stopping: SIGTERM", "[DB] Closing connections", "[HTTP] Draining active", "[Metrics] Flushing final"],
    );
}
