//! `cargo cancel-safe test`.
//!
//! Invariant: the projects write the record themselves, so that each printed figure is known beforehand.

use std::fs;

use crate::{Project, Ran, without_root};

const LIBRARY: &str = "\
pub struct Bank;
impl Bank {
    pub async fn transfer(&self) {
        audit().await;
        audit().await; audit().await;
    }
    pub async fn close(&self) {
        audit()
            .await
    }
}
async fn audit() {}
pub fn by_hand() -> u8 {
    7
}
#[cfg(test)]
mod tests {
    async fn f() { super::audit().await }
}
";

/// A test that appends the content of `record.txt`, as an exploration would; and fails if there is a file `fail`.
const TEST: &str = r#"
use std::io::Write;

#[test]
fn explores() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    println!("chatter");
    let file = std::env::var_os("CANCEL_SAFE_COVERAGE").unwrap();
    assert!(std::path::Path::new(&file).is_absolute());
    let record = std::fs::read_to_string(directory.join("record.txt")).unwrap();
    let record = record.replace(' ', "\t").replace("@", env!("CARGO_MANIFEST_DIR"));
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
    file.write_all(record.as_bytes()).unwrap();
    assert!(!directory.join("fail").exists());
}
"#;

fn bank(record: &str) -> Project {
    Project::new(&[("src/lib.rs", LIBRARY), ("src/empty.rs", ""), ("tests/it.rs", TEST), ("record.txt", record)])
}

/// The output after that of the tests.
fn result(ran: &Ran) -> &str {
    let start = ran.out.rfind("file  ").unwrap_or_else(|| panic!("{}\n{}", ran.out, ran.err));
    &ran.out[start..]
}

#[test]
fn the_table_the_lines_never_dropped_and_lcov_have_the_same_figures() {
    let project = bank(
        "await @/src/lib.rs 4 17\nawait @/src/lib.rs 4 17\nawait @/src/lib.rs 5 32\nawait src/lib.rs 8 9\n\
         await @/src/lib.rs 14 5\nawait @/src/lib.rs 5 0\nawait @/src/lib.rs 18 35\nawait @/tests/it.rs 5 1\n\
         await /gone.rs 1 1\nawa\n",
    );
    let ran = project.run("test --offline --test it --lcov cover/lcov.info");
    let ran = ran.expect(101).says("cover/lcov.info: ");
    assert!(ran.err.contains("     Running `cargo test --offline --test it`\n"), "{}", ran.err);
    fs::create_dir(project.root().join("cover")).unwrap();
    let ran = project.run("test --offline --test it --lcov=cover/lcov.info").expect(0);
    let expected = "\
file         awaits  dropped    never     share
src/lib.rs        4        3        1     75.0%
total             4        3        1     75.0%

never dropped:
  src/lib.rs:5:17  Bank::transfer

recorded, and cannot be attributed:
  src/lib.rs:5     several awaits share the line, and the line tables have no columns
  src/lib.rs:14:5  in code that is not async, such as a poll function written by hand
";
    assert_eq!(result(&ran), expected);
    let ran = ran.says("warning: 1 lines of ").says("       Wrote cover/lcov.info\n");
    let lcov = fs::read_to_string(project.root().join("cover/lcov.info")).unwrap();
    let expected = "SF:@/src/lib.rs\nDA:4,2\nDA:5,0\nDA:9,1\nLF:3\nLH:2\nend_of_record\n";
    assert_eq!(without_root(&lcov, &project.root()), expected);
    // The torn lines can be inspected.
    let kept = ran.err.lines().find_map(|line| line.strip_prefix("warning: 1 lines of ")?.split_once(".txt "));
    assert!(fs::read_to_string(format!("{}.txt", kept.unwrap().0)).unwrap().ends_with("\nawa\n"));
}

#[test]
fn json_is_all_that_is_on_standard_output() {
    let project = bank("await @/src/lib.rs 4 17\nawait @/src/lib.rs 14 5\n");
    let ran =
        project.run("test --offline --json -- --nocapture").expect(0).says("chatter").says("test explores ... ok");
    let json = ran.json();
    assert_eq!((json["awaits"].as_u64(), json["dropped"].as_u64()), (Some(4), Some(1)));
    assert_eq!((json["percent"].as_f64(), json["malformed_lines"].as_u64()), (Some(25.0), Some(0)));
    let package = &json["packages"][0];
    assert_eq!((package["name"].as_str(), package["dropped"].as_u64()), (Some("bank"), Some(1)));
    let first = serde_json::json!({
        "line": 4, "column": 17, "kind": "await", "function": "Bank::transfer", "public": true, "drops": 1,
    });
    assert_eq!(package["files"][0]["awaits"][0], first);
    let path = project.root().join("src/lib.rs");
    let unattributed =
        serde_json::json!([{ "path": path, "line": 14, "column": 5, "drops": 1, "reason": "not-async" }]);
    assert_eq!(json["unattributed"], unattributed);
    // The record of a run that went well is not left behind.
    assert_eq!(fs::read_dir(project.root().join("target/cancel-safe")).unwrap().count(), 0);
}

#[test]
fn too_few_dropped_awaits_failed_tests_and_broken_code_are_failures() {
    let project = bank("await @/src/lib.rs 4 17\n");
    project.run("test --offline --fail-under 25").expect(0);
    let ran = project.run("test --offline --fail-under 25.5").expect(1);
    let ran = ran.says("error: 1 of 4 awaits were dropped (25.0%), and --fail-under asks for 25.5%\n");
    assert!(result(&ran).contains("total"));
    project.run("test --fail-under 101").expect(2).says("it is a number from 0 to 100");
    project.write("fail", "");
    let ran = project.run("test --offline --fail-under 25.5").expect(101);
    assert!(ran.err.ends_with("error: the tests failed: the awaits are those dropped until then\n"), "{}", ran.err);
    assert!(result(&ran).contains("src/lib.rs:9     Bank::close"), "{}", ran.out);
    project.run("test --offline -- --no-such-option").expect(101);
    project.run("test --no-such-option").expect(1).says("unexpected argument '--no-such-option'");
    project.write("src/lib.rs", "pub fn f() -> u8 { \"\" }");
    project.run("test --offline").expect(101).says("mismatched types");
}

#[test]
fn a_run_that_recorded_nothing_says_what_to_do() {
    let project = bank("");
    let ran = project.run("test --offline").expect(0).says("warning: no test used cancel_safe_testing::Explore");
    assert!(result(&ran).contains("total             4        0        4      0.0%"), "{}", ran.out);
    project.write("record.txt", "await @/tests/it.rs 1 1\n");
    project.run("test --offline").expect(0).says("warning: awaits were dropped, but none in the packages");
    project.write("src/lib.rs", "pub fn nothing() {}\n");
    let ran = project.run("test --offline --fail-under 100").expect(0);
    assert!(!ran.err.contains("warning"), "{}", ran.err);
}
