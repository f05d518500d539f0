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

/// How long the thread may take to begin. Until then nothing of the user's runs, so only a machine that has no time for
/// the thread makes use of it; there the report would be lost if the time of the callbacks were running already.
pub(crate) const WAKE_UP: Duration = Duration::from_secs(1);

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
    /// The code as it is when the thread begins, and as it is when its callback was asked.
    answers: Option<Receiver<u8>>,
}

struct Message {
    report: Report,
    /// Whether the callback for the exit code is to be asked.
    negotiable: bool,
}

impl Voice {
    /// Prepares the thread, which sets `begun` when it comes to the callbacks; where there are none, they have begun.
    pub(crate) fn start(
        on_report: Option<OnReport>,
        on_exit_code: Option<OnExitCode>,
        begun: Arc<AtomicBool>,
    ) -> io::Result<Self> {
        // A subscriber of events is the user's code as well, and may write to where nobody reads any more.
        if on_report.is_none() && on_exit_code.is_none() && !cfg!(feature = "tracing") {
            begun.store(true, Ordering::Release);
            return Ok(Self { thread: None });
        }
        let (send, messages) = channel();
        let (answer, answers) = channel();
        let speak = move || {
            // An error is a voice dropped unused.
            let Ok(Message { mut report, negotiable }) = messages.recv() else { return };
            begun.store(true, Ordering::Release);
            // Nobody listens any more if the time was up; the same holds of the answer below.
            let _ = answer.send(report.exit_code());
            if negotiable && let Some(code) = on_exit_code.and_then(|exit_code| exit_code(&report)) {
                report.set_exit_code(code);
            }
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
    /// Waits for the callbacks for at most `limit` from when they have begun, and returns the exit code.
    pub(crate) fn wait(self, limit: Duration) -> u8 {
        let Some(answers) = self.answers else { return self.code };
        let _ = answers.recv_timeout(WAKE_UP);
        let until = Instant::now() + limit;
        let code = answers.recv_timeout(limit).unwrap_or(self.code);
        // Ends with the thread or with the time, whichever is first; there is no third answer.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_the_callbacks_begins_with_their_thread() {
        let (answer, answers) = channel();
        let late = std::thread::spawn(move || {
            // Nobody unparks it.
            std::thread::park_timeout(Duration::from_millis(300));
            answer.send(0).and_then(|()| answer.send(65))
        });
        let telling = Telling { code: 0, answers: Some(answers) };
        assert_eq!(telling.wait(Duration::from_millis(200)), 65);
        assert_eq!(late.join().ok(), Some(Ok(())));
    }
}
