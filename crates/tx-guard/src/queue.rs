//! The queue for connections: the places of a pool, the idle items in them, and the waiting callers in order of
//! arrival.
//!
//! Invariant: no more places are given out than exist, and a place given to a caller that has gone passes to the next
//! one. No caller waits while something is idle or a place is free.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// How many callers may wait before the first sweep for those that have gone.
const FIRST_SWEEP: usize = 64;

/// What can be idle in a place.
pub(crate) trait Idle: Sized {
    /// Called when it comes to rest because no caller waits for it. `None` if it rests somewhere else.
    fn rest(self) -> Option<Self>;
}

pub(crate) struct Queue<T: Idle> {
    max: usize,
    state: Mutex<State<T>>,
}

struct State<T: Idle> {
    /// The last one put back is taken first, so that surplus items stay idle long enough to be closed.
    idle: Vec<T>,
    /// Each caller is served through its channel. If the other end is gone, the caller has stopped waiting.
    waiting: VecDeque<oneshot::Sender<Place<T>>>,
    /// At how many waiting callers the next sweep is due, so that callers that come and go behind one that stays take
    /// no memory.
    sweep_at: usize,
    /// How many places are taken, including the idle ones.
    taken: usize,
    closed: bool,
}

/// One of the places, with or without something idle in it. Its drop gives it to the next waiting caller.
pub(crate) struct Place<T: Idle> {
    /// `None` once it was passed on.
    queue: Option<Arc<Queue<T>>>,
    idle: Option<T>,
}

/// What [`Queue::ask`] has found.
pub(crate) enum Asked<T: Idle> {
    Now(Place<T>),
    /// An error of the receiver means that the queue was closed.
    Later(oneshot::Receiver<Place<T>>),
    Closed,
}

/// How many places there are of each kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) taken: usize,
    pub(crate) idle: usize,
    pub(crate) waiting: usize,
}

impl<T: Idle> State<T> {
    fn is_waited_for(&self) -> bool {
        self.waiting.iter().any(|waiter| !waiter.is_closed())
    }
}

impl<T: Idle> Queue<T> {
    pub(crate) fn new(max: usize) -> Self {
        let (idle, waiting) = (Vec::new(), VecDeque::new());
        Self { max, state: Mutex::new(State { idle, waiting, sweep_at: FIRST_SWEEP, taken: 0, closed: false }) }
    }

    pub(crate) fn ask(self: &Arc<Self>) -> Asked<T> {
        let mut state = self.lock();
        if state.closed {
            return Asked::Closed;
        }
        if let Some(idle) = state.idle.pop() {
            return Asked::Now(Place { queue: Some(Arc::clone(self)), idle: Some(idle) });
        }
        if state.taken < self.max {
            state.taken += 1;
            return Asked::Now(Place { queue: Some(Arc::clone(self)), idle: None });
        }
        if state.waiting.len() >= state.sweep_at {
            state.waiting.retain(|waiter| !waiter.is_closed());
            state.sweep_at = FIRST_SWEEP.max(state.waiting.len() * 2);
        }
        let (waiter, told) = oneshot::channel();
        state.waiting.push_back(waiter);
        Asked::Later(told)
    }

    pub(crate) fn counts(&self) -> Counts {
        let state = self.lock();
        let waiting = state.waiting.iter().filter(|waiter| !waiter.is_closed()).count();
        Counts { taken: state.taken, idle: state.idle.len(), waiting }
    }

    /// Takes the idle items that `is_chosen` selects, with their places, which are free once the items are gone.
    pub(crate) fn take_idle(self: &Arc<Self>, mut is_chosen: impl FnMut(&T) -> bool) -> Vec<Place<T>> {
        let chosen: Vec<T> = self.lock().idle.extract_if(.., |idle| is_chosen(idle)).collect();
        chosen.into_iter().map(|idle| Place { queue: Some(Arc::clone(self)), idle: Some(idle) }).collect()
    }

    /// A free place, if fewer than `least` are taken and no caller waits.
    pub(crate) fn take_free(self: &Arc<Self>, least: usize) -> Option<Place<T>> {
        let mut state = self.lock();
        if state.closed || state.taken >= least.min(self.max) {
            return None;
        }
        state.taken += 1;
        Some(Place { queue: Some(Arc::clone(self)), idle: None })
    }

    /// Closes the queue: from now on no caller waits, and nothing is idle.
    pub(crate) fn close(self: &Arc<Self>) -> Vec<Place<T>> {
        let waiting = {
            let mut state = self.lock();
            state.closed = true;
            mem::take(&mut state.waiting)
        };
        // Dropped outside the lock, because this wakes the waiting callers.
        drop(waiting);
        self.take_idle(|_| true)
    }

