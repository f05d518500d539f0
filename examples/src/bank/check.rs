//! The final check of chaos: what must be true at the end, whatever was cut. Invariant: it compares what clients were
//! told with what is in the books, and never asks the server.

use std::collections::BTreeMap;
use std::fmt;

use super::{ACCOUNTS, Order, Outcome, Row, START};

/// What the clients were told about one key.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) order: Order,
    pub(super) outcome: Outcome,
    /// A different outcome that was told for the same key.
    contradiction: Option<Outcome>,
}

impl Heard {
    pub(super) fn new(order: Order, outcome: Outcome) -> Self {
        Self { order, outcome, contradiction: None }
    }

    /// Adds the answer to one more request with the same key.
    pub(super) fn hear(&mut self, outcome: Outcome) {
        use Outcome::{Completed, NotCommitted, Refused, Unknown};
        match (self.outcome, outcome) {
            // A request that committed nothing says nothing about the others.
            (_, NotCommitted) | (Completed | Refused, Unknown) => {}
            (NotCommitted | Unknown, _) => self.outcome = outcome,
            (before, now) if before != now => self.contradiction = Some(now),
            _ => {}
        }
    }

    /// Adds the answer to the final question about the key, after the last request.
    pub(super) fn settle(&mut self, outcome: Outcome) {
        if self.outcome == Outcome::Unknown {
            self.outcome = outcome;
        }
    }
}

pub(super) type History = BTreeMap<String, Heard>;

/// Every fault, one sentence each.
pub(super) fn judge(history: &History, rows: &[Row], balances: &[(i64, i64)]) -> Vec<String> {
    let mut findings = Vec::new();
    let sum: i64 = balances.iter().map(|(_, balance)| balance).sum();
    if sum != ACCOUNTS * START {
        findings.push(format!("the accounts hold {sum} instead of {}", ACCOUNTS * START));
    }
    for (id, balance) in balances {
        let moved = rows.iter().filter(|row| row.outcome == Outcome::Completed);
        let expected: i64 =
            START + moved.map(|row| row.amount * (i64::from(row.to == *id) - i64::from(row.from == *id))).sum::<i64>();
        if *balance != expected {
            findings.push(format!("account {id} holds {balance}, and by its transfers {expected}"));
        }
    }
    let mut books = BTreeMap::new();
    for row in rows {
        if books.insert(&row.key, row).is_some() {
            findings.push(format!("{} stands twice in the books", row.key));
        }
    }
    for (key, heard) in history {
        if let Some(other) = heard.contradiction {
            findings.push(format!("{key} has two outcomes: {:?}, and {other:?}", heard.outcome));
        }
        let row = books.get(key);
        if row.is_some_and(|row| !row.is_of(&heard.order)) {
            findings.push(format!("{key} stands otherwise in the books than it was ordered"));
        }
        let standing = row.map_or(Outcome::NotCommitted, |row| row.outcome);
        if heard.outcome == Outcome::Unknown {
            findings.push(format!("{key} is left unknown"));
        } else if heard.outcome != standing {
            findings.push(format!("{key} was told as {:?} and stands as {standing:?}", heard.outcome));
        }
    }
    findings
}

/// What chaos has done, and what it has found.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct Report {
    /// Repeats the random choices.
    pub seed: u64,
    /// How many requests were sent.
    pub sent: usize,
    /// Keys whose clients knew at the end that the transfer was completed.
    pub completed: usize,
    /// Keys whose clients knew that the transfer was refused.
    pub refused: usize,
    /// Keys whose clients knew that nothing was committed.
    pub not_committed: usize,
    /// Keys whose outcome no client knew before the server was asked.
    pub asked: usize,
    /// Of those, how many were committed.
    pub asked_committed: usize,
    /// How often the server was killed.
    pub kills: usize,
    /// How often it was told to stop.
    pub stops: usize,
    /// The sum of all accounts.
    pub sum: i64,
    /// What is wrong.
    pub findings: Vec<String>,
}

