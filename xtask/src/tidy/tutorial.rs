//! The page that says where each thing of the tutorial is.
//!
//! Invariant: the item that a row names is in the file that it names.

use super::{Finding, read};
use crate::workspace;

/// Where the page is, from the root.
const PAGE: &str = "docs/src/tutorial.md";

/// Checks every row.
pub(super) fn check() -> Result<Vec<Finding>, String> {
    let page = read(&workspace::root().join(PAGE))?;
    let stands = |file: &str, name: &str| {
        read(&workspace::root().join(file)).map(|text| text.contains(name)).map_err(|_| "there is no such file")
    };
    Ok(untrue(&page, stands).map(|(line, fix)| Finding { path: PAGE.into(), line, rule: "tutorial", fix }).collect())
}

/// The rows that name a missing item.
fn untrue<'a>(
    page: &'a str,
    stands: impl Fn(&str, &str) -> Result<bool, &'static str> + 'a,
) -> impl Iterator<Item = (usize, String)> + 'a {
    page.lines().enumerate().filter_map(move |(index, line)| {
        let mut cells = line.strip_prefix("| ")?.split(" | ").skip(1);
        let (here, place) = (quoted(cells.next()?)?, quoted(cells.next()?)?);
        let fix = match stands(place, here) {
            Ok(true) => return None,
            Ok(false) => format!("`{here}` does not stand in {place}: say where it is now"),
            Err(why) => format!("{place}: {why}"),
        };
        Some((index + 1, fix))
    })
}

/// The text between the first two backticks.
fn quoted(cell: &str) -> Option<&str> {
    cell.split('`').nth(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_names_what_is_not_there_is_found() {
        let page = "| there | here | where |\n|---|---|---|\n| `a` | `b` | `c.rs`, kept |\n| `a` | `x` | `c.rs` |\n| a | `b` | `d.rs` |\n";
        let stands = |file: &str, name: &str| match file {
            "c.rs" => Ok(name == "b"),
            _ => Err("there is no such file"),
        };
        assert_eq!(untrue(page, stands).map(|(line, _)| line).collect::<Vec<_>>(), [4, 5]);
    }
}
