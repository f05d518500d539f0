//! The user's callbacks at the end, on a thread that is ready before anything runs. They are waited for, but not for
//! long: no callback can keep a process alive.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::report::Report;

pub(crate) type OnReport = Box<dyn FnOnce(&Report) + Send>;
pub(crate) type OnExitCode = Box<dyn FnOnce(&Report) -> Option<u8> + Send>;

/// Delivers one report.
#[derive(Debug)]
pub(crate) struct Voice {
    /// `None` where there are no callbacks.
    thread: Option<(Sender<Message>, Receiver<u8>)>,
}

struct Message {
    report: Report,
    /// Whether the callback for the exit code is to be asked.
    negotiable: bool,
}

impl Voice {
    pub(crate) fn start(on_report: Option<OnReport>, on_exit_code: Option<OnExitCode>) -> io::Result<Self> {
        if on_report.is_none() && on_exit_code.is_none() {
            return Ok(Self { thread: None });
        }
        let (send, messages) = channel();
        let (answer, answers) = channel();
        let speak = move || {
            // An error is a voice dropped unused.
            let Ok(Message { mut report, negotiable }) = messages.recv() else { return };
            if negotiable && let Some(code) = on_exit_code.and_then(|exit_code| exit_code(&report)) {
                report.set_exit_code(code);
            }
            // Nobody listens any more if the time was up.
            let _ = answer.send(report.exit_code());
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
    pub(crate) fn deliver(self, mut report: Report, forced: Option<u8>, limit: Duration) -> u8 {
        let until = Instant::now() + limit;
        if let Some(code) = forced {
            report.set_exit_code(code);
        }
        log(&report);
        let code = report.exit_code();
        let Some((send, answers)) = self.thread else { return code };
        let negotiable = forced.is_none() && report.stragglers().next().is_none();
        if send.send(Message { report, negotiable }).is_err() {
            return code;
        }
        let code = answers.recv_timeout(limit).unwrap_or(code);
        // Ends with the thread or with the time, whichever is first; there is no second answer.
        let _ = answers.recv_timeout(until.saturating_duration_since(Instant::now()));
        code
    }
}

fn log(report: &Report) {
    #[cfg(feature = "tracing")]
    if report.is_clean() {
        tracing::info!(%report, "the application has ended");
    } else {
        tracing::error!(%report, "the application has ended badly");
    }
    #[cfg(not(feature = "tracing"))]
    let _: &Report = report;
}
