//! The page of the book.
//!
//! Invariant: the page depends only on the definitions, the versions and the verdicts, not on the machine, the time, or
//! the order in which anything ended.

use std::fmt::Write as _;

use cancel_safe_testing::{Report, Verdict};

use crate::row::{From, Row, Says};

/// The versions that were built, as the lockfile lists them.
#[derive(Debug)]
pub(crate) struct Versions(Vec<(From, String)>);

impl Versions {
    pub(crate) fn read(lockfile: &str) -> Result<Self, String> {
        let find = |from: From| {
            let name = format!("name = \"{}\"\nversion = \"", from.package());
            let (_, rest) = lockfile.split_once(&name).ok_or_else(|| format!("{} is not locked", from.package()))?;
            let (version, _) = rest.split_once('"').unwrap_or((rest, ""));
            Ok((from, version.to_owned()))
        };
        From::ALL.into_iter().map(find).collect::<Result<_, _>>().map(Self)
    }

    fn url(&self, from: From, page: &str) -> String {
        let version = self.0.iter().find(|(it, _)| *it == from).map_or("latest", |(_, version)| version.as_str());
        let (package, library) = (from.package(), from.package().replace('-', "_"));
        format!("https://docs.rs/{package}/{version}/{library}/{page}")
    }

    fn tell(&self) -> String {
        let versions: Vec<_> = self.0.iter().map(|(from, version)| format!("{} {version}", from.package())).collect();
        versions.join(", ")
    }
}

/// A row and its result.
#[derive(Debug)]
pub(crate) struct Judged {
    row: Row,
    verdict: Verdict,
    seen: String,
}

impl Judged {
    /// Refuses a row that cannot be shown: an operation without a verdict, or an unexplained difference.
    pub(crate) fn new(row: Row, report: &Report) -> Result<Self, String> {
        let judged = Self { verdict: report.verdict(), seen: seen(report), row };
        let title = judged.row.title();
        match &judged.verdict {
            _ if report.points() == 0 => Err(format!("{title} never waits, so it was never dropped\n{report}")),
            Verdict::Unjudged { reason, .. } => Err(format!("{title} is not judged: {reason}\n{report}")),
            verdict if judged.differs() && judged.row.note.is_empty() => Err(format!(
                "{title} is not as documented: {verdict}\nFind out which of the two is wrong, and say it in a note.\n{report}"
            )),
            _ => Ok(judged),
        }
    }

    fn is_safe(&self) -> bool {
        matches!(self.verdict, Verdict::Safe)
    }

    /// Whether the documentation and the exploration contradict each other. A lost place in a queue is not always seen.
    fn differs(&self) -> bool {
        match self.row.says {
            Says::Safe | Says::NotSent => !self.is_safe(),
            Says::NotSafe => self.is_safe(),
            Says::Place | Says::Nothing => false,
        }
    }

    fn cells(&self, versions: &Versions) -> String {
        let Row { from, name, how, page, instead, .. } = self.row;
        let how = if how.is_empty() { String::new() } else { format!(", {how}") };
        let measured = match &self.verdict {
            _ if self.differs() => format!("**{}**, see [below](#findings)", self.measured()),
            _ => self.measured().to_owned(),
        };
        let (at, said_at) = self.row.said_at.unwrap_or((from, page));
        let documented = match self.row.says {
            Says::Safe => format!("[safe]({})", versions.url(at, said_at)),
            Says::NotSafe => format!("[not safe]({})", versions.url(at, said_at)),
            Says::NotSent => format!("[not sent]({})", versions.url(at, said_at)),
            Says::Place => format!("[not safe: the place]({})", versions.url(at, said_at)),
            Says::Nothing => "not said".to_owned(),
        };
        let link = versions.url(from, page);
        format!("| [`{name}`]({link}){how} | {documented} | {measured} | {} | {instead} |\n", self.seen)
    }

    fn measured(&self) -> &'static str {
        match self.verdict {
            Verdict::Safe => "safe",
            Verdict::Starves { .. } => "starves",
            _ => "not safe",
        }
    }
}

