//! Everything that the program says: a bar or plain lines while it works, one JSON object a line on request, a summary.

use std::collections::{BTreeMap, VecDeque};
use std::error::Error;
use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanDuration, ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

/// How often a line of progress is written where there is no terminal.
pub(crate) const LINE_EVERY: Duration = Duration::from_secs(5);

/// The window for the rates.
const RECENT: Duration = Duration::from_secs(15);
/// The most waiting hosts that one line names.
const MAX_WAITS: usize = 3;

/// What one host has done in this run.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Host {
    pub(crate) files: u64,
    pub(crate) bytes: u64,
    pub(crate) retries: u64,
    pub(crate) failures: u64,
    pub(crate) trips: u64,
    /// Files that were there already.
    pub(crate) restored: u64,
}

/// The outcome of one URL, as an event reports it.
#[derive(Debug, Default)]
pub(crate) struct Event<'a> {
    pub(crate) url: &'a str,
    pub(crate) path: Option<&'a str>,
    pub(crate) bytes: Option<i64>,
    pub(crate) sha256: Option<&'a str>,
    pub(crate) attempts: Option<u32>,
    pub(crate) phase: Option<&'a str>,
    pub(crate) cause: Option<&'a str>,
    pub(crate) elapsed: Option<Duration>,
}

/// The voice of the program.
#[derive(Debug)]
pub(crate) struct Reporter {
    json: bool,
    bar: Option<ProgressBar>,
    started: Instant,
    /// Bytes of bodies so far.
    arrived: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    hosts: BTreeMap<String, Host>,
    total: u64,
    done: u64,
    recent: Recent,
}

/// Recent totals, from which the rates are computed.
#[derive(Debug, Default)]
struct Recent(VecDeque<(Duration, u64, u64)>);

struct Rates {
    /// Per second.
    bytes: f64,
    /// Per second, without the files that were there already.
    files: f64,
}

impl Recent {
    /// Takes the bytes and files so far at a time since the start, and returns the rates of the last [`RECENT`].
    fn rates(&mut self, now: Duration, bytes: u64, files: u64) -> Rates {
        let oldest = now.saturating_sub(RECENT);
        while self.0.get(1).is_some_and(|(time, ..)| *time <= oldest) {
            self.0.pop_front();
        }
        let (time, bytes_then, files_then) = self.0.front().copied().unwrap_or_default();
        self.0.push_back((now, bytes, files));
        let seconds = now.saturating_sub(time).as_secs_f64().max(0.001);
        Rates { bytes: (bytes - bytes_then) as f64 / seconds, files: files.saturating_sub(files_then) as f64 / seconds }
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Some layers repeat their cause in their own words.
        if !text.contains(&cause_text) {
            let _infallible = write!(text, ": {cause_text}");
        }
        next = cause.source();
    }
    text
}

/// The host of a normalised URL as the summary groups it, with its port if that is not the scheme's own: as
/// [`hosts::name_of`](super::hosts::name_of) has it, without parsing what was parsed before.
pub(crate) fn host_of(url: &str) -> &str {
    let authority = url.split_once("://").map_or("", |(_, rest)| rest);
    authority.split('/').next().unwrap_or_default()
}

