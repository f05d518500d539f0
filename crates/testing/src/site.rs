//! From a backtrace to the line of the await.
//!
//! Invariant: it names only the user's own source files: never the standard library, a registry crate or this crate.

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

/// Where an operation waits: the await, and the awaits around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Await {
    /// Innermost first; the first is the await itself.
    sites: Vec<Site>,
    /// The same frames as the debug information spells them: absolute path, line, column.
    frames: Vec<Place>,
}

/// A frame, for coverage.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Place {
    pub(crate) path: String,
    pub(crate) line: u32,
    pub(crate) column: u32,
}

impl Await {
    /// A place that another process has named.
    pub(crate) fn bare(site: Site) -> Self {
        Self { sites: vec![site], frames: Vec::new() }
    }

    pub(crate) fn site(&self) -> &Site {
        &self.sites[0]
    }

    pub(crate) fn callers(&self) -> &[Site] {
        &self.sites[1..]
    }

    pub(crate) fn frames(&self) -> &[Place] {
        &self.frames
    }
}

/// Names awaits. Resolving a trace takes milliseconds in a large binary, so it is done once for each point.
#[derive(Debug)]
pub(crate) struct Namer {
    /// The call of the exploration; its file as `file!()` spells it.
    caller: &'static Location<'static>,
    /// The workspace's directory, with its slash, once a trace has shown it.
    root: Option<String>,
}

impl Namer {
    pub(crate) fn new(caller: &'static Location<'static>) -> Self {
        Self { caller, root: None }
    }

    /// The await at which the poll that left these traces is waiting.
    ///
    /// The last trace is the one of the leaf that is pending: an earlier leaf may have become ready in the same poll.
    /// But in `timeout(d, operation)` the timer comes last, and the operation's trace says more: a trace that passes
    /// through the same await and goes deeper is preferred.
    pub(crate) fn name(&mut self, traces: &[Backtrace]) -> Option<Await> {
        let stacks: Vec<Vec<Frame>> = traces.iter().map(|trace| self.awaits(trace)).collect();
        let last = stacks.last()?;
        let deepest = stacks.iter().rev().filter(|stack| ends_with(stack, last)).max_by_key(|stack| stack.len())?;
        if deepest.is_empty() {
            return None;
        }
        Some(Await {
            sites: deepest.iter().map(|frame| frame.site.clone()).collect(),
            frames: deepest.iter().map(|frame| frame.place.clone()).collect(),
        })
    }

    /// The user's frames of a trace, innermost first. Hand-written `poll` functions are left out if an `async` block or
    /// function around them is in the trace, because that one has the await.
    fn awaits(&mut self, trace: &Backtrace) -> Vec<Frame> {
        let (mut frames, inside) = frames(&format!("{trace:#}"));
        if self.root.is_none() {
            // The outermost such frame is the caller of `run`; another package may have a file of the same name.
            self.root = frames.iter().rev().find_map(|frame| {
                let root = frame.site.file.strip_suffix(self.caller.file())?;
                root.ends_with('/').then(|| root.to_owned())
            });
        }
        for frame in &mut frames {
            if let Some(relative) = self.root.as_deref().and_then(|root| frame.site.file.strip_prefix(root)) {
                frame.site.file = relative.to_owned();
            }
        }
        // The frames around the operation belong to the test that explores it.
        frames.truncate(inside);
        frames.retain(|frame| !frame.site.file.starts_with("vendor/"));
        if frames.iter().any(|frame| frame.is_async) {
            frames.retain(|frame| frame.is_async);
        }
        frames
    }
}

fn ends_with(stack: &[Frame], last: &[Frame]) -> bool {
    stack.len() >= last.len() && stack[stack.len() - last.len()..].iter().zip(last).all(|(a, b)| a.site == b.site)
}

/// One of the user's frames.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Frame {
    site: Site,
    place: Place,
    /// Whether it is the body of an `async` function or block, or of a closure: these look alike in a trace.
    is_async: bool,
}

/// Reads the standard library's rendering of a trace: a line `12: 0x55d0 - name`, then a line `at file:line:column`.
/// Also returns how many of the frames are inside the poll of the operation.
fn frames(trace: &str) -> (Vec<Frame>, usize) {
    let poll = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tracer.rs").replace('\\', "/");
    let mut name = "";
    let mut frames = Vec::new();
    let mut inside = None;
    for line in trace.lines() {
        let line = line.trim();
        if let Some(place) = line.strip_prefix("at ") {
            let mut parts = place.rsplitn(3, ':');
            let (Some(column), Some(line), Some(file)) = (parts.next(), parts.next(), parts.next()) else { continue };
            if inside.is_none() && !frames.is_empty() && file.replace('\\', "/") == poll {
                inside = Some(frames.len());
            }
            let (Ok(line), Ok(column), true) = (line.parse(), column.parse(), is_users(file)) else { continue };
            // `{async_fn#0}`, `{async_fn#0}<u8>` or `{{closure}}::h0123456789abcdef`, depending on how names are mangled.
            let is_async = without_arguments(without_hash(name)).ends_with('}');
            let path = file.replace('\\', "/");
            let place = Place { path: path.clone(), line, column };
            frames.push(Frame { site: Site { file: path, line }, place, is_async });
        } else if let Some((_, rest)) = line.split_once(": ") {
            name = rest.split_once(" - ").map_or(rest, |(_, name)| name);
        }
    }
    let inside = inside.unwrap_or(frames.len());
    (frames, inside)
}

/// Decided by path, not by the presence of debug information, because a build may have that for every crate.
fn is_users(file: &str) -> bool {
    let file = file.replace('\\', "/");
    let foreign = ["/rustc/", "/rustlib/src/", "/registry/src/", "/git/checkouts/"];
    // Only this crate's own sources: another member of the same workspace is user code, and so are our tests.
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/src/").replace('\\', "/");
    // Without line tables only the C library has line numbers.
    file.ends_with(".rs") && !foreign.iter().any(|part| file.contains(part)) && !file.starts_with(&own)
}

/// Older symbol names end in `::h` and sixteen hexadecimal digits.
fn without_hash(name: &str) -> &str {
    match name.rsplit_once("::h") {
        Some((rest, hash)) if hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()) => rest,
        _ => name,
    }
}

/// A generic function is followed by its arguments.
fn without_arguments(name: &str) -> &str {
    let Some(rest) = name.strip_suffix('>') else { return name };
    let mut depth = 1_usize;
    for (at, character) in rest.char_indices().rev() {
        match character {
            // The arrow of a function's type.
            '>' if rest[..at].ends_with('-') => {}
            '>' => depth += 1,
            '<' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return &rest[..at];
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn async_functions_are_told_from_others_in_every_mangling() {
        let is_async = |name| without_arguments(without_hash(name)).ends_with('}');
        for name in [
            "bank::transfer::{async_fn#0}",
            "bank::transfer::{{closure}}::h0123456789abcdef",
            "bank::transfer::{async_fn#0}<alloc::vec::Vec<u8>, fn(u8) -> u8>",
            "<bank::Bank as bank::Trait>::transfer::{closure#0}::{async_block#1}<bank::Row>",
        ] {
            assert!(is_async(name), "{name}");
        }
        for name in ["bank::transfer", "bank::poll::<u8>", "<bank::Bank as core::future::Future>::poll", "main"] {
            assert!(!is_async(name), "{name}");
        }
    }
}
