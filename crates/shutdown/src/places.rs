//! The places of the tasks of a group, in rows that are allocated at once and used again.
//!
//! Invariant: a place is given away again only when its own task has let go of it, also of one that was told as abandoned. So a
//! task's trace is its own for as long as it lives.

use std::panic::Location;
use std::sync::Arc;

use crate::trace::{Name, Task, Trace};

/// The places in a row. Few enough that a small group does not take much, and that each allocation is below 1 KiB: for a
/// larger one, the allocator of glibc first tidies up all that was freed.
const ROW: u32 = 24;
/// The numbers of places in a row, of which the last ones are not used.
const STRIDE: u32 = 32;
const ALL_VACANT: u32 = (1 << ROW) - 1;
/// The places whose traces begin a line of the cache.
const LINES: u32 = 0x5555_5555;

/// The places of a group.
#[derive(Debug)]
pub(crate) struct Places<R> {
    rows: Vec<Row<R>>,
    /// The rows with vacant places. The last one gives the next place.
    open: Vec<u32>,
    /// A row without tasks that has kept its memory, so that one which comes and goes alone is not an allocation each time.
    spare: Option<u32>,
    /// Whether no row is to be kept: they keep the group, which keeps them.
    is_over: bool,
    len: usize,
    entered: u64,
}

#[derive(Debug)]
struct Row<R> {
    /// A bit for each place that is vacant.
    vacant: u32,
    /// The tasks that are alive. One that was told as abandoned is not here, though its place is not vacant.
    places: Vec<Option<Task>>,
    block: Option<Arc<Block<R>>>,
}

/// The traces of a row of tasks, and the group, which each of them keeps for as long as it lives. One count of references serves
/// both.
#[derive(Debug)]
pub(crate) struct Block<R> {
    group: Arc<R>,
    traces: Traces,
}

/// Two in a line of the cache. The two are given away as late as possible, since a line that is written to on two threads
/// takes longer.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Traces([Trace; ROW as usize]);

impl<R> Block<R> {
    #[cold]
    fn new(group: &Arc<R>) -> Arc<Self> {
        Arc::new(Self { group: Arc::clone(group), traces: Traces::default() })
    }

    pub(crate) fn group(&self) -> &Arc<R> {
        &self.group
    }

    /// The trace of the task in this place.
    pub(crate) fn trace(&self, place: u32) -> &Trace {
        &self.traces.0[(place % STRIDE) as usize]
    }
}

/// A task that was alive when somebody looked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskId {
    place: u32,
    number: u64,
}

impl<R> Default for Row<R> {
    fn default() -> Self {
        Self { vacant: ALL_VACANT, places: Vec::new(), block: None }
    }
}

impl<R> Row<R> {
    fn is_empty(&self) -> bool {
        self.vacant == ALL_VACANT
    }

    /// A vacant place: as long as there is one, one whose trace begins a line of the cache.
    fn next(&self) -> u32 {
        let lines = self.vacant & LINES;
        if lines == 0 { self.vacant.trailing_zeros() } else { lines.trailing_zeros() }
    }

    /// Makes room for the place at `index`, and then for some more.
    #[cold]
    fn lengthen(&mut self, index: u32) {
        let len = match index {
            0..4 => 4,
            4..8 => 8,
            _ => ROW as usize,
        };
        self.places.reserve_exact(len - self.places.len());
        self.places.resize_with(len, || None);
    }

    #[cold]
    fn give_memory_back(&mut self) {
        *self = Self::default();
    }
}

impl<R> Default for Places<R> {
    fn default() -> Self {
        Self { rows: Vec::new(), open: Vec::new(), spare: None, is_over: false, len: 0, entered: 0 }
    }
}

impl<R> Places<R> {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// How many tasks there ever were.
    pub(crate) fn entered(&self) -> u64 {
        self.entered
    }

    /// Gives a task of `group` a place. There is none only if there are more tasks than any memory could hold.
    pub(crate) fn enter(
        &mut self,
        group: &Arc<R>,
        name: Name,
        spawned_at: &'static Location<'static>,
    ) -> Result<(Arc<Block<R>>, u32), Name> {
        let Some(number) = self.open.last().copied().or_else(|| self.grow()) else { return Err(name) };
        if self.spare == Some(number) {
            self.spare = None;
        }
        let row = &mut self.rows[number as usize];
        let index = row.next();
        row.vacant &= !(1 << index);
        if row.vacant == 0 {
            self.open.pop();
        }
        if row.places.len() <= index as usize {
            // Most groups are small. One that has filled its first row is not.
            row.lengthen(if number == 0 { index } else { ROW });
        }
        row.places[index as usize] = Some(Task { number: self.entered, name, spawned_at });
        self.entered += 1;
        self.len += 1;
        let block = row.block.get_or_insert_with(|| Block::new(group));
        Ok((Arc::clone(block), number * STRIDE + index))
    }