    /// Gives a place to the first waiting caller. If there is none, its item comes to rest. If the queue is closed, the
    /// item is returned.
    fn give(self: &Arc<Self>, mut idle: Option<T>) -> Option<T> {
        let mut rests = false;
        loop {
            let waiter = {
                let mut state = self.lock();
                match state.waiting.pop_front() {
                    Some(waiter) => Some(waiter),
                    None if idle.is_some() && !rests && !state.closed => None,
                    None => {
                        if state.closed || idle.is_none() {
                            state.taken -= 1;
                            return idle;
                        }
                        state.idle.extend(idle);
                        return None;
                    }
                }
            };
            let Some(waiter) = waiter else {
                // Outside the lock. Then the queue is checked once more, because a caller may have come meanwhile.
                idle = idle.and_then(Idle::rest);
                rests = true;
                continue;
            };
            match waiter.send(Place { queue: Some(Arc::clone(self)), idle }) {
                Ok(()) => return None,
                Err(mut place) => {
                    place.queue = None;
                    idle = place.idle.take();
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Idle> Place<T> {
    /// Takes the item that was idle there.
    pub(crate) fn take(&mut self) -> Option<T> {
        self.idle.take()
    }

    /// Whether a caller waits for it.
    pub(crate) fn is_waited_for(&self) -> bool {
        self.queue.as_ref().is_some_and(|queue| queue.lock().is_waited_for())
    }

    /// Passes the place on with `item`, or lets `item` rest there. If the queue is closed, `item` is returned.
    pub(crate) fn put_back(mut self, item: T) -> Option<T> {
        self.queue.take()?.give(Some(item))
    }
}

impl<T: Idle> Drop for Place<T> {
    fn drop(&mut self) {
        if let Some(queue) = self.queue.take() {
            // If the caller has gone, the next one gets the item, or it stays idle. In a closed queue it ends here.
            drop(queue.give(self.idle.take()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rests anywhere but in the queue.
    const ELSEWHERE: u32 = 0;

    impl Idle for u32 {
        fn rest(self) -> Option<Self> {
            (self != ELSEWHERE).then_some(self)
        }
    }

    fn now(queue: &Arc<Queue<u32>>) -> Place<u32> {
        match queue.ask() {
            Asked::Now(place) => place,
            Asked::Later(_) | Asked::Closed => panic!("nothing is free"),
        }
    }

    fn later(queue: &Arc<Queue<u32>>) -> oneshot::Receiver<Place<u32>> {
        match queue.ask() {
            Asked::Later(told) => told,
            Asked::Now(_) | Asked::Closed => panic!("there is nothing to wait for"),
        }
    }

    #[test]
    fn no_more_places_are_given_out_than_there_are() {
        let queue = Arc::new(Queue::new(2));
        let (one, two) = (now(&queue), now(&queue));
        let mut third = later(&queue);
        drop(one);
        let third = third.try_recv().expect("a place is free");
        assert_eq!(queue.counts(), Counts { taken: 2, idle: 0, waiting: 0 });
        drop((two, third));
        assert_eq!(queue.counts(), Counts { taken: 0, idle: 0, waiting: 0 });
    }

    #[test]
    fn those_who_wait_are_served_in_the_order_in_which_they_came() {
        let queue = Arc::new(Queue::new(1));
        let place = now(&queue);
        let (mut first, mut second) = (later(&queue), later(&queue));
        assert_eq!(place.put_back(7), None);
        let mut place = first.try_recv().expect("it was the first");
        assert!(second.try_recv().is_err());
        assert_eq!(place.take(), Some(7));
        assert_eq!(place.put_back(8), None);
        assert_eq!(second.try_recv().expect("it is next").take(), Some(8));
    }

    #[test]
    fn what_was_given_to_somebody_who_has_gone_is_the_next_ones() {
        let queue = Arc::new(Queue::new(1));
        let place = now(&queue);
        let (gone_before, gone_after, mut waits) = (later(&queue), later(&queue), later(&queue));
        drop(gone_before);
        assert_eq!(place.put_back(7), None);
        assert!(waits.try_recv().is_err(), "it was given to the one before");
        drop(gone_after);
        assert_eq!(waits.try_recv().expect("it is the next one's").take(), Some(7));
    }

    #[test]
    fn what_nobody_waits_for_comes_to_rest_there_or_elsewhere() {
        let queue = Arc::new(Queue::new(1));
        assert_eq!(now(&queue).put_back(ELSEWHERE), None);
        assert_eq!(queue.counts(), Counts { taken: 0, idle: 0, waiting: 0 });
        assert_eq!(now(&queue).put_back(8), None);
        assert_eq!(queue.counts(), Counts { taken: 1, idle: 1, waiting: 0 });
        assert_eq!(now(&queue).take(), Some(8));
    }

    #[test]
    fn what_rests_elsewhere_is_still_given_to_somebody_who_waits() {
        let queue = Arc::new(Queue::new(1));
        let place = now(&queue);
        let mut waits = later(&queue);
        assert_eq!(place.put_back(ELSEWHERE), None);
        assert_eq!(waits.try_recv().expect("it is free").take(), Some(ELSEWHERE));
    }

    #[test]
    fn in_a_closed_queue_nobody_waits_and_nothing_is_kept() {
        let queue = Arc::new(Queue::new(1));
        let place = now(&queue);
        let mut waits = later(&queue);
        assert!(queue.close().is_empty());
        assert!(matches!(waits.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert!(matches!(queue.ask(), Asked::Closed));
        assert_eq!(place.put_back(7), Some(7));
        assert_eq!(queue.counts(), Counts { taken: 0, idle: 0, waiting: 0 });
    }

    #[test]
    fn those_who_have_gone_take_no_memory_behind_one_who_stays() {
        let queue = Arc::new(Queue::new(1));
        let _place = now(&queue);
        let _stays = later(&queue);
        for _ in 0..10_000 {
            drop(later(&queue));
        }
        assert!(queue.lock().waiting.len() <= FIRST_SWEEP);
        assert_eq!(queue.counts().waiting, 1);
    }
}
