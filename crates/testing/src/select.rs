//! Searches the source for the likely cause of a varying report.
//!
//! Invariant: it only adds a hint; an unreadable source is no error.

use std::fs;

use crate::site::{Await, Site};

/// How many lines at the head of a macro may contain `biased`.
const HEAD: usize = 3;

/// How far above an await the macro around it may begin.
const REACH: usize = 40;

/// The `select!` at or around the await, if it is not `biased`: it polls its branches in a random order.
pub(crate) fn at_random(place: &Await) -> Option<Site> {
    let sites = std::iter::once(place.site()).chain(place.callers());
    sites.zip(place.frames()).find_map(|(site, frame)| {
        let source = fs::read_to_string(&frame.path).ok()?;
        let lines: Vec<&str> = source.lines().collect();
        let line = around(&lines, usize::try_from(site.line()).ok()?.checked_sub(1)?)?;
        Some(Site::new(site.file().to_owned(), u32::try_from(line + 1).ok()?))
    })
}

/// The line of the random `select!` in whose braces the line `at` stands.
fn around(lines: &[&str], at: usize) -> Option<usize> {
    let mut open = 0_i32;
    for line in (at.saturating_sub(REACH)..=at).rev() {
        let text = lines.get(line)?;
        if line < at {
            open += braces(text);
        }
        if text.contains("select!") && (line == at || open > 0) {
            let head = lines.iter().skip(line).take(HEAD);
            return (!head.clone().any(|text| text.contains("biased"))).then_some(line);
        }
    }
    None
}

/// How many more braces a line opens than it closes. Braces in strings count too, because this is only a hint.
fn braces(text: &str) -> i32 {
    text.chars().map(|character| i32::from(character == '{') - i32::from(character == '}')).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_select_around_an_await_is_found_unless_it_is_biased() {
        let lines = ["select! {", "    () = one() => {", "        two().await", "    }", "}", "three().await"];
        assert_eq!(around(&lines, 0), Some(0));
        assert_eq!(around(&lines, 2), Some(0));
        assert_eq!(around(&lines, 5), None);
        let biased = ["select! {", "    biased;", "    () = one() => two().await,", "}"];
        assert_eq!(around(&biased, 2), None);
        assert_eq!(around(&biased, 9), None);
    }
}
