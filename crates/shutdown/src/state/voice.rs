//! Reporting the end, on a thread that is ready before anything runs: the user's callbacks, the lines on standard
//! error, the tracing events. The wait for them is short: no callback and no full pipe can keep a process alive.

use std::io::{self, Write};
use std::sync::Weak;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::panics::catch;
use crate::report::{EXIT_PANICKED, Report};
use crate::state::stages::Ending;
use crate::stop::StopReason;

pub(crate) type OnReport = Box<dyn FnOnce(&Report) + Send>;
pub(crate) type OnExitCode = Box<dyn FnOnce(&Report) -> Option<u8> + Send>;

/// How long the callbacks may take at the deadline and after. Callbacks that do not hang take microseconds. The rest of
/// the time is for a busy machine that is slow to schedule their thread; without it the report would be lost there.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(500);

/// The receivers of the report.
#[derive(Default)]
pub(crate) struct Audience {
    pub(crate) on_report: Option<OnReport>,
    pub(crate) on_exit_code: Option<OnExitCode>,
    /// Whether standard error gets the report when there is no callback.
    pub(crate) is_on_stderr: bool,
}

/// Delivers one report.
#[derive(Debug)]
pub(crate) struct Voice {
    thread: Sender<Message>,
    answers: Receiver<u8>,
}

/// Says that a stop has begun.
#[derive(Debug)]
pub(crate) struct Announcer(Sender<Message>);

impl Announcer {
    pub(crate) fn stopping(&self, reason: &StopReason) {
        // Once the report is out, nothing receives this any more.
        drop(self.0.send(Message::Stopping(reason.clone())));
    }
}

/// A report that is being delivered.
#[derive(Debug)]
pub(crate) struct Telling {
    code: u8,
    answers: Option<Receiver<u8>>,
}

/// Says that the callbacks have returned, or that one of them has panicked. The voice is a part of the ending, so the
/// thread must not keep it.
struct Told(Weak<Ending<Voice>>);

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(ending) = self.0.upgrade() {
            ending.told();
        }
    }
}

#[derive(Debug)]
enum Message {
    Stopping(StopReason),
    Ended {
        report: Report,
        /// Whether to ask the callback for the exit code.
        negotiable: bool,
    },
}

impl Voice {
    /// Starts the thread, which tells `ending` when the callbacks have returned.
    pub(crate) fn start(audience: Audience, ending: Weak<Ending<Self>>) -> io::Result<(Self, Announcer)> {
        let (thread, messages) = channel();
        let (answer, answers) = channel();
        let speak = move || {
            let told = Told(ending);
            loop {
                match messages.recv() {
                    Ok(Message::Stopping(reason)) => audience.hear_of_stop(&reason),
                    Ok(Message::Ended { report, negotiable }) => {
                        audience.hear_of_end(report, negotiable, &answer);
                        break;
                    }
                    // The voice was dropped unused.
                    Err(_) => break,
                }
            }
            // Before the channel, because its end tells the others that there is nothing more to wait for.
            drop(told);
            drop(answer);
        };
        std::thread::Builder::new().name("shutdown-report".to_owned()).spawn(speak)?;
        Ok((Self { thread: thread.clone(), answers }, Announcer(thread)))
    }

    /// Runs the callbacks for at most `limit` and returns the exit code. The callback cannot change a forced code.
    pub(crate) fn deliver(self, report: Report, forced: Option<u8>, limit: Duration) -> u8 {
        self.tell(report, forced).wait(limit)
    }

    /// Makes the callbacks run, and does not wait for them.
    pub(crate) fn tell(self, mut report: Report, forced: Option<u8>) -> Telling {
        if let Some(code) = forced {
            report.set_exit_code(code);
        }
        let code = report.exit_code();
        let negotiable = forced.is_none() && !report.is_cut();
        let sent = self.thread.send(Message::Ended { report, negotiable });
        Telling { code, answers: sent.is_ok().then_some(self.answers) }
    }
}

impl Audience {
    fn hear_of_stop(&self, reason: &StopReason) {
        #[cfg(feature = "tracing")]
        tracing::info!(%reason, "stopping");
        // A program that has done its work has nothing left to stop.
        let silent = matches!(reason, StopReason::Completed | StopReason::NotStarted { .. });
        if self.is_on_stderr && self.on_report.is_none() && !silent {
            let again = if matches!(reason, StopReason::Signal(_)) { "; again to end at once" } else { "" };
            print(format_args!("stopping: {reason}{again}"));
        }
    }

    fn hear_of_end(self, mut report: Report, negotiable: bool, answer: &Sender<u8>) {
        if negotiable && let Some(exit_code) = self.on_exit_code {
            match catch(|| exit_code(&report)) {
                Ok(code) => report.set_exit_code(code.unwrap_or(report.exit_code())),
                // The panic hook has printed it, and the exit code shows it; the report is delivered all the same.
                Err(_) => report.set_exit_code(EXIT_PANICKED),
            }
        }
        // Nothing receives this any more if the time was up.
        let _ = answer.send(report.exit_code());
        #[cfg(feature = "tracing")]
        log(&report);
        match self.on_report {
            Some(on_report) => {
                let panicked = catch(|| on_report(&report)).is_err();
                if panicked && negotiable {
                    let _ = answer.send(EXIT_PANICKED);
                }
            }
            None if self.is_on_stderr && !report.is_uneventful() => print(format_args!("{report}")),
            None => {}
        }
    }
}

impl Telling {
    /// Waits for the callbacks for at most `limit` and returns the exit code.
    pub(crate) fn wait(self, limit: Duration) -> u8 {
        let until = Instant::now() + limit;
        let Some(answers) = self.answers else { return self.code };
        let code = answers.recv_timeout(limit).unwrap_or(self.code);
        // Ends with the thread or when the time is up, whichever is first. A second answer means that a callback has
        // panicked.
        answers.recv_timeout(until.saturating_duration_since(Instant::now())).unwrap_or(code)
    }
}

/// Writes a line to standard error. A closed standard error is no reason to panic.
pub(crate) fn print(text: std::fmt::Arguments<'_>) {
    // In one piece, so that other threads' lines do not come in between.
    drop(io::stderr().write_all(format!("{text}\n").as_bytes()));
}

#[cfg(feature = "tracing")]
fn log(report: &Report) {
    if report.is_clean() {
        tracing::info!(%report, "the application has ended");
    } else {
        tracing::error!(%report, "the application has ended badly");
    }
}
