//! The comparison of the books with the table.
//!
//! Invariant: exactly one committed transaction explains each row of the table, and each committed transaction has all
//! its rows there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use cancel_safe_tx_guard::CommitOutcome;
use tokio::time::timeout;

use super::program::{ACCOUNTS, Attempt, Book, KEYS, Page, Said, Stage, Standing};
use crate::world::PATIENCE;

/// How many of the violations are described.
const DESCRIBED: usize = 20;

/// The expected balances of the accounts.
pub(crate) type Sums = BTreeMap<i64, i64>;

/// What ran and what was found.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) rounds: usize,
    cuts: [usize; 7],
    committed: usize,
    rolled_back: usize,
    unknown: usize,
    leaked: usize,
    torn: usize,
    phantom: usize,
    wrong: usize,
    described: Vec<String>,
}

/// Fewer rounds need not cut at every stage.
const FEW_ROUNDS: usize = 1_000;

impl Tally {
    pub(crate) fn cut_at(&mut self, stage: Stage) {
        self.cuts[stage as usize] += 1;
    }

    pub(crate) fn violations(&self) -> usize {
        self.leaked + self.torn + self.phantom + self.wrong
    }

    pub(crate) fn leak(&mut self, what: &str) {
        self.leaked += 1;
        self.describe(what.to_owned());
    }

    fn describe(&mut self, what: String) {
        if self.described.len() < DESCRIBED {
            self.described.push(what);
        }
    }

    #[expect(clippy::print_stdout, reason = "the table is what the campaign is for")]
    pub(crate) fn print(&self, title: &str) {
        let cuts: usize = self.cuts.iter().sum();
        let [begin, statement, savepoint, nested, commit, rollback, idle] = self.cuts;
        println!(
            "| {title} | rounds {} | cuts {cuts}: begin {begin}, statement {statement}, savepoint {savepoint}, nested {nested}, \
             commit {commit}, rollback {rollback}, between {idle} | committed {}, rolled back {}, unknown {} | \
             leaked {}, torn {}, phantom {}, wrongly told {} |",
            self.rounds,
            self.committed,
            self.rolled_back,
            self.unknown,
            self.leaked,
            self.torn,
            self.phantom,
            self.wrong,
        );
    }

    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.violations(), 0, "{:#?}", self.described);
        assert!(self.committed > self.rounds / 10 && self.rolled_back > self.rounds / 10, "too one-sided: {self:?}");
        // On a busy machine everything takes long, so a short run may miss the shortest stages.
        let asked = if self.rounds < FEW_ROUNDS { 2 } else { 6 };
        assert!(self.cuts.iter().take(asked).all(|&cuts| cuts > 0), "a stage was never cut: {:?}", self.cuts);
    }
}

