//! The command line: the options, and the exit codes.

use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser, ValueEnum};
use reqwest::header::{self, HeaderName, HeaderValue};

/// Keeps a directory equal to a list of URLs, and survives everything.
///
/// Without --manifest it runs a demo: it serves 500 files on loopback, fetches them into ./mirror-demo with a plain
/// loop and with mirror, kills both five times with SIGKILL, starts them again, and counts what is wrong at the end.
#[derive(Debug, Clone, Parser)]
#[command(name = "mirror", version, after_help = CODES, args_override_self = true)]
pub(crate) struct Args {
    /// A file with one URL a line; blank lines and # comments are skipped; - reads standard input
    #[arg(long, value_name = "FILE", requires = "out")]
    pub(crate) manifest: Option<PathBuf>,
    /// The directory for files/, catalog.db and mirror.ckpt [default without --manifest: ./mirror-demo, for both sides]
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// URLs in flight at once
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) concurrency: u16,
    /// Requests in flight at once to one host
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) per_host: u16,
    /// How often a failed URL is tried again
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub(crate) retries: u32,
    /// How long fetches in flight may take to finish after Ctrl-C or SIGTERM
    #[arg(long, default_value = "10s", value_name = "TIME", value_parser = duration)]
    pub(crate) grace: Duration,
    /// Longest silence of the server within an attempt; waiting for a permit does not count
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// Longest time for one attempt at a URL, from its permit to its last byte [default: none]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) max_time: Option<Duration>,
    /// Largest accepted body, in bytes (or with K, M or G) [default: none]
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub(crate) max_body: Option<u64>,
    /// Send this header with every request to a URL's own origin, but not to one that it redirects to: 'Name: value'
    #[arg(long = "header", value_name = "HEADER")]
    headers: Vec<Secret>,
    /// The User-Agent of every request [default: mirror/VERSION]
    #[arg(long, value_name = "TEXT", value_parser = user_agent)]
    pub(crate) user_agent: Option<HeaderValue>,
    /// A file of PEM certificates to trust in addition to the system's
    #[arg(long, value_name = "FILE")]
    pub(crate) ca: Vec<PathBuf>,
    /// sqlite:PATH or postgres://… [default: sqlite:DIR/catalog.db]
    #[arg(long, value_name = "URL", requires = "manifest")]
    database: Option<Secret>,
    /// When new files are made durable
    #[arg(long, default_value = "each", value_name = "WHEN")]
    pub(crate) durability: Durability,
    /// Try again the URLs that failed for good in earlier runs
    #[arg(long)]
    pub(crate) retry_failed: bool,
    /// Ask the servers again for everything (If-None-Match, If-Modified-Since)
    #[arg(long)]
    pub(crate) refresh: bool,
    /// Take over files that the catalogue does not know, if their bytes match the list, the checkpoint or the server
    #[arg(long)]
    pub(crate) adopt: bool,
    /// Rehash every file first, and fetch again those that differ from the catalogue
    #[arg(long)]
    pub(crate) verify: bool,
    /// Print one JSON object a line on standard output instead of text
    #[arg(long)]
    pub(crate) json: bool,
    /// Without --manifest: the seed for the moments of the demo's kills [default: a new one each time; it is printed]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Without --manifest: a tenth of the files, small ones.
    #[arg(long, hide = true)]
    pub(crate) short: bool,
    /// Like `--short`, and some bodies come so slowly that nobody sees their end.
    #[arg(long, hide = true)]
    pub(crate) endless: bool,
    /// HOST=ADDRESS: how a child of the demo is told where the origin listens.
    #[arg(long, hide = true, value_parser = resolve)]
    pub(crate) resolve: Vec<(String, SocketAddr)>,
    /// Ends at once when standard input does, so that no child outlives the demo.
    #[arg(long, hide = true)]
    pub(crate) lifeline: bool,
    /// The demo's plain loop instead of mirror.
    #[arg(long, hide = true, requires = "manifest")]
    pub(crate) plain: bool,
}

const CODES: &str = "\
A line of the list is a URL, or a URL and fields after tabs: sha256=, size=, out=; or a line as sha256sum writes it.
A body that does not match its line is not kept. HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY are respected.

Exit codes:
  0  complete               2  finished, some URLs failed     64  bad usage or manifest
 65  corrupt checkpoint    69  database unreachable           70  grace exceeded, fetches were cut
 73  cannot write          75  another run holds DIR         130, 143  stopped by SIGINT, SIGTERM";

/// A value that may hold a secret. No error message shows it; it is parsed only after the whole command line.
#[derive(Clone)]
struct Secret(String);

impl FromStr for Secret {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// When new files become durable. A file that replaces another is durable at once, so that a power cut leaves the old
/// or the new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Durability {
    /// Each at once: a file with a row survives a power cut
    Each,
    /// All together at the end, and after every 8,192: faster, but after a kill or a power cut the next start reads
    /// pending files again, or fetches them
    End,
}