    #[cold]
    fn grow(&mut self) -> Option<u32> {
        let number = u32::try_from(self.rows.len()).ok().filter(|number| *number < u32::MAX / STRIDE)?;
        self.rows.push(Row::default());
        self.open.push(number);
        Some(number)
    }

    /// Takes a place back from its task. Returns the task unless its end was told before.
    pub(crate) fn leave(&mut self, place: u32) -> Option<Task> {
        let (number, index) = (place / STRIDE, place % STRIDE);
        let row = &mut self.rows[number as usize];
        if let Some(block) = &row.block {
            block.trace(place).reset();
        }
        let left = row.places[index as usize].take();
        self.len -= usize::from(left.is_some());
        if row.vacant == 0 {
            self.open.push(number);
        }
        row.vacant |= 1 << index;
        if row.is_empty() {
            let useless = if self.is_over { Some(number) } else { self.spare.replace(number) };
            if let Some(number) = useless {
                self.rows[number as usize].give_memory_back();
            }
        }
        left
    }

    /// Keeps no memory for tasks to come, nor the group itself for longer than for its last task.
    pub(crate) fn end(&mut self) {
        self.is_over = true;
        if let Some(number) = self.spare.take() {
            self.rows[number as usize].give_memory_back();
        }
    }

    /// Strikes a task off that is still alive, and will not be waited for. It keeps its place.
    pub(crate) fn abandon(&mut self, id: TaskId) -> Option<Task> {
        self.get(id)?;
        self.len -= 1;
        self.rows[(id.place / STRIDE) as usize].places[(id.place % STRIDE) as usize].take()
    }

    /// A task, if it is still alive.
    pub(crate) fn get(&self, id: TaskId) -> Option<(&Task, &Trace)> {
        let (task, trace) = self.rows.get((id.place / STRIDE) as usize)?.get(id.place % STRIDE)?;
        (task.number == id.number).then_some((task, trace))
    }

    /// The task that has this place, unless its end was told.
    pub(crate) fn at(&self, place: u32) -> Option<&Task> {
        self.rows.get((place / STRIDE) as usize)?.get(place % STRIDE).map(|(task, _)| task)
    }

    /// The tasks that are alive.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (TaskId, &Task, &Trace)> {
        (0..).step_by(STRIDE as usize).zip(&self.rows).flat_map(|(first, row)| {
            (0..ROW).filter_map(move |index| {
                let (task, trace) = row.get(index)?;
                Some((TaskId { place: first + index, number: task.number }, task, trace))
            })
        })
    }
}

