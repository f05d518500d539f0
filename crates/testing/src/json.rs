//! Writes a report as JSON.
//!
//! Invariant: what it writes is one valid JSON value, whatever the strings in it.
//!
//! By hand, because serde_json in the dependencies of a test would make `assert_eq!(numbers, [])` ambiguous in the
//! tests around it: it adds comparisons between numbers and its own values.

use std::fmt::Write as _;

use crate::failure::Failure;
use crate::report::Report;
use crate::search::Question;
use crate::site::Site;

/// The report as one object.
pub(crate) fn report(report: &Report) -> String {
    let awaits = report.sites.iter().zip(&report.visited).map(|(site, points)| {
        let failures = report.failures.iter().filter(|failure| failure.site() == Some(site)).count();
        let place = [("file", string(site.file())), ("line", site.line().to_string())];
        object(place.into_iter().chain([("points", points.to_string()), ("failures", failures.to_string())]))
    });
    let mut fields = vec![
        ("clean", report.is_clean().to_string()),
        ("points", report.points.to_string()),
        ("task_points", report.task_points.to_string()),
        ("runs", report.runs.to_string()),
        ("unsettled", report.unsettled.to_string()),
        ("varied", report.varied.to_string()),
        ("notes", array(report.notes.iter().map(|note| string(note)))),
        ("awaits", array(awaits)),
        ("failures", array(report.failures.iter().map(failure))),
    ];
    if report.question == Question::CancelSafe {
        fields.push(("verdict", string(report.verdict().name())));
    }
    object(fields)
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
