//! What the demo shows: a bar for each side while it runs, or plain lines where there is no terminal; a table at the end.
//!
//! Invariant: escape codes go to a terminal only, and with `--json` standard output has one object a line.

use std::fmt::Display;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use super::origin::Progress;

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// The progress of one side.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    pub(crate) progress: Progress,
    pub(crate) kills: usize,
    /// How long it took, once it has finished.
    pub(crate) took: Option<Duration>,
    /// What it waits for, if it has stalled.
    pub(crate) waits: Option<String>,
}

/// One line of the table: what is counted, and each side's number.
pub(crate) struct Row {
    pub(crate) what: &'static str,
    /// Its name as `--json` has it.
    pub(crate) key: &'static str,
    pub(crate) counts: [Value; 2],
}

impl Row {
    pub(crate) fn new(what: &'static str, key: &'static str, counts: [impl Into<Value>; 2]) -> Self {
        Self { what, key, counts: counts.map(Into::into) }
    }
}

/// The output of the demo, which names its two sides.
#[derive(Debug)]
pub(crate) struct Screen {
    names: [&'static str; 2],
    files: usize,
    voice: Voice,
}

#[derive(Debug)]
enum Voice {
    Bars(MultiProgress, [ProgressBar; 2]),
    Lines,
    Json,
}

impl Screen {
    pub(crate) fn new(json: bool, names: [&'static str; 2], files: usize) -> Self {
        let voice = match (json, std::io::stderr().is_terminal()) {
            (true, _) => Voice::Json,
            (false, false) => Voice::Lines,
            (false, true) => {
                let bars = MultiProgress::new();
                let template = "{prefix:10} {bar:24} {pos:>3}/{len} files  {wide_msg}";
                let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
                let bar = |name| bars.add(ProgressBar::new(files as u64).with_style(style.clone()).with_prefix(name));
                let both = names.map(bar);
                Voice::Bars(bars, both)
            }
        };
        Self { names, files, voice }
    }

    /// How long to wait between two calls of [`Screen::show`].
    pub(crate) fn interval(&self) -> Duration {
        if matches!(self.voice, Voice::Bars(..)) { Duration::from_millis(100) } else { LINE_EVERY }
    }

    /// Shows where both stand.
    pub(crate) fn show(&self, sides: [Standing; 2]) {
        match &self.voice {
            Voice::Bars(_, bars) => {
                for (bar, side) in bars.iter().zip(&sides) {
                    bar.set_position(side.progress.files as u64);
                    bar.set_message(said(side));
                }
            }
            Voice::Lines => {
                for (name, side) in self.names.iter().zip(&sides).filter(|(_, side)| side.took.is_none()) {
                    self.note(format!("{name:10} {:>3}/{} files, {}", side.progress.files, self.files, said(side)));
                }
            }
            Voice::Json => {
                for (name, side) in self.names.iter().zip(&sides) {
                    object(&json!({ "event": "progress", "side": name, "files": side.progress.files,
                        "total": self.files, "bytes": side.progress.bytes, "kills": side.kills,
                        "waits": side.waits, "seconds": side.took.map(|took| took.as_secs_f64()) }));
                }
            }
        }
    }

    /// A sentence for the person who watches.
    pub(crate) fn note(&self, text: impl Display) {
        match &self.voice {
            Voice::Bars(bars, _) => bars.suspend(|| stderr(&text)),
            Voice::Lines => stderr(&text),
            Voice::Json => object(&json!({ "event": "notice", "cause": text.to_string() })),
        }
    }

    /// Shows the result.
    pub(crate) fn table(&self, seed: u64, rows: &[Row]) {
        if let Voice::Json = self.voice {
            let side = |index: usize| -> Map<String, Value> {
                rows.iter().map(|row| (row.key.to_owned(), row.counts[index].clone())).collect()
            };
            let [first, second] = self.names;
            return object(&json!({ "event": "table", "seed": seed, first: side(0), second: side(1) }));
        }
        if let Voice::Bars(bars, both) = &self.voice {
            both.iter().for_each(ProgressBar::finish_and_clear);
            // The table is complete by itself: bars that cannot be removed do no harm.
            drop(bars.clear());
        }
        let width = rows.iter().map(|row| row.what.len()).max().unwrap_or(0);
        let line = |what: &str, [first, second]: [String; 2]| format!("{what:width$} {first:>12} {second:>12}\n");
        let text: String = std::iter::once(line("", self.names.map(str::to_owned)))
            .chain(rows.iter().map(|row| line(row.what, [&row.counts[0], &row.counts[1]].map(plainly))))
            .collect();
        // A reader that has gone away does not change what is on disk.
        drop(write!(std::io::stdout().lock(), "\n{text}\n"));
    }
}

/// Where a side stands, beside its bar.
fn said(side: &Standing) -> String {
    let bytes = HumanBytes(side.progress.bytes);
    let killed = match side.kills {
        0 => String::new(),
        1 => ", killed once".to_owned(),
        times => format!(", killed {times} times"),
    };
    let now = match (&side.took, &side.waits) {
        (Some(took), _) => format!(", through after {:.1} s", took.as_secs_f64()),
        (None, Some(waits)) => format!(", waits: {waits}"),
        (None, None) => String::new(),
    };
    format!("{bytes}{killed}{now}")
}

fn plainly(count: &Value) -> String {
    match count {
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => format!("{:.1}", number.as_f64().unwrap_or_default()),
        other => other.to_string(),
    }
}

fn stderr(text: impl Display) {
    // Nobody is left to be told.
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

fn object(value: &Value) {
    drop(writeln!(std::io::stdout().lock(), "{value}"));
}
