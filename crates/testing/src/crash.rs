//! `Way::Crash`: the run up to the point happens in a child process, which is killed there.
//!
//! Invariant: a child does nothing beyond its one run: every other exploration in it returns at once, and a child
//! that did not reach its exploration is a failure, never a pass.
//!
//! The child is this test binary again, started for the test that called `run`. Two environment variables tell it what
//! to do: [`VICTIM`], `point:crash:budget@call`, where `call` is the source position of the call of `run` and the
//! number of earlier calls from there on the same thread; and [`INHERITED`], the directory of the run. At its point the
//! child prints that on standard output and stops, with the blocking pool held; the parent kills it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::panic::Location;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::coverage::COVERAGE;
use crate::plan::Plan;
use crate::publish::POINTS_FILE;
use crate::scratch::{INHERITED, Scratch};
use crate::seen::{End, Visit};
use crate::site::{Namer, Site};

const VICTIM: &str = "CANCEL_SAFE_CRASH";

/// The first word of the child's line to its parent, which distinguishes it from a test's other output.
const WORD: &str = "cancel-safe-crash";

/// How much time the child may need beyond the bounds of its run: its start, and the test around the exploration.
const EXTRA: Duration = Duration::from_secs(30);

/// Identifies a call of `run`.
#[derive(Debug)]
pub(crate) struct Here {
    call: String,
    /// The test's name as the test harness knows it.
    test: String,
}

/// The role of this process in this call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Explorer,
    /// A child, in the call it was started for.
    Victim(Plan),
    /// A child, in another call.
    Bystander,
}

/// How the child ended.
#[derive(Debug)]
pub(crate) enum Death {
    AtPoint(Option<Site>),
    /// The operation completed, after this many pendings.
    Outlived(usize),
    /// It did not reach the point, for this reason.
    Missed(String),
}

impl Here {
    /// `closure` is the type name of a closure written at the call.
    pub(crate) fn new(caller: &Location<'_>, closure: &str) -> Self {
        thread_local! {
            static CALLS: RefCell<BTreeMap<String, usize>> = const { RefCell::new(BTreeMap::new()) };
        }
        let place = caller.to_string();
        let number = CALLS.with_borrow_mut(|calls| {
            let count = calls.entry(place.clone()).or_default();
            *count += 1;
            *count
        });
        Self { call: format!("{place}#{number}"), test: test_name(closure) }
    }

    pub(crate) fn role(&self) -> Role {
        let Ok(text) = std::env::var(VICTIM) else { return Role::Explorer };
        match text.split_once('@') {
            Some((plan, call)) if call == self.call => plan.parse().map_or(Role::Bystander, Role::Victim),
            _ => Role::Bystander,
        }
    }

    /// In the child: does the run, then waits to be killed.
    pub(crate) fn die(&self, run: impl FnOnce(&mut dyn FnMut(&Visit)), caller: &'static Location<'static>) {
        Scratch::inherit();
        run(&mut |visit| {
            let line = match visit.end {
                End::Dropped => match Namer::new(caller).name(&visit.traces) {
                    Some(place) => format!("dropped {} {}", place.site().line(), place.site().file()),
                    None => "dropped".to_owned(),
                },
                End::Completed => format!("completed {}", visit.polls),
                End::Failed => "failed".to_owned(),
            };
            // Not `print!`, which a test harness may capture. The line break ends what the harness has begun.
            let mut stdout = std::io::stdout().lock();
            let told = writeln!(stdout, "\n{WORD} {line}").and_then(|()| stdout.flush());
            // If the write fails, the parent is gone, and so is the reason to wait.
            while told.is_ok() && parent_is_there() {}
        });
    }

    /// In the parent: runs the plan in a child and kills it at the point.
    pub(crate) fn kill_at(&self, plan: Plan, scratch: &Scratch, hang_after: Duration) -> Death {
        let mut child = match self.start(plan, scratch) {
            Ok(child) => child,
            Err(error) => return Death::Missed(format!("this test binary could not be started again: {error}")),
        };
        let (tell, told) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            // This thread ends with the child, whose death closes the pipe.
            std::thread::spawn(move || {
                let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
                let word = lines.find_map(|line| line.strip_prefix(WORD).map(|rest| rest.trim().to_owned()));
                tell.send(word)
            });
        }
        // The setup and the operation are bounded by `hang_after` each.
        let word = told.recv_timeout(hang_after * 2 + EXTRA);
        // Whatever it said, or if it said nothing: no child outlives its run.
        let killed = child.kill().and_then(|()| child.wait());
        match (killed, word) {
            (Err(error), _) => Death::Missed(format!("the child could not be killed: {error}")),
            (Ok(_), Ok(Some(word))) => understand(&word),
            (Ok(_), _) => {
                Death::Missed(format!("the child ran test {:?} but never came to the exploration", self.test))
            }
        }
    }

    fn start(&self, plan: Plan, scratch: &Scratch) -> std::io::Result<Child> {
        Command::new(std::env::current_exe()?)
            .args(["--exact", &self.test, "--include-ignored", "--nocapture", "--test-threads", "1"])
            .env(VICTIM, format!("{plan}@{}", self.call))
            .env(INHERITED, scratch.path())
            // The explorations that this child skips have nothing to publish.
            .env_remove(POINTS_FILE)
            .env_remove(COVERAGE)
            // The parent keeps this open; its end tells the child that the parent is gone.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
    }
}

/// Blocks until the parent closes the child's standard input, which it does by dying.
fn parent_is_there() -> bool {
    matches!(std::io::stdin().lock().read_line(&mut String::new()), Ok(1..))
}

fn understand(word: &str) -> Death {
    let mut parts = word.splitn(3, ' ');
    match (parts.next(), parts.next().map(str::parse), parts.next()) {
        (Some("dropped"), Some(Ok(line)), Some(file)) => {
            Death::AtPoint(Some(Site::new(file.to_owned(), u32::try_from(line).unwrap_or(u32::MAX))))
        }
        (Some("dropped"), None, None) => Death::AtPoint(None),
        (Some("completed"), Some(Ok(polls)), None) => Death::Outlived(polls),
        _ => Death::Missed("the operation failed in the child".to_owned()),
    }
}

/// The test harness names a test's thread after the test, unless it runs tests on the main thread. Then the type name
/// of a closure in the test shows it: `crate_name::module::test::{{closure}}`.
fn test_name(closure: &str) -> String {
    let thread = std::thread::current();
    match thread.name() {
        Some(name) if name != "main" => name.to_owned(),
        _ => {
            let path = closure.split("::{{").next().unwrap_or(closure);
            path.split_once("::").map_or(path, |(_, test)| test).to_owned()
        }
    }
}