/// At which point it was dropped and what was seen, as text for the table.
fn seen(report: &Report) -> String {
    match report.verdict() {
        Verdict::NotSafe { point, undisturbed, seen, .. } => {
            let failure = report.failures().iter().find(|failure| failure.message().starts_with("called again"));
            let each = failure.is_some_and(|failure| failure.to_string().starts_with("each call"));
            let starved = failure.is_some_and(|failure| failure.budget().is_some());
            let when = match (point, each) {
                (0, _) => "before its first poll".to_owned(),
                (_, false) => format!("once, pending {point}"),
                (_, true) => format!("each call, pending {point}"),
            };
            let starved = if starved { ", starved" } else { "" };
            let (seen, undisturbed) = (evidence(&seen), evidence(&undisturbed));
            if undisturbed.is_empty() || seen.starts_with("nothing") {
                return format!("{when}{starved}: it never ends");
            }
            format!("{when}{starved}: {seen} for {undisturbed}")
        }
        Verdict::Starves { point, .. } => format!("each call, pending {point}: it starts over"),
        _ => String::new(),
    }
}

/// The results without the part that is the same in every run.
fn evidence(text: &str) -> String {
    let results = text.split_once(", then ").filter(|(results, _)| !results.contains(|c: char| c.is_alphanumeric()));
    let text = results.map_or(text, |(_, observed)| observed);
    if text == "()" || text.starts_with("nothing") {
        return text.trim_matches(['(', ')']).to_owned();
    }
    format!("`{}`", text.replace('|', "\\|"))
}

/// The whole page.
pub(crate) fn page(versions: &Versions, groups: &[(&'static str, Vec<Judged>)]) -> String {
    let all: Vec<&Judged> = groups.iter().flat_map(|(_, rows)| rows).collect();
    let count = |measured: &str| all.iter().filter(|it| it.measured() == measured).count();
    let differing: Vec<&&Judged> = all.iter().filter(|it| it.differs()).collect();
    let silent: Vec<&&Judged> = all.iter().filter(|it| it.row.says == Says::Nothing).collect();
    let mut page = HEAD.replace("{versions}", &versions.tell());
    let summary = format!(
        "{} calls were explored: {} are safe, {} are not, and {} starve. About {} the documentation says nothing, and \
         {} of these are not safe or starve. About {} it says something other than what was seen.",
        all.len(),
        count("safe"),
        count("not safe"),
        count("starves"),
        silent.len(),
        silent.iter().filter(|it| !it.is_safe()).count(),
        differing.len(),
    );
    page = page.replace("{summary}", &summary);
    for (title, rows) in groups {
        // Writing to a String cannot fail.
        let _ = write!(page, "\n## {title}\n\n{TABLE}");
        page.extend(rows.iter().map(|row| row.cells(versions)));
        let notes: Vec<&Judged> = rows.iter().filter(|it| !it.row.note.is_empty() && !it.differs()).collect();
        if !notes.is_empty() {
            page.push('\n');
        }
        page.extend(notes.iter().map(|it| format!("- {}: {}\n", it.row.title(), it.row.note)));
    }
    let _ = write!(page, "\n## Findings\n\n{FINDINGS}\n");
    page.extend(differing.iter().map(|it| format!("- {}: {}\n", it.row.title(), it.row.note)));
    page
}

const TABLE: &str =
    "| operation | documented | measured | dropped at, and what was seen | instead |\n|---|---|---|---|---|\n";

const HEAD: &str = "\
<!-- Generated by `cargo xtask operations` from docs/operations. Do not edit: the next run would overwrite it. -->

# Which operations are cancel safe

What the documentation says about dropped operations, and what happens.

{summary}

Measured with {versions}.

## How to read it

Each operation was dropped at every await, and at every place where a busy runtime would make it wait, and called again
until it completed; then every call was dropped at its first pending, at its second, and at its third, as a `select!` in a
loop may do. The results were compared with undisturbed calls
([`Explore::cancel_safe`](https://docs.rs/cancel-safe-testing)).

- *safe*: the results were the same, and so was everything that a peer had received.
- *not safe*: something was lost, or done twice. The next column says when the call was dropped (*once*, or *each
  call*, after it had returned `Pending` that often; *starved* if only a busy runtime makes it wait there), and what
  was seen `for` the result of undisturbed calls.
- *starves*: nothing is lost, but nothing is kept either. Dropped again and again, it never ends.
- *not safe: the place*: only the place in a queue is lost.
- *not sent*: a message of a dropped call has not been sent.
- *not said*: its page gives no verdict.

The verdict depends on how an operation is called: a buffer that outlives the call keeps what was read, a local one does
not. Where that matters, the row says so. *Safe* means that calling again is enough. It does not mean that a call that
is dropped for good has had no effect.
";

const FINDINGS: &str = "\
Here documentation and measurement differ. Each difference was checked twice: whether the exploration is right, and
whether it keeps in its state what the documentation tells the caller to keep.
";