/// Files that a run has open besides those of its fetches: databases, checkpoint, list, lock, streams, the runtime.
const OWN_FILES: u16 = 28;

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Complete = 0,
    Failures = 2,
    Usage = 64,
    Corrupt = 65,
    Database = 69,
    Grace = 70,
    Write = 73,
    Busy = 75,
    Interrupted = 130,
    Terminated = 143,
}

impl Args {
    /// Parses the command line; `Err` is what to print, and the code to end with.
    pub(crate) fn read() -> Result<Self, (clap::Error, Exit)> {
        let usage = |why: String| (Self::command().error(ErrorKind::ValueValidation, why), Exit::Usage);
        let args = Self::try_parse().map_err(|error| match error.get(ContextKind::InvalidArg) {
            // Perhaps a URL with credentials, or the end of a header without quotes.
            Some(ContextValue::String(stray))
                if error.kind() == ErrorKind::UnknownArgument && !stray.starts_with('-') =>
            {
                usage("an argument belongs to no option; URLs go into the list that --manifest names".to_owned())
            }
            _ if error.use_stderr() => (error, Exit::Usage),
            _ => (error, Exit::Complete),
        })?;
        args.headers().and(args.database().map(drop)).map_err(usage)?;
        Ok(args)
    }

    /// The headers that are sent with every request.
    pub(crate) fn headers(&self) -> Result<Vec<(HeaderName, HeaderValue)>, String> {
        let header = |text: &Secret| header(&text.0).map_err(|why| format!("--header: {why}"));
        self.headers.iter().map(header).collect()
    }

    /// The URL of the catalogue's database.
    pub(crate) fn database(&self) -> Result<Option<&str>, String> {
        match self.database.as_ref().map(|url| url.0.as_str()) {
            Some(url)
                if !url.starts_with("sqlite:") && !url.starts_with("postgres:") && !url.starts_with("postgresql:") =>
            {
                Err("--database: expected sqlite:PATH or postgres://…".to_owned())
            }
            url => Ok(url),
        }
    }

    /// Returns the same options, with no more fetches in flight than the process may open files for.
    pub(crate) fn within_limits(&self) -> Self {
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        let files = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
        let files: u16 = files.and_then(|files| files.parse().ok()).unwrap_or(u16::MAX);
        // A socket each; a temporary file and its directory, of as many bodies that wait for the disk; and a directory each of
        // twice as many files whose names are made durable. All that beside what the run itself has open.
        let most = (files.saturating_sub(OWN_FILES) / 5).max(1);
        Self { concurrency: self.concurrency.min(most), per_host: self.per_host.min(most), ..self.clone() }
    }

    /// The directory that is kept.
    pub(crate) fn out(&self) -> PathBuf {
        self.out.clone().unwrap_or_else(|| PathBuf::from("mirror-demo"))
    }
}

/// A number and a unit: `250ms`, `10s`, `2m`, `1h`; without a unit, seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "expected a time such as 250ms, 10s, 2m or 1h".to_owned())?;
    let millis = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => return Err(format!("unknown unit of time {unit:?}: use ms, s, m or h")),
    };
    let limit = 30 * 24 * 3_600_000;
    millis.filter(|millis| *millis <= limit).map(Duration::from_millis).ok_or_else(|| "more than 30 days".to_owned())
}

/// A number of bytes, with K, M or G for powers of 1,024.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "expected a size such as 4096, 64K, 16M or 1G".to_owned())?;
    let shift = match unit.to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err(format!("unknown unit of size {unit:?}: use K, M or G")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| "larger than a file can be".to_owned())
}

fn resolve(text: &str) -> Result<(String, SocketAddr), String> {
    let parsed = text.split_once('=').and_then(|(host, address)| Some((host.to_owned(), address.parse().ok()?)));
    parsed.ok_or_else(|| "expected HOST=ADDRESS:PORT".to_owned())
}

/// `Name: value`.
fn header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text.split_once(':').ok_or_else(|| "expected 'Name: value'".to_owned())?;
    let name: HeaderName = name.trim().parse().map_err(|_| "that is no name of a header".to_owned())?;
    if [header::RANGE, header::IF_RANGE, header::IF_NONE_MATCH, header::IF_MODIFIED_SINCE].contains(&name) {
        return Err("the range and the conditions of a request are set by the program itself".to_owned());
    }
    let mut value: HeaderValue = value.trim().parse().map_err(|_| "that is no value of a header".to_owned())?;
    // So that it is never printed.
    value.set_sensitive(true);
    Ok((name, value))
}

fn user_agent(text: &str) -> Result<HeaderValue, String> {
    text.parse().map_err(|_| "that is no value of a header".to_owned())
}
