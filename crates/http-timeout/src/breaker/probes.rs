//! The probes of a half-open circuit: the running ones, and the results of the others.
//!
//! Invariant: a probe that ended holds no slot, and a running one holds its slot for its lease at most.

use super::{silence::Silence, window::Nanos};

/// How many probes are admitted, how many of them must succeed, and how long each may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProbeRules {
    pub(crate) most: u32,
    pub(crate) needed: u32,
    pub(crate) lease: Nanos,
    /// The silence of cut probes that opens the circuit again.
    pub(crate) silence: Nanos,
}

/// The effect of a probe's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Undecided,
    Close,
    Open,
}

/// A probe, identified by its own number, because two may begin in the same instant.
#[derive(Clone, Copy, Debug)]
struct Running {
    number: u64,
    /// When its lease began: with the probe, and again when the head of an answer came.
    lease_began: Nanos,
    has_head: bool,
}

#[derive(Debug)]
pub(crate) struct Probes {
    /// The running probes. There are few, so a list will do.
    running: Vec<Running>,
    started: u64,
    successes: u32,
    failures: u32,
    silence: Silence,
}

impl Probes {
    pub(crate) const fn new() -> Self {
        Self { running: Vec::new(), started: 0, successes: 0, failures: 0, silence: Silence::NONE }
    }

    /// Forgets everything: the probes that are still running belong to a generation that has passed.
    pub(crate) fn clear(&mut self) {
        self.running.clear();
        (self.started, self.successes, self.failures, self.silence) = (0, 0, 0, Silence::NONE);
    }

    pub(crate) fn has_room(&self, now: Nanos, rules: &ProbeRules) -> bool {
        self.holding(now, rules) + self.successes + self.failures < rules.most
    }

    /// How many probes hold a slot.
    pub(crate) fn holding(&self, now: Nanos, rules: &ProbeRules) -> u32 {
        self.leases(rules).filter(|end| now < *end).count() as u32
    }

    /// The latest time at which the first held slot will be free.
    pub(crate) fn room_at(&self, now: Nanos, rules: &ProbeRules) -> Nanos {
        self.leases(rules).filter(|end| now < *end).min().unwrap_or(now)
    }

    /// When a probe outlived its lease without a sign of an answer, if one has by `now`: that is a failure. A probe
    /// whose answer has begun only loses its slot, because its caller may be the slow one.
    pub(crate) fn hung_since(&self, now: Nanos, rules: &ProbeRules) -> Option<Nanos> {
        let silent = self.running.iter().filter(|probe| !probe.has_head);
        silent.map(|probe| probe.lease_end(rules)).filter(|end| *end <= now).min()
    }

    fn leases(&self, rules: &ProbeRules) -> impl Iterator<Item = Nanos> {
        self.running.iter().map(|probe| probe.lease_end(rules))
    }

    /// Admits a probe, and returns its number.
    pub(crate) fn start(&mut self, now: Nanos) -> u64 {
        self.started += 1;
        self.running.push(Running { number: self.started, lease_began: now, has_head: false });
        self.started
    }

    /// Notes that the answer to the probe has begun.
    pub(crate) fn head(&mut self, number: u64, now: Nanos) {
        if let Some(probe) = self.running.iter_mut().find(|probe| probe.number == number) {
            (probe.lease_began, probe.has_head) = (now, true);
        }
    }

    /// Notes that the probe has shown the callee to be healthy.
    pub(crate) fn succeed(&mut self, number: u64, rules: &ProbeRules) -> Verdict {
        self.give_back(number);
        self.successes += 1;
        if self.successes >= rules.needed { Verdict::Close } else { Verdict::Undecided }
    }

    /// Notes that the probe has failed. The circuit opens when too few probes are left that could succeed.
    pub(crate) fn fail(&mut self, number: u64, rules: &ProbeRules) -> Verdict {
        self.give_back(number);
        self.failures += 1;
        if self.failures > rules.most - rules.needed { Verdict::Open } else { Verdict::Undecided }
    }

    /// Notes that the probe was cut after waiting this long.
    pub(crate) fn cut(&mut self, number: u64, waited: Nanos, now: Nanos, rules: &ProbeRules) -> Verdict {
        self.give_back(number);
        self.silence.add(now.saturating_sub(waited), waited);
        if self.silence.length(now) >= rules.silence { Verdict::Open } else { Verdict::Undecided }
    }

    /// Notes that the probe has shown nothing, and frees its slot.
    pub(crate) fn give_back(&mut self, number: u64) -> Verdict {
        self.running.retain(|probe| probe.number != number);
        Verdict::Undecided
    }
}

impl Running {
    fn lease_end(&self, rules: &ProbeRules) -> Nanos {
        self.lease_began.saturating_add(rules.lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_probes_that_hang_the_first_tells_since_when() {
        let rules = ProbeRules { most: 3, needed: 3, lease: 100, silence: 50 };
        let mut probes = Probes::new();
        let first = probes.start(10);
        probes.start(20);
        probes.start(30);
        assert_eq!(probes.hung_since(109, &rules), None);
        assert_eq!(probes.hung_since(500, &rules), Some(110));
        // One whose answer has begun has not hung.
        probes.head(first, 40);
        assert_eq!(probes.hung_since(500, &rules), Some(120));
    }
}
