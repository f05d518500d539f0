//! A progress bar on the terminal.
//!
//! Invariant: it draws only what is known: without a known total there is no bar, no percentage and no time left.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use indicatif::{HumanCount, HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::{sync::watch, time::Instant};

use crate::progress::Progress;

/// How often the bar looks at the progress.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Shows a progress on the terminal (stderr) as long as the returned bar lives, then leaves its last state there.
///
/// If stderr is not a terminal, it draws nothing. While the total is unknown, it draws a spinner instead of a bar,
/// without a percentage or the time left. A separate thread updates the bar ten times a second, so it moves even while
/// items keep the runtime busy; the thread ends when the bar is dropped.
///
/// # Examples
///
/// ```
/// # use cancel_safe_resumable::{FileStore, ResumableTask};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let store = FileStore::at(dir.path().join("job.ckpt"));
/// let job = ResumableTask::builder("job").store(store);
/// let run = job.stream(0..1000u64, |_, n| async move { Ok(n * n) });
/// let _bar = cancel_safe_resumable::bar(run.subscribe());
/// run.finish().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "the bar is shown as long as it lives"]
pub fn bar(progress: watch::Receiver<Progress>) -> Bar {
    Bar::on(ProgressDrawTarget::stderr(), progress)
}

/// A progress bar, made by [`bar`]. Dropping it draws the last state and ends its thread.
#[must_use = "the bar is shown as long as it lives"]
pub struct Bar {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Bar {
    pub(crate) fn on(target: ProgressDrawTarget, mut progress: watch::Receiver<Progress>) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&is_over);
        let draw = move || {
            let mut drawn = Drawn::on(target);
            // Draws a copy, because the run publishes under the same lock and must not wait for a slow terminal.
            let mut now = || *progress.borrow_and_update();
            while !watched.load(Ordering::Acquire) {
                drawn.show(&now());
                thread::park_timeout(LOOK_EVERY);
            }
            drawn.show(&now());
            drawn.leave();
        };
        // Without a thread there is no bar, and the run goes on.
        let thread = thread::Builder::new().name("progress-bar".to_owned()).spawn(draw).ok();
        Self { is_over, thread }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // The thread draws once more and ends. If it panicked, that is no reason to panic here.
            drop(thread.join());
        }
    }
}

impl fmt::Debug for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bar").finish_non_exhaustive()
    }
}

/// The bar on the terminal.
#[derive(Debug)]
pub(crate) struct Drawn {
    bar: ProgressBar,
    has_total: bool,
}

impl Drawn {
    pub(crate) fn on(target: ProgressDrawTarget) -> Self {
        let bar = ProgressBar::with_draw_target(None, target).with_style(style("{spinner} {msg}"));
        Self { bar, has_total: false }
    }

    pub(crate) fn show(&mut self, progress: &Progress) {
        let has_total = progress.is_total_known();
        if has_total != self.has_total {
            self.has_total = has_total;
            self.bar.set_style(style(if has_total { "{wide_bar} {percent:>3} %  {msg}" } else { "{spinner} {msg}" }));
        }
        match has_total {
            true => self.bar.set_length(progress.total as u64),
            false => self.bar.unset_length(),
        }
        self.bar.set_position(progress.done as u64);
        self.bar.set_message(sentence(progress));
        self.bar.tick();
    }

