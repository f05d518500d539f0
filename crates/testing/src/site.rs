//! From a backtrace to the line of the await.
//!
//! Invariant: only the user's own source files are named: never the standard library, a registry crate or this one.

use std::backtrace::Backtrace;
use std::fmt;
use std::panic::Location;

/// The line of an await.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Site {
    file: String,
    line: u32,
}

impl Site {
    pub(crate) fn new(file: String, line: u32) -> Self {
        Self { file, line }
    }

    /// The source file, as `file!()` spells it: relative to the workspace.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The line of the `.await`.
    #[must_use]
    pub fn line(&self) -> u32 {
        self.line
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Names awaits. Resolving a trace takes milliseconds in a large binary, so it is asked once for each point.
#[derive(Debug)]
pub(crate) struct Namer {
    /// The file that called `run`, as `file!()` spells it.
    caller: &'static str,
    /// The workspace's directory, with its slash, once a trace has shown it.
    root: Option<String>,
}

impl Namer {
    pub(crate) fn new(caller: &'static Location<'static>) -> Self {
        Self { caller: caller.file(), root: None }
    }

    /// The await at which a poll that left these traces is waiting.
    ///
    /// The last trace is the one of the leaf that is pending: an earlier leaf may have become ready in the same poll.
    /// But in `timeout(d, operation)` the timer comes last and the operation knows more: a trace that passes through
    /// the same await and goes deeper is preferred.
    pub(crate) fn name(&mut self, traces: &[Backtrace]) -> Option<Site> {
        let stacks: Vec<Vec<Frame>> = traces.iter().map(|trace| self.awaits(trace)).collect();
        let last = stacks.last()?;
        let deepest = stacks.iter().rev().filter(|stack| stack.ends_with(last)).max_by_key(|stack| stack.len());
        deepest?.first().map(|frame| frame.site.clone())
    }

    /// The user's frames of a trace, innermost first. Hand-written `poll` functions are left out where an `async`
    /// block or function around them is seen, because that one has the await.
    fn awaits(&mut self, trace: &Backtrace) -> Vec<Frame> {
        let mut frames = frames(&format!("{trace:#}"));
        if self.root.is_none() {
            // The outermost such frame is the caller of `run`; another package may have a file of the same name.
            self.root = frames.iter().rev().find_map(|frame| {
                let root = frame.site.file.strip_suffix(self.caller)?;
                root.ends_with('/').then(|| root.to_owned())
            });
        }
        for frame in &mut frames {
            if let Some(relative) = self.root.as_deref().and_then(|root| frame.site.file.strip_prefix(root)) {
                frame.site.file = relative.to_owned();
            }
        }
        frames.retain(|frame| !frame.site.file.starts_with("vendor/"));
        if frames.iter().any(|frame| frame.is_async) {
            frames.retain(|frame| frame.is_async);
        }
        frames
    }
}

/// One of the user's frames.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Frame {
    site: Site,
    /// Whether it is the body of an `async` function or block, or of a closure: these look alike in a trace.
    is_async: bool,
}

/// Reads the standard library's rendering of a trace: a line `12: 0x55d0 - name`, then a line `at file:line:column`.
fn frames(trace: &str) -> Vec<Frame> {
    let mut name = "";
    let mut frames = Vec::new();
    for line in trace.lines() {
        let line = line.trim();
        if let Some(place) = line.strip_prefix("at ") {
            let mut parts = place.rsplitn(3, ':');
            let (Some(_column), Some(line), Some(file)) = (parts.next(), parts.next(), parts.next()) else { continue };
            let (Ok(line), true) = (line.parse(), is_users(file)) else { continue };
            // `{async_fn#0}` or `{{closure}}::h0123456789abcdef`, depending on how names are mangled.
            let is_async = without_hash(name).ends_with('}');
            frames.push(Frame { site: Site { file: file.replace('\\', "/"), line }, is_async });
        } else if let Some((_, rest)) = line.split_once(": ") {
            name = rest.split_once(" - ").map_or(rest, |(_, name)| name);
        }
    }
    frames
}

/// Decided by path, not by whether there is debug information: a build may have it for every crate.
fn is_users(file: &str) -> bool {
    let file = file.replace('\\', "/");
    let foreign = ["/rustc/", "/rustlib/src/", "/registry/src/", "/git/checkouts/"];
    // Only this crate's own sources: another member of the same workspace is user code, and so are our tests.
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/src/").replace('\\', "/");
    !foreign.iter().any(|part| file.contains(part)) && !file.starts_with(&own)
}

/// Older symbol names end in `::h` and sixteen hexadecimal digits.
fn without_hash(name: &str) -> &str {
    match name.rsplit_once("::h") {
        Some((rest, hash)) if hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => rest,
        _ => name,
    }
}
