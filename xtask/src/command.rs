//! Running cargo and showing how to repeat it.
//!
//! Invariant: the command line in a failure, pasted into a shell at the workspace root, does what failed here.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::workspace;

/// How long the output of a command may stay open after the command itself has ended.
const OUTPUT_GRACE: Duration = Duration::from_secs(10);

/// How long a command that prints its progress may stay silent: a test that hangs has failed. The longest tests take
/// half a minute; a machine may be many times slower.
const SILENCE_BOUND: Duration = Duration::from_secs(900);

/// Why a task failed, and the command that repeats the failure.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) what: String,
    pub(crate) repeat: Option<String>,
}

impl Failure {
    /// Names the command to repeat, unless a more exact one is already known.
    pub(crate) fn repeat_with(mut self, command: impl Into<String>) -> Self {
        self.repeat.get_or_insert_with(|| command.into());
        self
    }
}

impl From<String> for Failure {
    fn from(what: String) -> Self {
        Self { what, repeat: None }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FAILED: {}", self.what)?;
        match &self.repeat {
            Some(command) => write!(f, "\nTo repeat: {command}"),
            None => Ok(()),
        }
    }
}

/// One run of cargo at the workspace root.
pub(crate) struct Cargo {
    arguments: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

/// Starts the description of a run of cargo.
pub(crate) fn cargo<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Cargo {
    Cargo { arguments: Vec::new(), environment: Vec::new() }.args(arguments)
}

impl Cargo {
    pub(crate) fn arg(self, argument: impl AsRef<OsStr>) -> Self {
        self.args([argument])
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name, value.as_ref().to_owned()));
        self
    }

    /// Runs the command on this terminal.
    pub(crate) fn run(self) -> Result<(), Failure> {
        let status = self.command().status().map_err(|error| format!("`{self}` could not be started: {error}"))?;
        if status.success() {
            return Ok(());
        }
        Err(Failure::from(format!("{self} ({status})")).repeat_with(self.to_string()))
    }

    /// Runs the command and passes each line of its output on as it is printed; returns whether it succeeded.
    ///
    /// Both streams share one pipe, so that cargo's "Running …" (standard error) stays before the results of the
    /// binary it announces (standard output).
    pub(crate) fn run_lines(self, mut line: impl FnMut(&str)) -> Result<bool, Failure> {
        let broken = |error: std::io::Error| format!("`{self}` could not be run: {error}");
        let (reader, writer) = std::io::pipe().map_err(broken)?;
        let mut child = {
            let mut command = self.command();
            command.stdin(Stdio::null()).stdout(writer.try_clone().map_err(broken)?).stderr(writer);
            // The command holds the pipe's writing ends: they must close here, or the reader never sees the end.
            command.spawn().map_err(broken)?
        };
        let (sender, lines) = mpsc::sync_channel(1024);
        std::thread::spawn(move || {
            for bytes in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&bytes).into_owned()).is_err() {
                    break;
                }
            }
        });
        let mut ended = None;
        let mut last_line = Instant::now();
        loop {
            match lines.recv_timeout(Duration::from_secs(1)) {
                Ok(text) => {
                    println!("{text}");
                    line(&text);
                    last_line = Instant::now();
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) if child.try_wait().map_err(broken)?.is_some() => {
                    if ended.get_or_insert_with(Instant::now).elapsed() > OUTPUT_GRACE {
                        let what = format!("{self} has ended, but a process that it left behind keeps its output open");
                        return Err(Failure::from(what).repeat_with(self.to_string()));
                    }
                }
                Err(RecvTimeoutError::Timeout) if last_line.elapsed() > SILENCE_BOUND => {
                    println!("nothing was printed for {SILENCE_BOUND:?}: what {self} is waiting for is ended");
                    end_children(child.id());
                    last_line = Instant::now();
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        Ok(child.wait().map_err(broken)?.success())
    }

    fn command(&self) -> Command {
        // The cargo that runs us, so that `cargo +nightly xtask` stays on nightly.
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(&self.arguments).current_dir(workspace::root());
        // `cargo run` sets these variables for our own package. Some build scripts (ring's) read them, and would run
        // again, with everything that depends on them, on each change between cargo and cargo xtask.
        let ours = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(ours)) {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }
}

impl fmt::Display for Cargo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.environment {
            write!(f, "{name}={} ", quoted(&value.to_string_lossy()))?;
        }
        f.write_str("cargo")?;
        self.arguments.iter().try_for_each(|argument| write!(f, " {}", quoted(&argument.to_string_lossy())))
    }
}

/// Kills the processes that `parent` has started and waits for, so that it can say which of them failed. It kills them
/// because a test of `shutdown` has handlers for everything milder.
fn end_children(parent: u32) {
    let script = r#"kill -KILL $(cat "/proc/$1/task/"*/children) || pkill -KILL -P "$1""#;
    let shell = Command::new("/bin/sh").args(["-c", script, "end", &parent.to_string()]).stderr(Stdio::null()).status();
    if let Err(error) = shell {
        eprintln!("the children of process {parent} could not be ended: {error}");
    }
}

/// The text as one word of a POSIX shell.
pub(crate) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// Asks until the answer is yes or the time is up; returns the last answer.
pub(crate) fn wait_until(bound: Duration, mut ready: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !ready() {
        if start.elapsed() > bound {
            return false;
        }
        #[expect(
            clippy::disallowed_methods,
            reason = "a blocking program that waits for another process, with a bound"
        )]
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_command_can_be_pasted_into_a_shell() {
        let shown = cargo(["clippy", "--", "-D", "warnings"]).env("RUSTDOCFLAGS", "-D warnings").to_string();
        assert_eq!(shown, "RUSTDOCFLAGS='-D warnings' cargo clippy -- -D warnings");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_first_command_to_repeat_is_the_exact_one_and_stays() {
        let failure = Failure::from("x".to_owned()).repeat_with("exact").repeat_with("rough");
        assert_eq!(failure.to_string(), "FAILED: x\nTo repeat: exact");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn the_children_of_a_process_are_ended_and_it_is_not() {
        let script = "(trap '' TERM; exec sleep 600); echo $?";
        let mut shell = Command::new("/bin/sh");
        let child = shell.args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let children = format!("/proc/{0}/task/{0}/children", child.id());
        let started = || std::fs::read_to_string(&children).is_ok_and(|pids| !pids.trim().is_empty());
        assert!(wait_until(Duration::from_secs(30), started));
        end_children(child.id());
        assert_eq!(child.wait_with_output().unwrap().stdout, b"137\n");
    }

    #[test]
    fn lines_arrive_in_order_and_a_failed_command_is_told() {
        let mut lines = Vec::new();
        assert!(cargo(["--version"]).run_lines(|line| lines.push(line.to_owned())).unwrap());
        assert!(lines[0].starts_with("cargo "));
        assert!(!cargo(["no-such-command"]).run_lines(|_| ()).unwrap());
    }
}
