//! Writes a report as JSON.
//!
//! Invariant: the output is one valid JSON value, whatever the strings in it.
//!
//! Written by hand, because serde_json among a test's dependencies would make `assert_eq!(numbers, [])` ambiguous in
//! that test: it adds comparisons between numbers and its own values.

use std::fmt::Write as _;

use crate::failure::Failure;
use crate::plan::Question;
use crate::report::Report;
use crate::site::Site;

impl Report {
    /// The report as one JSON object, for programs: `points`, `task_points`, `runs`, `unsettled`, `varied`, `notes`,
    /// `awaits` (an array of `file`, `line`, `points`, `failures`), `failures` (an array of `kind`, `message`, `point`,
    /// `step`, `way`, `budget`, `completed`, `site`, `callers`, `rival`, `undisturbed`, `seen`, `again`) and, of
    /// [`Explore::cancel_safe`](crate::Explore::cancel_safe), `verdict`.
    #[must_use]
    pub fn to_json(&self) -> String {
        let awaits = self.sites.iter().zip(&self.visited).map(|(site, points)| {
            let failures = self.failures.iter().filter(|failure| failure.site() == Some(site)).count();
            let place = [("file", string(site.file())), ("line", site.line().to_string())];
            object(place.into_iter().chain([("points", points.to_string()), ("failures", failures.to_string())]))
        });
        let mut fields = vec![
            ("clean", self.is_clean().to_string()),
            ("points", self.points.to_string()),
            ("task_points", self.task_points.to_string()),
            ("runs", self.runs.to_string()),
            ("unsettled", self.unsettled.to_string()),
            ("varied", self.varied.to_string()),
            ("notes", array(self.notes.iter().map(|note| string(note)))),
            ("awaits", array(awaits)),
            ("failures", array(self.failures.iter().map(failure))),
        ];
        if self.question == Question::CancelSafe {
            fields.push(("verdict", string(self.verdict().name())));
        }
        object(fields)
    }
}

fn failure(failure: &Failure) -> String {
    let evidence = failure.refusal.evidence.as_ref();
    object([
        ("kind", string(failure.refusal.kind.name())),
        ("message", string(failure.message())),
        ("point", failure.point().to_string()),
        ("step", failure.step().to_string()),
        ("way", string(&failure.way().to_string())),
        ("budget", or_null(failure.budget().map(|units| units.to_string()))),
        ("completed", failure.is_completed().to_string()),
        ("site", or_null(failure.site().map(site))),
        ("callers", array(failure.callers().iter().map(site))),
        ("rival", or_null(failure.rival_site().map(site))),
        ("undisturbed", or_null(evidence.map(|(undisturbed, _)| string(undisturbed)))),
        ("seen", or_null(evidence.map(|(_, seen)| string(seen)))),
        ("again", string(&failure.plan.to_string())),
    ])
}

fn site(site: &Site) -> String {
    object([("file", string(site.file())), ("line", site.line().to_string())])
}

fn or_null(value: Option<String>) -> String {
    value.unwrap_or_else(|| "null".to_owned())
}

fn array(values: impl Iterator<Item = String>) -> String {
    format!("[{}]", values.collect::<Vec<_>>().join(","))
}

fn object<'a>(fields: impl IntoIterator<Item = (&'a str, String)>) -> String {
    let fields: Vec<String> = fields.into_iter().map(|(name, value)| format!("{}:{value}", string(name))).collect();
    format!("{{{}}}", fields.join(","))
}

fn string(text: &str) -> String {
    let mut written = String::from('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => written.extend(['\\', character]),
            '\n' => written.push_str("\\n"),
            control if control < ' ' => {
                // Writing to a String cannot fail.
                let _ = write!(written, "\\u{:04x}", u32::from(control));
            }
            other => written.push(other),
        }
    }
    written.push('"');
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_escaped() {
        assert_eq!(string("a \"b\" \\ \n\t\u{1} ü"), r#""a \"b\" \\ \n\u0009\u0001 ü""#);
    }
}