impl Reporter {
    pub(crate) fn new(json: bool) -> Self {
        let bar = (!json && std::io::stderr().is_terminal()).then(|| {
            let template = "{bar:32} {pos}/{len} {msg}";
            ProgressBar::new(0)
                .with_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { json, bar, started: Instant::now(), arrived: AtomicU64::new(0), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many URLs there are in all.
    pub(crate) fn set_total(&self, total: usize) {
        self.state().total = total as u64;
        if let Some(bar) = &self.bar {
            bar.set_length(total as u64);
        }
    }

    /// Changes the counts of a host.
    pub(crate) fn count(&self, host: &str, change: impl FnOnce(&mut Host)) {
        let mut state = self.state();
        if let Some(host) = state.hosts.get_mut(host) {
            return change(host);
        }
        change(state.hosts.entry(host.to_owned()).or_default());
    }

    /// More URLs have come to their end.
    pub(crate) fn advance(&self, urls: usize) {
        self.state().done += urls as u64;
    }

    /// The sum over all hosts.
    pub(crate) fn sum(&self) -> Host {
        self.state().hosts.values().fold(Host::default(), |sum, host| Host {
            files: sum.files + host.files,
            bytes: sum.bytes + host.bytes,
            retries: sum.retries + host.retries,
            failures: sum.failures + host.failures,
            trips: sum.trips + host.trips,
            restored: sum.restored + host.restored,
        })
    }

    /// Shows the progress; called every few seconds and, for a bar, ten times a second.
    pub(crate) fn tick(&self, open_breakers: usize, waits: &[String]) {
        let sum = self.sum();
        let arrived = self.arrived.load(Ordering::Relaxed);
        let (done, total, rates) = {
            let mut state = self.state();
            let fetched = state.done - state.done.min(sum.restored);
            let rates = state.recent.rates(self.started.elapsed(), arrived, fetched);
            (state.done, state.total, rates)
        };
        let left = total.saturating_sub(done) as f64;
        let eta = (rates.files > 0.0).then(|| Duration::from_secs_f64((left / rates.files).min(1e8)));
        let eta_text = eta.map_or_else(|| "unknown".to_owned(), |eta| HumanDuration(eta).to_string());
        let rate = HumanBytes(rates.bytes as u64);
        let mut message = format!("{} at {rate}/s, ETA {eta_text}, {} retries", HumanBytes(arrived), sum.retries);
        for wait in waits.iter().take(MAX_WAITS) {
            let _infallible = write!(message, "; {wait}");
        }
        if waits.len() > MAX_WAITS {
            let _infallible = write!(message, "; {} more hosts like that", waits.len() - MAX_WAITS);
        }
        match &self.bar {
            Some(bar) => {
                bar.set_position(done);
                bar.set_message(message);
            }
            None if self.json => self.object(json!({
                "event": "progress", "done": done, "total": total, "bytes": arrived, "retries": sum.retries,
                "open_breakers": open_breakers, "waits": waits, "eta_ms": eta.map(|eta| eta.as_millis() as u64),
                "elapsed_ms": self.started.elapsed().as_millis() as u64,
            })),
            None => self.line(&format!("{done}/{total} files, {message}")),
        }
    }

    /// Notes that this many bytes of bodies have arrived.
    pub(crate) fn arrived(&self, bytes: usize) {
        self.arrived.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// How long to wait between two calls of [`Reporter::tick`].
    pub(crate) fn interval(&self) -> Duration {
        if self.bar.is_some() { Duration::from_millis(100) } else { LINE_EVERY }
    }

    /// Reports the outcome of a URL. In text mode only failures and cuts get a line.
    pub(crate) fn event(&self, name: &str, event: &Event<'_>) {
        if self.json {
            let mut object = Map::new();
            object.insert("event".to_owned(), name.into());
            object.insert("url".to_owned(), event.url.into());
            let mut add = |key: &str, value: Option<Value>| {
                if let Some(value) = value {
                    object.insert(key.to_owned(), value);
                }
            };
            add("path", event.path.map(Into::into));
            add("bytes", event.bytes.map(Into::into));
            add("sha256", event.sha256.map(Into::into));
            add("attempts", event.attempts.map(Into::into));
            add("phase", event.phase.map(Into::into));
            add("cause", event.cause.map(Into::into));
            add("elapsed_ms", event.elapsed.map(|elapsed| (elapsed.as_millis() as u64).into()));
            self.object(Value::Object(object));
        } else if matches!(name, "failed" | "cut") {
            let mut line = format!("{name}: {}", event.url);
            if let Some(phase) = event.phase {
                let _infallible = write!(line, " ({phase}");
                if let Some(attempts) = event.attempts {
                    let _infallible = write!(line, ", {attempts} attempt{}", if attempts == 1 { "" } else { "s" });
                }
                line.push(')');
            }
            if let Some(cause) = event.cause {
                let _infallible = write!(line, ": {cause}");
            }
            self.line(&line);
        }
    }

    /// A sentence for the person who watches.
    pub(crate) fn notice(&self, text: &str) {
        if self.json { self.object(json!({ "event": "notice", "cause": text })) } else { self.line(text) }
    }

    /// The table at the end.
    pub(crate) fn summary(&self, verdict: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let hosts = self.state().hosts.clone();
        if self.json {
            let hosts: Map<String, Value> = hosts
                .into_iter()
                .map(|(name, host)| {
                    let value = json!({ "files": host.files, "bytes": host.bytes, "retries": host.retries,
                        "failures": host.failures, "trips": host.trips, "restored": host.restored });
                    (name, value)
                })
                .collect();
            self.object(json!({ "event": "summary", "cause": verdict, "hosts": hosts,
                "elapsed_ms": self.started.elapsed().as_millis() as u64 }));
            return;
        }
        let mut text = String::new();
        if !hosts.is_empty() {
            let width = hosts.keys().map(String::len).max().unwrap_or(0).max(4);
            let _infallible = writeln!(
                text,
                "{:width$} {:>8} {:>12} {:>8} {:>8} {:>6} {:>8}",
                "host", "files", "bytes", "retries", "failures", "trips", "restored"
            );
            for (name, host) in hosts {
                let bytes = HumanBytes(host.bytes).to_string();
                let _infallible = writeln!(
                    text,
                    "{name:width$} {:>8} {bytes:>12} {:>8} {:>8} {:>6} {:>8}",
                    host.files, host.retries, host.failures, host.trips, host.restored
                );
            }
        }
        let _infallible = write!(text, "{verdict} ({:.1} s)", self.started.elapsed().as_secs_f64());
        // A reader that has gone away does not change what is on disk.
        let _closed = writeln!(std::io::stdout().lock(), "{text}");
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.stderr(text)),
            None => self.stderr(text),
        }
    }

    fn stderr(&self, text: &str) {
        let _closed = writeln!(std::io::stderr().lock(), "{text}");
    }

    fn object(&self, value: Value) {
        let _closed = writeln!(std::io::stdout().lock(), "{value}");
    }
}
