//! Holds: what keeps a due scope from ending. Invariant: a scope counts exactly its holders, each with its bound, until
//! they release it or are dropped.

use std::collections::BTreeMap;
use std::mem;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

/// The longest time that a [`critical`](crate::critical()) section holds a scope after that scope became due: 60 s.
///
/// A scope becomes due at its deadline, or when its token fires. After this limit it drops its future even if the
/// section has not ended; the section is then torn, and reported to [`on_torn`](crate::on_torn).
/// [`critical_for`](crate::critical_for()) sets another limit.
pub const CRITICAL_LIMIT: Duration = Duration::from_secs(60);

/// A grace that the clock cannot express ends after thirty years.
const NEVER: Duration = Duration::from_secs(30 * 365 * 24 * 60 * 60);

/// How long a scope is held. The default holds no scope.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Bound {
    /// When the longest grace inside ends.
    grace: Option<Instant>,
    limit: Limit,
}

/// How long sections without a grace hold a scope. Ordered by time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Limit {
    #[default]
    None,
    /// An inner scope's limit is already running, or starts at its deadline, and it drops the sections at this moment.
    At(Instant),
    /// The limit starts when the scope becomes due.
    Open,
}

/// How long one critical section holds a scope. It has half the size of a [`Bound`], because every section carries it,
/// and most never wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SectionBound {
    /// Up to the limit.
    Limit,
    /// Up to the end of its grace.
    Grace(Instant),
}

impl SectionBound {
    /// The bound of a section whose grace ends at `end`, or never.
    #[inline]
    pub(crate) fn grace(end: Option<Instant>) -> Self {
        Self::Grace(end.unwrap_or_else(|| Instant::now() + NEVER))
    }
}

impl From<SectionBound> for Bound {
    fn from(bound: SectionBound) -> Self {
        match bound {
            SectionBound::Limit => Self { grace: None, limit: Limit::Open },
            SectionBound::Grace(end) => Self { grace: Some(end), limit: Limit::None },
        }
    }
}

impl Bound {
    /// When a scope that became due at `due` has waited long enough.
    pub(crate) fn end(self, due: Instant) -> Instant {
        let limit = match self.limit {
            Limit::None => None,
            Limit::At(limit) => Some(limit.min(limit_from(due))),
            Limit::Open => Some(limit_from(due)),
        };
        self.grace.max(limit).unwrap_or(due)
    }

    /// The bound with which a scope holds the enclosing one: no longer than it would wait by itself. `due` is when it
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

/// The end of the limit. A deadline may be so late that the clock cannot express this end.
fn limit_from(due: Instant) -> Instant {
    due.checked_add(CRITICAL_LIMIT).unwrap_or(due)
}

/// The holders of one scope.
#[derive(Default)]
pub(crate) struct Holds(Mutex<Tally>);

/// How many holders the scope has, by each part of their bounds, so that the latest of each part is at hand however
/// many there are.
#[derive(Default)]
struct Tally {
    graces: BTreeMap<Instant, usize>,
    limits: BTreeMap<Instant, usize>,
    open: usize,
    /// Set while the scope sleeps. A section may leave without a poll of its scope, because it is dropped or moved
    /// elsewhere.
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

    /// The longest of all bounds, or `None` if nothing holds the scope.
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

    /// The longest bound of the scope's holders. If there are any, `waker` is woken when one of them releases the
    /// scope.
    pub(crate) fn bound(&self, waker: &Waker) -> Option<Bound> {
        let mut tally = self.lock();
        let bound = tally.bound()?;
        match &mut tally.waker {
            Some(stored) => stored.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
        Some(bound)
    }

    /// Notes that the scope is about to be polled. It checks its holds after the poll anyway, so they need not wake it.
    pub(crate) fn awake(&self) {
        drop(self.lock().waker.take());
    }

    /// Changes the scope's tally, and wakes the scope.
    fn change(&self, what: impl Fn(&mut Tally)) {
        let woken = {
            let mut tally = self.lock();
            what(&mut tally);
            tally.waker.take()
        };
        // Woken outside the lock: a waker is foreign code.
        if let Some(waker) = woken {
            waker.wake();
        }
    }
}

/// The grip of one holder: a waiting critical section, or a scope with such a section inside it.
///
/// It holds the scope that last polled its holder. If the holder moves from one scope to another, so does the grip. But
/// if the holder comes back to a scope, several scopes share it, and a grip that moved back and forth would make each
/// wake the other for ever. So from then on it holds all scopes that poll it.
pub(crate) struct Grip<B: Copy + Into<Bound>> {
    bound: B,
    reach: Reach,
}

/// The scopes that have polled a holder while it was waiting.
enum Reach {
    None,
    /// Most holders are polled in only one scope.
    One(Arc<Holds>),
    Several(Box<Several>),
}

/// Several scopes, of which the remaining ones are kept.
#[derive(Default)]
struct Several {
    is_shared: bool,
    scopes: Vec<Reached>,
}

struct Reached {
    holds: Weak<Holds>,
    is_held: bool,
}

impl<B: Copy + Into<Bound>> Grip<B> {
    #[inline]
    pub(crate) fn new(bound: B) -> Self {
        Self { bound, reach: Reach::None }
    }