impl<R> Row<R> {
    fn get(&self, index: u32) -> Option<(&Task, &Trace)> {
        let task = self.places.get(index as usize)?.as_ref()?;
        Some((task, self.block.as_ref()?.trace(index)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// What a task holds.
    type Seat = (Arc<Block<()>>, u32);

    fn enter(places: &mut Places<()>, name: impl ToString) -> Seat {
        let name = Name::Plain(name.to_string().into());
        places.enter(&Arc::new(()), name, Location::caller()).expect("a place")
    }

    fn trace((block, place): &Seat) -> &Trace {
        block.trace(*place)
    }

    fn names(places: &Places<()>) -> Vec<&str> {
        let mut names: Vec<_> = places.iter().map(|(_, task, _)| task.name.as_str()).collect();
        names.sort_unstable();
        names
    }

    fn id(places: &Places<()>, name: &str) -> TaskId {
        places.iter().find(|(_, task, _)| task.name.as_str() == name).expect("it is alive").0
    }

    fn rows_in_memory(places: &Places<()>) -> usize {
        let in_memory = |row: &&Row<()>| row.places.capacity() > 0 || row.block.is_some();
        places.rows.iter().filter(in_memory).count()
    }

    #[test]
    fn every_task_is_listed_from_when_it_enters_until_it_leaves_or_is_abandoned() {
        let mut places = Places::default();
        let mut seats = HashMap::new();
        let mut listed = Vec::new();
        for number in 0..20_000_u32 {
            // Grows to some hundred tasks and shrinks again, twice.
            let grows = (number / 5_000) % 2 == 0;
            if seats.is_empty() || fastrand::u32(..100) < if grows { 60 } else { 30 } {
                seats.insert(number.to_string(), enter(&mut places, number));
                listed.push(number.to_string());
                continue;
            }
            let name = seats.keys().nth(fastrand::usize(..seats.len())).expect("a task").clone();
            let is_listed = listed.contains(&name);
            if is_listed && fastrand::u32(..10) == 0 {
                let left = places.abandon(id(&places, &name)).expect("it is alive");
                assert_eq!(left.name.as_str(), name);
            } else {
                let left = places.leave(seats.remove(&name).expect("a seat").1);
                assert_eq!(left.map(|task| task.name.as_str().to_owned()), is_listed.then(|| name.clone()));
            }
            listed.retain(|other| *other != name);
            if number % 100 == 0 {
                listed.sort_unstable();
                assert_eq!((names(&places), places.len()), (listed.iter().map(String::as_str).collect(), listed.len()));
            }
        }
        for seat in seats.values() {
            places.leave(seat.1);
        }
        assert!(names(&places).is_empty() && places.len() == 0 && rows_in_memory(&places) <= 1);
    }

    #[test]
    fn a_task_that_was_abandoned_keeps_its_trace_to_itself_until_it_leaves() {
        let mut places = Places::default();
        let seat = enter(&mut places, "abandoned");
        places.abandon(id(&places, "abandoned")).expect("it is alive");
        assert!(places.at(seat.1).is_none());
        let others: Vec<_> = (0..100).map(|number| enter(&mut places, number)).collect();
        assert!(others.iter().all(|other| !std::ptr::eq(trace(other), trace(&seat))));
        assert!(places.leave(seat.1).is_none());
        let next = enter(&mut places, "next");
        assert!(std::ptr::eq(trace(&next), trace(&seat)), "its place is lost");
    }

    #[test]
    fn a_task_is_not_taken_for_the_one_that_had_its_place_before() {
        let mut places = Places::default();
        let first = enter(&mut places, "first");
        let first_id = id(&places, "first");
        assert!(trace(&first).abort().is_none());
        trace(&first).set_called();
        trace(&first).cut(crate::task::StragglerState::Starved);
        assert!(!trace(&first).begin());
        assert!(trace(&first).call_off());
        assert!(places.leave(first.1).is_some());

        let second = enter(&mut places, "second");
        let now = trace(&second);
        assert!(std::ptr::eq(now, trace(&first)));
        assert!(places.get(first_id).is_none() && places.abandon(first_id).is_none());
        assert_eq!(places.at(second.1).map(|task| task.name.as_str()), Some("second"));
        assert!(!now.is_unwanted() && !now.is_called() && now.straggling().is_none() && now.pulse() == 0);
    }

    #[test]
    fn few_tasks_take_little_memory_and_many_give_it_back() {
        let mut places = Places::default();
        let few: Vec<_> = (0..4).map(|number| enter(&mut places, number)).collect();
        assert!(places.rows[0].places.capacity() <= 8 && few.iter().all(|seat| Arc::ptr_eq(&seat.0, &few[0].0)));
        let many: Vec<_> = (0..10_000).map(|number| enter(&mut places, number)).collect();
        assert_eq!(rows_in_memory(&places), 10_004_usize.div_ceil(24));
        for seat in &many {
            places.leave(seat.1);
        }
        // One is kept, so that a task which comes and goes beside the others is not an allocation each time.
        assert_eq!((rows_in_memory(&places), places.len()), (2, 4));
        let seat = enter(&mut places, "another");
        places.leave(seat.1);
        let again = enter(&mut places, "again");
        assert!(std::ptr::eq(trace(&again), trace(&seat)));
        places.leave(again.1);
        assert_eq!(rows_in_memory(&places), 2);
        let rows = places.rows.len();
        drop((0..10_000).map(|number| enter(&mut places, number)).collect::<Vec<_>>());
        assert_eq!(places.rows.len(), rows, "vacant places were not used");
    }

    #[test]
    fn no_two_of_a_few_tasks_write_to_one_line_of_the_cache() {
        let mut places = Places::default();
        let seats: Vec<_> = (0..48).map(|number| enter(&mut places, number)).collect();
        for row in seats.chunks(24) {
            let mut lines: Vec<_> = row[..12].iter().map(|seat| std::ptr::from_ref(trace(seat)).addr() / 64).collect();
            lines.sort_unstable();
            lines.dedup();
            assert_eq!(lines.len(), 12);
        }
    }

    #[test]
    fn a_group_that_is_over_is_kept_by_its_tasks_alone() {
        let mut places = Places::default();
        let group = Arc::new(());
        let mut enter = || {
            let name = Name::Plain("task".into());
            places.enter(&group, name, Location::caller()).expect("a place")
        };
        let (first, second) = (enter(), enter());
        places.leave(first.1);
        drop(first);
        places.end();
        assert_eq!(Arc::strong_count(&group), 2);
        places.leave(second.1);
        drop(second);
        assert_eq!(Arc::strong_count(&group), 1, "its places keep the group, which keeps them");

        let mut places = Places::default();
        let lone = places.enter(&group, Name::Plain("lone".into()), Location::caller()).expect("a place");
        places.leave(lone.1);
        drop(lone);
        places.end();
        assert_eq!(Arc::strong_count(&group), 1);
    }
}
