//! What keeps a scope that is due from ending. Invariant: a scope counts exactly those who hold it, each with its bound, until
//! they let go or are dropped.

use std::collections::BTreeMap;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

/// The longest time for which a [`critical`](crate::critical()) section holds a scope after that scope was due: 60 s.
///
/// A scope is due from its deadline on, or from the moment when its token fired. After this limit it drops its future although
/// the section has not ended; the section is then torn, and reported to [`on_torn`](crate::on_torn). A section that needs
/// another limit says so: see [`critical_for`](crate::critical_for()).
pub const CRITICAL_LIMIT: Duration = Duration::from_secs(60);

/// A grace that the clock cannot express ends after thirty years.
const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// How long a scope is held. The default holds none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bound {
    /// When the longest grace inside ends.
    grace: Option<Instant>,
    limit: Limit,
}

/// How long sections without a grace hold a scope. The order is that of the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Limit {
    #[default]
    None,
    /// An inner scope counts already, or will from its deadline on, and drops them at this moment.
    At(Instant),
    /// It counts from the moment when the scope is due.
    Open,
}

impl Bound {
    /// That of a section without a grace.
    #[inline]
    pub(crate) fn critical() -> Self {
        Self { grace: None, limit: Limit::Open }
    }

    /// That of a section whose grace ends at `end`, or never.
    #[inline]
    pub(crate) fn grace(end: Option<Instant>) -> Self {
        Self { grace: Some(end.unwrap_or_else(|| Instant::now() + NEVER)), limit: Limit::None }
    }

    /// When a scope that is due since `due` has waited long enough.
    pub(crate) fn end(self, due: Instant) -> Instant {
        let limit = match self.limit {
            Limit::None => None,
            Limit::At(limit) => Some(limit.min(limit_from(due))),
            Limit::Open => Some(limit_from(due)),
        };
        self.grace.max(limit).unwrap_or(due)
    }

    /// The bound with which a scope holds the one around it: it waits no longer than it would by itself. `due` is when it
    /// became due, or will.
    pub(crate) fn outward(self, due: Option<Instant>) -> Self {
        let limit = match (self.limit, due) {
            (Limit::At(limit), Some(due)) => Limit::At(limit.min(limit_from(due))),
            (Limit::Open, Some(due)) => Limit::At(limit_from(due)),
            (limit, _) => limit,
        };
        Self { limit, ..self }
    }
}

/// A deadline may lie so late that the clock ends before the limit does.
fn limit_from(due: Instant) -> Instant {
    due.checked_add(CRITICAL_LIMIT).unwrap_or(due)
}

/// Who holds one scope.
#[derive(Default)]
pub(crate) struct Holds(Mutex<Tally>);

/// How many hold the scope, by each part of their bounds: the latest of each part is at hand, however many there are.
#[derive(Default)]
struct Tally {
    graces: BTreeMap<Instant, usize>,
    limits: BTreeMap<Instant, usize>,
    open: usize,
    /// Set while the scope sleeps. A section may leave without its scope being polled: dropped, or moved elsewhere.
    waker: Option<Waker>,
}

impl Tally {
    fn add(&mut self, bound: Bound) {
        if let Some(grace) = bound.grace {
            *self.graces.entry(grace).or_default() += 1;
        }
        match bound.limit {
            Limit::None => {}
            Limit::At(limit) => *self.limits.entry(limit).or_default() += 1,
            Limit::Open => self.open += 1,
        }
    }

    fn remove(&mut self, bound: Bound) {
        if let Some(grace) = bound.grace {
            remove_one(&mut self.graces, grace);
        }
        match bound.limit {
            Limit::None => {}
            Limit::At(limit) => remove_one(&mut self.limits, limit),
            Limit::Open => self.open -= 1,
        }
    }

    /// The longest bound of all, or `None` where nobody holds the scope.
    fn bound(&self) -> Option<Bound> {
        let latest = |tally: &BTreeMap<Instant, usize>| tally.last_key_value().map(|(end, _)| *end);
        let limit = if self.open > 0 { Limit::Open } else { latest(&self.limits).map_or(Limit::None, Limit::At) };
        let bound = Bound { grace: latest(&self.graces), limit };
        (bound != Bound::default()).then_some(bound)
    }
}

fn remove_one(tally: &mut BTreeMap<Instant, usize>, key: Instant) {
    if let Some(count) = tally.get_mut(&key) {
        *count -= 1;
        if *count == 0 {
            tally.remove(&key);
        }
    }
}

