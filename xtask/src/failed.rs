//! The output of the failed tests, kept for the end of the run: it may be thousands of lines above.
//!
//! Invariant: a test is in the list if its runner named it as failed, whether or not it said anything.

use std::fmt;

/// How many lines of a failed test are shown again, from its first panic on. The full output is above.
const LINES: usize = 12;

/// How many failed tests are shown again.
const TESTS: usize = 8;

/// The failed tests of a run, in the order in which the runners reported them.
#[derive(Default)]
pub(crate) struct Failed {
    part: Part,
    tests: Vec<Test>,
    /// How many of them other runners have reported.
    of_others: usize,
}

/// The part of a runner's output.
#[derive(Default, PartialEq)]
enum Part {
    #[default]
    Running,
    /// The output of the failed tests, if there is any.
    Details,
    /// The names of all failed tests.
    Names,
}

#[derive(Default)]
struct Test {
    name: String,
    /// Its output from its first panic on, or from the beginning.
    said: Vec<String>,
    panicked: bool,
    /// Whether the rest is only the backtrace, which is useless without the source.
    is_enough: bool,
}

impl Failed {
    /// Reads one line of a runner's output.
    pub(crate) fn read(&mut self, line: &str) {
        let line = line.trim_end();
        if line == "failures:" {
            self.part = if self.part == Part::Running { Part::Details } else { Part::Names };
        } else if line.starts_with("test result: ") {
            self.part = Part::Running;
            self.of_others = self.tests.len();
        } else if self.part == Part::Details {
            let name = line.strip_prefix("---- ").and_then(|line| line.strip_suffix(" stdout ----"));
            match (name, self.tests.last_mut()) {
                (Some(name), _) => self.tests.push(Test::named(name)),
                (None, Some(test)) => test.hear(line),
                (None, None) => {}
            }
        } else if self.part == Part::Names && !line.is_empty() {
            let name = line.trim_start();
            if self.tests[self.of_others..].iter().all(|test| test.name != name) {
                self.tests.push(Test::named(name));
            }
        }
    }
}

impl Test {
    fn named(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    fn hear(&mut self, line: &str) {
        if !self.panicked && line.contains(" panicked at ") {
            self.panicked = true;
            self.said.clear();
        }
        self.is_enough |=
            self.panicked && (line == "stack backtrace:" || line.starts_with("note: run with `RUST_BACKTRACE"));
        if !self.is_enough && self.said.len() < LINES && !line.is_empty() {
            self.said.push(line.to_owned());
        }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for test in self.tests.iter().take(TESTS) {
            writeln!(f, "\nfailed: {}", test.name)?;
            test.said.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        }
        match self.tests.len().saturating_sub(TESTS) {
            0 => Ok(()),
            more => writeln!(f, "\n{more} more failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_test_is_shown_from_its_panic_on_and_a_silent_one_by_name() {
        let mut failed = Failed::default();
        let output = "running 3 tests\n\
            test quiet ... FAILED\n\
            test a::loud ... FAILED\n\n\
            failures:\n\n\
            ---- a::loud stdout ----\n\
            chatter\n\n\
            thread 'a::loud' (7) panicked at src/a.rs:1:2:\n\
            assertion failed: two words\n\
            \x20   indented\n\
            note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n\n\n\
            failures:\n    a::loud\n    quiet\n\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s\n\
            a line of another binary\n";
        output.lines().for_each(|line| failed.read(line));
        // A test of the same name in another binary.
        ["failures:", "", "failures:", "    quiet", "", "test result: FAILED."]
            .iter()
            .for_each(|line| failed.read(line));
        let shown = "\nfailed: a::loud\n  thread 'a::loud' (7) panicked at src/a.rs:1:2:\n  assertion failed: two words\n      indented\n\
                     \nfailed: quiet\n\nfailed: quiet\n";
        assert_eq!(failed.to_string(), shown);
    }

    #[test]
    fn nothing_is_said_of_a_run_that_passed() {
        let mut failed = Failed::default();
        ["running 1 test", "---- no stdout ----", "test a ... ok"].iter().for_each(|line| failed.read(line));
        assert_eq!(failed.to_string(), "");
    }

    #[test]
    fn many_failures_and_long_ones_are_cut() {
        let mut failed = Failed::default();
        failed.read("failures:");
        for number in 0..20 {
            failed.read(&format!("---- t{number} stdout ----"));
            (0..100).for_each(|_| failed.read("said"));
        }
        let shown = failed.to_string();
        assert_eq!(shown.matches("said").count(), TESTS * LINES);
        assert!(shown.ends_with("\n12 more failed\n"), "{shown}");
    }
}