    /// Leaves the last state on the terminal.
    pub(crate) fn leave(self) {
        self.bar.abandon();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// The progress in words.
pub(crate) fn sentence(progress: &Progress) -> String {
    let mut text = HumanCount(progress.done as u64).to_string();
    if progress.is_total_known() {
        text.push_str(&format!(" of {}", HumanCount(progress.total as u64)));
    }
    text.push_str(" items");
    if progress.failed > 0 {
        text.push_str(&format!(", {} in quarantine", HumanCount(progress.failed as u64)));
    }
    if progress.session_rate > 0.0 {
        text.push_str(&rate(progress.session_rate));
    }
    match progress.eta {
        Some(left) if !left.is_zero() => text.push_str(&format!(", {:#} left", HumanDuration(left))),
        _ => {}
    }
    if let Some(pause) = progress.paused {
        let wait = pause.until.saturating_duration_since(Instant::now());
        text.push_str(&format!(", waits for {:#}: {}", HumanDuration(wait), pause.reason()));
    }
    text
}

/// A rate with as many digits as it needs; a slow one per minute or per hour.
fn rate(per_second: f64) -> String {
    match per_second {
        fast if fast >= 10.0 => format!(", {}/s", HumanCount(fast.round() as u64)),
        some if some >= 1.0 => format!(", {some:.1}/s"),
        some if some >= 1.0 / 60.0 => format!(", {:.1}/min", some * 60.0),
        slow => format!(", {:.1}/h", slow * 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Mutex, mpsc},
    };

    use indicatif::TermLike;

    use super::*;

    /// A terminal that remembers the lines it was given.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<Vec<String>>>);

    impl Screen {
        fn text(&self) -> String {
            self.0.lock().unwrap().join("\n")
        }
    }

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            100
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().map_err(|_| io::Error::other("poisoned"))?.push(text.to_owned());
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn drawn(progress: &Progress) -> String {
        let screen = Screen::default();
        let sender = watch::Sender::new(*progress);
        drop(Bar::on(ProgressDrawTarget::term_like(Box::new(screen.clone())), sender.subscribe()));
        screen.text()
    }

    #[test]
    fn a_known_total_has_a_bar_and_an_unknown_one_no_percentage() {
        let mut known = Progress::new(2000);
        known.restore(500);
        known.failed = 3;
        let text = drawn(&known);
        assert!(text.contains(" 25 %") && text.contains("500 of 2,000 items, 3 in quarantine"), "{text}");
        let mut unknown = Progress::default();
        unknown.restore(500);
        let text = drawn(&unknown);
        assert!(text.contains("500 items") && !text.contains('%') && !text.contains("of "), "{text}");
    }

    #[test]
    fn the_last_state_is_drawn_when_the_bar_is_dropped() {
        let screen = Screen::default();
        let sender = watch::Sender::new(Progress::new(10));
        let bar = Bar::on(ProgressDrawTarget::term_like(Box::new(screen.clone())), sender.subscribe());
        sender.send_modify(|progress| progress.restore(10));
        drop(sender);
        drop(bar);
        let text = screen.text();
        assert!(text.contains("100 %") && text.contains("10 of 10 items"), "{text}");
    }

    /// A terminal that blocks every write until it is released.
    #[derive(Debug)]
    struct Stuck {
        reached: mpsc::Sender<()>,
        go: Arc<Mutex<mpsc::Receiver<()>>>,
    }

    impl TermLike for Stuck {
        fn width(&self) -> u16 {
            100
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, _: &str) -> io::Result<()> {
            let gone = |_| io::Error::other("the test is over");
            self.reached.send(()).map_err(gone)?;
            // An error also releases it: the other side was dropped.
            let go = self.go.lock().map_err(|_| io::Error::other("poisoned"))?;
            go.recv().map_err(io::Error::other)
        }
        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_terminal_that_is_stuck_does_not_hold_the_run_up() {
        let (reached, at_terminal) = mpsc::channel();
        let (let_go, go) = mpsc::channel();
        let sender = watch::Sender::new(Progress::new(10));
        let terminal = Stuck { reached, go: Arc::new(Mutex::new(go)) };
        let bar = Bar::on(ProgressDrawTarget::term_like(Box::new(terminal)), sender.subscribe());
        at_terminal.recv().unwrap();
        let (published, news) = mpsc::channel();
        let run = thread::spawn(move || {
            sender.send_modify(|progress| progress.restore(10));
            published.send(()).unwrap_or_default();
        });
        let news = news.recv_timeout(Duration::from_secs(30));
        drop(let_go);
        run.join().unwrap();
        drop(bar);
        assert!(news.is_ok(), "the run waits for the terminal");
    }

    #[test]
    fn rates_and_times_are_told_in_the_unit_that_fits() {
        let seen = |rate: f64, eta: Option<u64>| {
            let mut progress = Progress::new(100);
            progress.session_rate = rate;
            progress.eta = eta.map(Duration::from_secs);
            sentence(&progress)
        };
        assert_eq!(seen(12_345.6, Some(32)), "0 of 100 items, 12,346/s, 32s left");
        assert_eq!(seen(2.55, Some(0)), "0 of 100 items, 2.5/s");
        assert_eq!(seen(0.5, None), "0 of 100 items, 30.0/min");
        assert_eq!(seen(0.001, Some(7200)), "0 of 100 items, 3.6/h, 2h left");
        assert_eq!(seen(0.0, None), "0 of 100 items");
    }
}