impl Holds {
    fn lock(&self) -> MutexGuard<'_, Tally> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest bound of those who hold the scope. If there are any, `waker` is woken when one of them lets go.
    pub(crate) fn bound(&self, waker: &Waker) -> Option<Bound> {
        let mut tally = self.lock();
        let bound = tally.bound()?;
        match &mut tally.waker {
            Some(stored) => stored.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        Some(bound)
    }

    /// The scope is about to be polled, and looks at its holds after that anyway: they need not wake it.
    pub(crate) fn awake(&self) {
        drop(self.lock().waker.take());
    }

    fn hold(self: &Arc<Self>, bound: Bound) -> Weak<Self> {
        self.lock().add(bound);
        Arc::downgrade(self)
    }
}

/// Changes what a scope counts and wakes it, unless it is gone.
fn change(holds: &Weak<Holds>, what: impl FnOnce(&mut Tally)) {
    let Some(holds) = holds.upgrade() else { return };
    let woken = {
        let mut tally = holds.lock();
        what(&mut tally);
        tally.waker.take()
    };
    // Woken outside the lock: a waker is foreign code.
    if let Some(waker) = woken {
        waker.wake();
    }
}

/// The hand of one holder, which is a critical section that waits, or a scope with such a section inside it.
///
/// It holds the scope that has polled its holder last. A holder that is moved from one scope into another takes its hand
/// along. But a holder that comes back to a scope is shared by several: were its hand to go to and fro, each of them would
/// wake the other for ever. So from then on it holds all scopes that poll it.
#[derive(Default)]
pub(crate) struct Grip {
    bound: Bound,
    /// The scope that has polled the holder last, if any was around.
    latest: Option<Weak<Holds>>,
    /// Most holders are polled in one scope only.
    earlier: Option<Box<Earlier>>,
}

/// The other scopes that have polled a holder and are still there.
#[derive(Default)]
struct Earlier {
    is_shared: bool,
    scopes: Vec<EarlierScope>,
}

struct EarlierScope {
    holds: Weak<Holds>,
    is_held: bool,
}

impl Grip {
    /// Holds the scope `around` with `bound`.
    ///
    /// It is called whenever the holder has been polled and has to wait. Most often nothing has changed since.
    pub(crate) fn settle(&mut self, around: Option<&Arc<Holds>>, bound: Bound) {
        if self.bound != bound {
            let before = self.bound;
            self.for_each_held(|holds| {
                change(holds, |tally| {
                    tally.remove(before);
                    tally.add(bound);
                });
            });
            self.bound = bound;
        }
        match (&self.latest, around) {
            (Some(latest), Some(around)) if is_of(latest, around) => {}
            (None, None) => {}
            (None, Some(around)) if self.earlier.is_none() => self.latest = Some(around.hold(bound)),
            _ => self.reach_for(around),
        }
    }

    /// The holder has been polled in another scope than the last time.
    fn reach_for(&mut self, around: Option<&Arc<Holds>>) {
        let earlier = self.earlier.get_or_insert_default();
        earlier.scopes.retain(|scope| scope.holds.strong_count() > 0);
        let known = around.and_then(|around| earlier.scopes.iter().position(|scope| is_of(&scope.holds, around)));
        let known = known.map(|place| earlier.scopes.swap_remove(place));
        earlier.is_shared |= known.is_some();
        let reached = match known {
            Some(EarlierScope { holds, is_held: true }) => Some(holds),
            _ => around.map(|around| around.hold(self.bound)),
        };
        if let Some(left) = std::mem::replace(&mut self.latest, reached) {
            earlier.scopes.push(EarlierScope { holds: Weak::clone(&left), is_held: earlier.is_shared });
            if !earlier.is_shared {
                // It may wait for nothing else.
                change(&left, |tally| tally.remove(self.bound));
            }
        }
    }

    /// Lets go of all.
    #[inline]
    pub(crate) fn release(&mut self) {
        if self.latest.is_some() || self.earlier.is_some() {
            let bound = self.bound;
            self.for_each_held(|holds| change(holds, |tally| tally.remove(bound)));
            self.latest = None;
            self.earlier = None;
        }
    }

    fn for_each_held(&self, mut each: impl FnMut(&Weak<Holds>)) {
        let earlier = self.earlier.iter().flat_map(|earlier| &earlier.scopes);
        let held = earlier.filter(|scope| scope.is_held).map(|scope| &scope.holds);
        self.latest.iter().chain(held).for_each(&mut each);
    }
}

impl Drop for Grip {
    #[inline]
    fn drop(&mut self) {
        self.release();
    }
}

fn is_of(holds: &Weak<Holds>, scope: &Arc<Holds>) -> bool {
    ptr::eq(holds.as_ptr(), Arc::as_ptr(scope))
}
