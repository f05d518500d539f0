//! The user's callbacks at the end, on a thread that is ready before anything runs. They are waited for, but not for
//! long: no callback can keep a process alive.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::report::Report;

pub(crate) type OnReport = Box<dyn FnOnce(&Report) + Send>;
pub(crate) type OnExitCode = Box<dyn FnOnce(&Report) -> Option<u8> + Send>;

/// How long the callbacks may take at the deadline and after. Those that do not hang take microseconds; the rest of it is
/// for a machine that has no time for their thread, on which the report would be lost.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(500);

/// Delivers one report.
#[derive(Debug)]
pub(crate) struct Voice {
    /// `None` where there is nobody to tell.
    thread: Option<(Sender<Message>, Receiver<u8>)>,
}

/// A report that is being told.
#[derive(Debug)]
pub(crate) struct Telling {
    code: u8,
    answers: Option<Receiver<u8>>,
}

/// Sets its flag when the callbacks have returned, or one of them has panicked.
struct Told(Arc<AtomicBool>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

struct Message {
    report: Report,
    /// Whether the callback for the exit code is to be asked.
    negotiable: bool,
}

impl Voice {
    /// Prepares the thread, which sets `told` when the callbacks have returned; where there are none, they have.
    pub(crate) fn start(
        on_report: Option<OnReport>,
        on_exit_code: Option<OnExitCode>,
        told: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        // A subscriber of events is the user's code as well, and may write to where nobody reads any more.
        if on_report.is_none() && on_exit_code.is_none() && !cfg!(feature = "tracing") {
            told.store(true, Ordering::Release);
            return Ok(Self { thread: None });
        }
        let (send, messages) = channel();
        let (answer, answers) = channel();
        let speak = move || {
            // An error is a voice dropped unused.
            let Ok(Message { mut report, negotiable }) = messages.recv() else { return };
            let _told = Told(told);
            if negotiable && let Some(code) = on_exit_code.and_then(|exit_code| exit_code(&report)) {
                report.set_exit_code(code);
            }
            // Nobody listens any more if the time was up.
            let _ = answer.send(report.exit_code());
            #[cfg(feature = "tracing")]
            log(&report);
            if let Some(on_report) = on_report {
                on_report(&report);
            }
            // Told by the end of the channel, which a panic brings about too.
            drop(answer);
        };
        std::thread::Builder::new().name("shutdown-report".to_owned()).spawn(speak)?;
        Ok(Self { thread: Some((send, answers)) })
    }

    /// Runs the callbacks for at most `limit` and returns the exit code. A forced code is not up to the callback.
    pub(crate) fn deliver(self, report: Report, forced: Option<u8>, limit: Duration) -> u8 {
        self.tell(report, forced).wait(limit)
    }

    /// Has the callbacks run, and waits for none of them.
    pub(crate) fn tell(self, mut report: Report, forced: Option<u8>) -> Telling {
        if let Some(code) = forced {
            report.set_exit_code(code);
        }
        let code = report.exit_code();
        let negotiable = forced.is_none() && report.stragglers().next().is_none();
        let told = self.thread.and_then(|(send, answers)| {
            send.send(Message { report, negotiable }).ok()?;
            Some(answers)
        });
        Telling { code, answers: told }
    }
}

impl Telling {
    /// Waits for the callbacks for at most `limit` and returns the exit code.
    pub(crate) fn wait(self, limit: Duration) -> u8 {
        let until = Instant::now() + limit;
        let Some(answers) = self.answers else { return self.code };
        let code = answers.recv_timeout(limit).unwrap_or(self.code);
        // Ends with the thread or with the time, whichever is first; there is no second answer.
        let _ = answers.recv_timeout(until.saturating_duration_since(Instant::now()));
        code
    }
}

#[cfg(feature = "tracing")]
fn log(report: &Report) {
    if report.is_clean() {
        tracing::info!(%report, "the application has ended");
    } else {
        tracing::error!(%report, "the application has ended badly");
    }
}