/// Waits until every transaction has ended, and its hooks have run.
pub(crate) async fn settle(books: &[(i64, Book)], tally: &mut Tally) {
    for (id, book) in books {
        let handles: Vec<_> =
            book.page().attempts.iter().map(|attempt| (attempt.handle.clone(), attempt.hooks.clone())).collect();
        for (handle, hooks) in handles {
            let Some(handle) = handle else { continue };
            let ended = timeout(PATIENCE, async {
                // The hooks run after the handle has its outcome; nothing more is promised.
                while handle.outcome().await == CommitOutcome::Committed && hooks.load(Ordering::Relaxed) == 0 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            if ended.await.is_err() {
                tally.leak(&format!("program {id} does not end, or its hook does not run"));
            }
        }
    }
}

pub(crate) fn compare(
    books: &[(i64, Book)],
    rows: Vec<i64>,
    written: &[i64],
    sums: &mut Sums,
    found: &[i64],
    tally: &mut Tally,
) {
    let mut by_program: HashMap<i64, HashSet<i64>> = HashMap::new();
    for n in rows {
        by_program.entry(n / KEYS).or_default().insert(n);
    }
    for n in written {
        if !by_program.entry(n / KEYS).or_default().remove(n) {
            tally.wrong += 1;
            tally.describe(format!("row {n} was written over the pool, and is not there"));
        }
    }
    for (id, book) in books {
        let rows = by_program.remove(id).unwrap_or_default();
        let page = book.page();
        if let Err((kind, what)) = judge(&page, rows, sums, tally) {
            match kind {
                Kind::Torn => tally.torn += 1,
                Kind::Phantom => tally.phantom += 1,
                Kind::Wrong => tally.wrong += 1,
            }
            tally.describe(format!("program {id}: {what}: {page:?}"));
        }
    }
    for (program, rows) in by_program.into_iter().filter(|(_, rows)| !rows.is_empty()) {
        tally.phantom += 1;
        tally.describe(format!("nobody has written {rows:?} of program {program}"));
    }
    let expected: Vec<i64> = (1..=ACCOUNTS).map(|account| sums.get(&account).copied().unwrap_or(0)).collect();
    if expected != found {
        tally.torn += 1;
        tally.describe(format!("the accounts hold {found:?} where the ledger says {expected:?}"));
        // Reported once, not again for each batch that follows.
        *sums = (1..).zip(found.iter().copied()).collect();
    }
}

enum Kind {
    /// A part of a transaction is there.
    Torn,
    /// A row is there that was not committed.
    Phantom,
    /// A report does not match the table.
    Wrong,
}

fn judge(page: &Page, mut rows: HashSet<i64>, sums: &mut Sums, tally: &mut Tally) -> Result<(), (Kind, String)> {
    for attempt in &page.attempts {
        let outcome = outcome(attempt)?;
        match outcome {
            CommitOutcome::Committed => {
                tally.committed += 1;
                committed(attempt, &mut rows, sums)?;
            }
            CommitOutcome::RolledBack => tally.rolled_back += 1,
            _ if attempt.may_be_unknown => tally.unknown += 1,
            _ => {
                tally.unknown += 1;
                return Err((Kind::Wrong, "unknown, on a connection that lives".to_owned()));
            }
        }
        let hooks = attempt.hooks.load(Ordering::Relaxed);
        if hooks != u32::from(outcome == CommitOutcome::Committed) {
            return Err((Kind::Wrong, format!("{outcome:?}, and its hook ran {hooks} times")));
        }
    }
    if rows.is_empty() { Ok(()) } else { Err((Kind::Phantom, format!("rolled back, and {rows:?} are there"))) }
}

/// The promised outcome: the handle's, which must not contradict the caller's result.
fn outcome(attempt: &Attempt) -> Result<CommitOutcome, (Kind, String)> {
    let Some(handle) = &attempt.handle else {
        let committed = attempt.said == Said::Committed;
        return Ok(if committed { CommitOutcome::Committed } else { CommitOutcome::RolledBack });
    };
    let outcome = handle.try_outcome().ok_or((Kind::Wrong, "it has not ended".to_owned()))?;
    let agrees = match attempt.said {
        Said::Nothing => true,
        Said::Committed => outcome == CommitOutcome::Committed,
        Said::NotCommitted => outcome == CommitOutcome::RolledBack || attempt.may_be_unknown,
        Said::Unknown => outcome == CommitOutcome::Unknown,
    };
    if agrees { Ok(outcome) } else { Err((Kind::Wrong, format!("the handle says {outcome:?}"))) }
}

fn committed(attempt: &Attempt, rows: &mut HashSet<i64>, sums: &mut Sums) -> Result<(), (Kind, String)> {
    if let Some(why) = attempt.doomed {
        return Err((Kind::Wrong, format!("committed although {why}")));
    }
    let mut groups: HashMap<usize, bool> = HashMap::new();
    for entry in &attempt.entries {
        let there = entry.keys.clone().filter(|n| rows.remove(n)).count();
        let all = entry.keys.clone().count();
        if there != 0 && there != all {
            return Err((Kind::Torn, format!("{there} of the {all} rows of a statement")));
        }
        let there = there != 0;
        match entry.standing {
            Standing::Done if !there => return Err((Kind::Wrong, format!("{:?} are missing", entry.keys))),
            Standing::Undone if there => return Err((Kind::Phantom, format!("{:?} were undone", entry.keys))),
            Standing::May(group) if *groups.entry(group).or_insert(there) != there => {
                return Err((Kind::Torn, format!("a part of the savepoint of {:?}", entry.keys)));
            }
            _ => {}
        }
        if let (true, Some((from, to, amount))) = (there, entry.transfer) {
            *sums.entry(from).or_default() -= amount;
            *sums.entry(to).or_default() += amount;
        }
    }
    Ok(())
}