    /// Holds the enclosing scope `around`.
    ///
    /// Called whenever the holder was polled and has to wait. Usually nothing has changed since the last call.
    pub(crate) fn settle(&mut self, around: Option<Arc<Holds>>) {
        match (&mut self.reach, around) {
            (Reach::One(one), Some(around)) if Arc::ptr_eq(one, &around) => {}
            (Reach::None, None) => {}
            (Reach::None, Some(around)) => {
                around.lock().add(self.bound.into());
                self.reach = Reach::One(around);
            }
            (Reach::One(one), around) => {
                let left = Reached { holds: Arc::downgrade(one), is_held: true };
                let mut several = Several { is_shared: false, scopes: vec![left] };
                several.settle(around.as_ref(), self.bound.into());
                self.reach = Reach::Several(Box::new(several));
            }
            (Reach::Several(several), around) => several.settle(around.as_ref(), self.bound.into()),
        }
    }

    /// Holds the same scopes with another bound.
    pub(crate) fn set_bound(&mut self, bound: B)
    where
        B: PartialEq,
    {
        let before = mem::replace(&mut self.bound, bound);
        if before != bound {
            self.reach.change(|tally| {
                tally.remove(before.into());
                tally.add(bound.into());
            });
        }
    }

    /// Releases all scopes.
    #[inline]
    pub(crate) fn release(&mut self) {
        // Most sections never wait, and have reached nothing.
        if !matches!(self.reach, Reach::None) {
            self.let_go();
        }
    }

    #[cold]
    #[inline(never)]
    fn let_go(&mut self) {
        let bound = self.bound.into();
        mem::replace(&mut self.reach, Reach::None).change(|tally| tally.remove(bound));
    }
}

impl<B: Copy + Into<Bound>> Drop for Grip<B> {
    #[inline]
    fn drop(&mut self) {
        self.release();
    }
}

impl Reach {
    /// Changes the tallies of the held scopes, and wakes the scopes.
    fn change(&self, what: impl Fn(&mut Tally)) {
        match self {
            Self::None => {}
            Self::One(one) => one.change(what),
            Self::Several(several) => several.change(what),
        }
    }
}

impl Several {
    fn settle(&mut self, around: Option<&Arc<Holds>>, bound: Bound) {
        self.scopes.retain(|scope| scope.holds.strong_count() > 0);
        let is_around =
            |scope: &&mut Reached| around.is_some_and(|around| ptr::eq(scope.holds.as_ptr(), Arc::as_ptr(around)));
        if let Some(known) = self.scopes.iter_mut().find(is_around) {
            if !known.is_held {
                known.is_held = true;
                self.is_shared = true;
                around.into_iter().for_each(|around| around.lock().add(bound));
            }
            return;
        }
        if !self.is_shared {
            // The holder was moved. The scope that it leaves may be waiting for nothing else.
            self.change(|tally| tally.remove(bound));
            self.scopes.iter_mut().for_each(|scope| scope.is_held = false);
        }
        if let Some(around) = around {
            around.lock().add(bound);
            self.scopes.push(Reached { holds: Arc::downgrade(around), is_held: true });
        }
    }

    fn change(&self, what: impl Fn(&mut Tally)) {
        let held = self.scopes.iter().filter(|scope| scope.is_held);
        held.filter_map(|scope| scope.holds.upgrade()).for_each(|holds| holds.change(&what));
    }
}