impl Report {
    /// Whether the money is conserved, each key has one outcome, and none is left unknown.
    pub fn is_right(&self) -> bool {
        self.findings.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, sent, completed, refused, not_committed, .. } = self;
        writeln!(f, "--seed {seed}")?;
        writeln!(f, "{sent} requests; the server was killed {} times, and stopped {} times", self.kills, self.stops)?;
        writeln!(f, "keys: {completed} completed, {refused} refused, {not_committed} not committed")?;
        let Self { asked, asked_committed, .. } = self;
        writeln!(f, "of these, {asked} got no answer, and were asked for in the end: {asked_committed} committed")?;
        for finding in self.findings.iter().take(20) {
            writeln!(f, "WRONG: {finding}")?;
        }
        if self.is_right() {
            write!(f, "the sum is {}, each key has one outcome, none is unknown", self.sum)
        } else {
            write!(f, "{} findings", self.findings.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(key: &str) -> Order {
        Order { key: key.to_owned(), from: 1, to: 2, amount: 30, limit_ms: None }
    }

    fn row(key: &str, outcome: Outcome) -> Row {
        Row { key: key.to_owned(), from: 1, to: 2, amount: 30, outcome }
    }

    fn balances(moved: i64) -> Vec<(i64, i64)> {
        let change = |id| if id == 1 { -moved } else { if id == 2 { moved } else { 0 } };
        (1..=ACCOUNTS).map(|id| (id, START + change(id))).collect()
    }

    fn told(words: &[Outcome]) -> History {
        let mut heard = Heard::new(order("a"), words[0]);
        words[1..].iter().for_each(|word| heard.hear(*word));
        History::from([("a".to_owned(), heard)])
    }

    use Outcome::{Completed, NotCommitted, Refused, Unknown};

    #[test]
    fn books_that_agree_with_what_was_told_are_right() {
        for words in [&[Completed][..], &[Unknown, Completed], &[NotCommitted, Completed, NotCommitted, Unknown]] {
            assert_eq!(judge(&told(words), &[row("a", Completed)], &balances(30)), Vec::<String>::new(), "{words:?}");
        }
        assert_eq!(judge(&told(&[NotCommitted]), &[], &balances(0)), Vec::<String>::new());
        assert_eq!(judge(&told(&[Refused]), &[row("a", Refused)], &balances(0)), Vec::<String>::new());
    }

    #[test]
    fn a_request_that_committed_nothing_leaves_an_earlier_one_unknown_until_it_is_asked_for() {
        let mut history = told(&[Unknown, NotCommitted]);
        assert_eq!(judge(&history, &[row("a", Completed)], &balances(30)), ["a is left unknown"]);
        history.get_mut("a").unwrap().settle(Completed);
        assert_eq!(judge(&history, &[row("a", Completed)], &balances(30)), Vec::<String>::new());
    }

    #[test]
    fn each_thing_that_can_be_wrong_is_found() {
        let found = |history: &History, rows: &[Row], balances: &[(i64, i64)], what: &str| {
            let findings = judge(history, rows, balances);
            assert!(findings.iter().any(|finding| finding.contains(what)), "{what}: {findings:?}");
        };
        let mut lost = balances(30);
        lost[1].1 -= 30;
        found(&told(&[Completed]), &[row("a", Completed)], &lost, "the accounts hold 9970");
        // The broken twin: the money has moved, and nothing records it.
        found(&told(&[NotCommitted]), &[], &balances(30), "account 1 holds 970, and by its transfers 1000");
        found(&told(&[Completed]), &[], &balances(0), "told as Completed and stands as NotCommitted");
        found(&told(&[NotCommitted]), &[row("a", Completed)], &balances(30), "told as NotCommitted");
        found(&told(&[Completed, Refused]), &[row("a", Completed)], &balances(30), "two outcomes");
        found(&told(&[Completed]), &[row("a", Completed), row("a", Completed)], &balances(60), "stands twice");
        let other = Row { amount: 31, ..row("a", Completed) };
        found(&told(&[Completed]), &[other], &balances(31), "otherwise in the books");
    }
}
