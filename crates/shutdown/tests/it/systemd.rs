//! The messages for a service manager, read from a real socket of the kind that it listens on.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::signals::Program;

/// How long anything may take on a busy machine before it counts as a hang.
const PATIENCE: Duration = Duration::from_secs(30);
/// The limit of the watchdog in tests that wait for a missing beat.
const WATCHDOG: Duration = Duration::from_millis(100);

/// A service manager that listens.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Manager {
    fn listen() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        Self { socket, path, _folder: folder }
    }

    fn start(&self, program: &str, variables: &[(&str, String)]) -> Program {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env("NOTIFY_SOCKET", &self.path);
        command.envs(variables.iter().map(|(name, value)| (name, value)));
        Program::spawn(program, command)
    }

    /// The next message, if one comes within `limit`.
    fn hear_within(&self, limit: Duration) -> Option<String> {
        self.socket.set_read_timeout(Some(limit)).unwrap();
        let mut bytes = [0; 4096];
        match self.socket.recv(&mut bytes) {
            Ok(read) => Some(std::str::from_utf8(&bytes[..read]).unwrap().trim_end().to_owned()),
            Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn hear(&self) -> String {
        self.hear_within(PATIENCE).expect("nothing is said")
    }

    /// Hears messages up to `wanted`, and returns those before it.
    fn hear_until(&self, wanted: &str) -> Vec<String> {
        let begun = Instant::now();
        let mut heard = Vec::new();
        while begun.elapsed() < PATIENCE {
            match self.hear() {
                message if message == wanted => return heard,
                message => heard.push(message),
            }
        }
        panic!("no {wanted} in {heard:?}")
    }

    /// All messages until the program ended.
    fn hear_the_rest(&self) -> Vec<String> {
        std::iter::from_fn(|| self.hear_within(Duration::from_millis(1))).collect()
    }
}

fn microseconds(message: &str) -> u64 {
    message.strip_prefix("EXTEND_TIMEOUT_USEC=").unwrap_or_else(|| panic!("{message}")).parse().unwrap()
}

#[test]
fn the_manager_is_told_of_readiness_of_the_stop_and_of_the_time_it_takes() {
    let manager = Manager::listen();
    let mut program = manager.start("becomes ready when told", &[]);
    program.wait_for("STARTED");
    // Its second phase is not ready, however long anybody waits.
    assert_eq!(manager.hear_within(Duration::from_millis(100)), None);
    program.send(Signal::HUP);
    assert_eq!(manager.hear(), "READY=1");
    program.send(Signal::TERM);
    assert_eq!(manager.hear(), "STOPPING=1");
    // It drains as long as this listens. The message extends the time by the rest of its ten minutes, and a little
    // more.
    let first = microseconds(&manager.hear());
    let second = microseconds(&manager.hear());
    assert!((500_000_000..=602_000_000).contains(&first.max(second)), "{first}, {second}");
    program.wait_for("TOLD");
    program.send(Signal::HUP);
    program.end(Instant::now()).assert(0, &["by SIGTERM"]);
    let rest = manager.hear_the_rest();
    assert!(rest.iter().all(|message| microseconds(message) <= 602_000_000), "{rest:?}");
}

#[test]
fn an_application_that_stops_before_it_is_ready_is_never_called_ready() {
    let manager = Manager::listen();
    let mut program = manager.start("becomes ready when told", &[]);
    program.wait_for("STARTED");
    program.send(Signal::TERM);
    assert_eq!(manager.hear(), "STOPPING=1");
    microseconds(&manager.hear());
    program.wait_for("TOLD");
    program.send(Signal::HUP);
    program.end(Instant::now()).assert(0, &["by SIGTERM"]);
    let rest = manager.hear_the_rest();
    assert!(rest.iter().all(|message| microseconds(message) > 0), "{rest:?}");
}

#[test]
fn a_live_runtime_beats_at_half_the_interval_and_a_wedged_one_stops() {
    let manager = Manager::listen();
    let interval = WATCHDOG.as_micros().to_string();
    // Taken before its start, because the first beats may come before the start is known.
    let begun = Instant::now();
    let mut program = manager.start("wedges when told", &[("WATCHDOG_USEC", interval)]);
    // Its first beat is at its start.
    for _ in 0..=10 {
        manager.hear_until("WATCHDOG=1");
    }
    // Ten beats, each half an interval after the previous one at the earliest, or later on a busy machine.
    assert!(begun.elapsed() >= 4 * WATCHDOG, "ten beats in {:?}", begun.elapsed());
    program.send(Signal::HUP);
    program.wait_for("WEDGED");
    // At most the beat that was on its way.
    manager.hear_within(2 * WATCHDOG);
    while manager.hear_within(Duration::from_millis(1)).is_some() {}
    assert_eq!(manager.hear_within(20 * WATCHDOG), None, "a wedged runtime was said to be alive");
    program.send(Signal::USR1);
    // It continues when the runtime does.
    manager.hear_until("WATCHDOG=1");
    program.send(Signal::TERM);
    let exit = program.end(Instant::now());
    exit.assert(0, &["by SIGTERM"]);
    // A pending question is not a task of the application.
    assert!(!exit.stderr.contains("unnamed"), "{}", exit.stderr);
}

#[test]
fn a_watchdog_that_is_for_another_process_or_off_gets_nothing() {
    for variables in [
        vec![("WATCHDOG_USEC", "1000".to_owned()), ("WATCHDOG_PID", "1".to_owned())],
        vec![("WATCHDOG_USEC", "0".to_owned())],
    ] {
        let manager = Manager::listen();
        let mut program = manager.start("cooperative", &variables);
        program.wait_for("READY");
        assert_eq!(manager.hear(), "READY=1");
        assert_eq!(manager.hear_within(Duration::from_millis(100)), None);
        program.end_by(Signal::TERM).assert(0, &[]);
        assert_eq!(manager.hear(), "STOPPING=1");
    }
}

#[test]
fn an_application_inside_a_runtime_of_the_users_tells_the_manager_as_well() {
    let manager = Manager::listen();
    let program = manager.start("serves", &[("WATCHDOG_USEC", "50000".to_owned())]);
    let before = manager.hear_until("READY=1");
    assert!(before.iter().all(|message| message == "WATCHDOG=1"), "{before:?}");
    manager.hear_until("WATCHDOG=1");
    program.send(Signal::TERM);
    manager.hear_until("STOPPING=1");
}

#[test]
fn without_a_socket_nothing_is_started_and_with_a_broken_one_nothing_is_lost() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env_remove("NOTIFY_SOCKET").env("WATCHDOG_USEC", "1000");
    let mut program = Program::spawn("lists its threads", command);
    program.wait_for("READY");
    let exit = program.end_by(Signal::TERM);
    exit.assert(0, &["shutdown-phase"]);
    assert!(!exit.stderr.contains("shutdown-system") && !exit.stderr.contains("shutdown-pulse"), "{}", exit.stderr);

    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env("NOTIFY_SOCKET", "/nowhere/at/all").env("WATCHDOG_USEC", "1000");
    let mut program = Program::spawn("lists its threads", command);
    program.wait_for("READY");
    program.end_by(Signal::TERM).assert(0, &["shutdown-system", "shutdown-pulse"]);
}
