//! What several benches share: contests, in which the contestants take turns, and tables of faults.
//!
//! Invariant: on a disk that others use too, two figures can be compared only if they were taken at the same time. So
//! each round runs every contestant once, with a different one first each time, and the printed figures are medians
//! over the rounds.

#![expect(clippy::print_stdout, reason = "a bench speaks through its output")]

use std::fmt;
use std::time::{Duration, Instant};

/// Things that do the same job, to be compared with the first of them.
#[derive(Default)]
pub struct Contest<'a> {
    title: String,
    rounds: usize,
    before_each: Option<Box<dyn FnMut() + 'a>>,
    contestants: Vec<Contestant<'a>>,
}

struct Contestant<'a> {
    name: &'static str,
    run: Box<dyn FnMut() -> Duration + 'a>,
    times: Vec<Duration>,
}

impl<'a> Contest<'a> {
    /// A contest over `rounds` rounds; one more before them warms up and does not count.
    pub fn new(title: impl Into<String>, rounds: usize) -> Self {
        Self { title: title.into(), rounds, ..Self::default() }
    }

    /// Sets what runs before each turn and does not count: the next contestant must not pay for work that the previous
    /// one has deferred.
    #[must_use]
    pub fn before_each(mut self, prepare: impl FnMut() + 'a) -> Self {
        self.before_each = Some(Box::new(prepare));
        self
    }

    /// Adds a contestant whose whole run counts.
    #[must_use]
    pub fn add(self, name: &'static str, mut run: impl FnMut() + 'a) -> Self {
        self.add_timed(name, move || {
            let start = Instant::now();
            run();
            start.elapsed()
        })
    }

    /// Adds a contestant that reports its own time.
    #[must_use]
    pub fn add_timed(mut self, name: &'static str, run: impl FnMut() -> Duration + 'a) -> Self {
        self.contestants.push(Contestant { name, run: Box::new(run), times: Vec::new() });
        self
    }

    /// Runs all rounds and prints the figures; without contestants it does nothing.
    pub fn run(mut self) {
        for round in 0..=self.rounds {
            let count = self.contestants.len();
            for turn in 0..count {
                if let Some(prepare) = &mut self.before_each {
                    prepare();
                }
                let contestant = &mut self.contestants[(turn + round) % count];
                let time = (contestant.run)();
                if round > 0 {
                    contestant.times.push(time);
                }
            }
        }
        println!("\n{}, {} rounds:", self.title, self.rounds);
        println!("  {:<40}{:>12}{:>12}{:>9}", "", "median µs", "least µs", "ratio");
        let mut first = None;
        for Contestant { name, times, .. } in &mut self.contestants {
            times.sort_unstable();
            let Some(least) = times.first() else { continue };
            let median = times[times.len() / 2];
            let ratio = median.as_secs_f64() / *first.get_or_insert(median.as_secs_f64());
            println!("  {name:<40}{:>12.1}{:>12.1}{ratio:>9.2}", micros(median), micros(*least));
        }
    }
}

impl fmt::Debug for Contest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.contestants.iter().map(|contestant| contestant.name).collect();
        f.debug_struct("Contest").field("title", &self.title).field("contestants", &names).finish_non_exhaustive()
    }
}

/// A readable table, which is also valid Markdown: an event in each row, and a column for each contestant.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with this header.
    pub fn new(head: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let head: Vec<String> = head.into_iter().map(Into::into).collect();
        let rule = head.iter().map(|_| "---".to_owned()).collect();
        Self { rows: vec![head, rule] }
    }

    /// Adds a row.
    pub fn row(&mut self, what: &str, cells: impl IntoIterator<Item = String>) {
        self.rows.push(std::iter::once(what.to_owned()).chain(cells).collect());
    }

    /// Prints it.
    pub fn print(&self) {
        println!();
        for row in &self.rows {
            println!("| {} |", row.join(" | "));
        }
        println!();
    }
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The value below which the share `part` (0 to 1) of `times` lies.
pub fn percentile(times: &mut [Duration], part: f64) -> Option<Duration> {
    times.sort_unstable();
    let last = times.len().checked_sub(1)?;
    times.get((last as f64 * part).round() as usize).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_one_of_the_times() {
        let mut times: Vec<_> = (1..=101).rev().map(Duration::from_millis).collect();
        assert_eq!(percentile(&mut times, 0.5), Some(Duration::from_millis(51)));
        assert_eq!(percentile(&mut times, 0.99), Some(Duration::from_millis(100)));
        assert_eq!(percentile(&mut [], 0.5), None);
    }
}
