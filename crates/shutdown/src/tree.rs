//! Groups without their types, and operations on a whole tree of groups. A stop reaches every task of a group and of
//! the groups below it; no two groups are ever locked at once.

use std::fmt;
use std::future::poll_fn;
use std::panic::Location;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::Clock;
use crate::places::TaskId;
use crate::report::Ledger;
use crate::stop::{Stop, Stopping};
use crate::task::StragglerState;

/// The time between the two observations that tell a blocked task from a parked one.
pub(crate) const SAMPLE: Duration = Duration::from_millis(5);
/// How long an aborted task may take to be dropped before it counts as one that cannot be stopped.
pub(crate) const SETTLE: Duration = Duration::from_millis(20);

/// A task that was alive at a first look, and its pulse.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Look {
    pub(crate) task: TaskId,
    pub(crate) pulse: u32,
}

/// What a second look shows.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) name: String,
    pub(crate) spawned_at: &'static Location<'static>,
    pub(crate) last_mark: Option<String>,
    pub(crate) state: StragglerState,
}

/// The tasks of one group, without their types.
pub(crate) trait Node: Send + Sync + fmt::Debug {
    fn path(&self) -> &str;
    fn stop(&self) -> &Arc<Stop>;
    fn ledger(&self) -> Option<&Arc<Ledger>>;
    /// Admits no more tasks and groups.
    fn close(&self);
    /// Closes the group, unless it takes tasks until it is cut or dropped.
    fn close_on_stop(&self);
    /// Closes the group if no task is alive here; returns whether that is so.
    fn close_if_empty(&self) -> bool;
    /// The tasks that are alive.
    fn look(&self) -> Vec<Look>;
    /// Those of them that are still alive, and what they are doing.
    fn seen(&self, looks: &[Look]) -> Vec<Seen>;
    /// Notes of those that are still alive that they outlived their grace, and what they are doing.
    fn cut(&self, looks: &[Look], starved: bool);
    /// Aborts every task.
    fn abort_all(&self);
    /// The same, but of those that have a context, which tells them to stop.
    fn abort_uninformed(&self);
    /// How many futures are alive, rather than blocking closures.
    fn live_futures(&self) -> usize;
    /// The groups below that have not ended for good.
    fn children(&self) -> Vec<Arc<dyn Node>>;
    /// Whether the group and all groups below it have ended for good.
    fn is_gone(&self) -> bool;
    /// Adopts a group, which is then stopped and awaited with this one. Returns false if this one is closed. A group that
    /// `lingers` is adopted as long as a task is alive here, which may still need it.
    fn adopt(&self, child: Weak<dyn Node>, lingers: bool) -> bool;
    /// Records every live task as abandoned, but a blocking closure that has not begun as cancelled, because it never
    /// will begin.
    fn abandon(&self);
    /// How many tasks this group ever had, if none is alive.
    fn entered_if_empty(&self) -> Option<u64>;
    /// Ready when no task is alive here.
    fn poll_empty(&self, cx: &mut Context<'_>) -> Poll<()>;
    /// Ready when no task is alive here or below, and no group below could still take one.
    fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()>;
    /// Returns the group above, to be told, if this group has just ended for good.
    fn end(&self) -> Option<Arc<dyn Node>>;
    fn child_ended(&self);
}

/// Stops a group and all groups below it: sets the reason, closes them, and drops the tasks that have no token.
pub(crate) fn stop_tree(root: &Arc<dyn Node>, stopping: &Stopping) {
    // The reason comes before the close, so that a task that finds its group closed, and is aborted, finds it too.
    let tell = |node: &dyn Node| {
        node.stop().request(stopping.clone());
        node.close_on_stop();
    };
    for node in walk(root, tell) {
        node.abort_uninformed();
        ended(node.end());
    }
}

/// Closes a group and all groups below it, and lists them.
pub(crate) fn tree(root: &Arc<dyn Node>) -> Vec<Arc<dyn Node>> {
    walk(root, |node| node.close())
}

/// Lists a group and all groups below it without changing them.
pub(crate) fn list(root: &Arc<dyn Node>) -> Vec<Arc<dyn Node>> {
    walk(root, |_| {})
}

/// Visits and lists a group and all groups below it. A loop, so that no nesting can overflow the stack.
fn walk(root: &Arc<dyn Node>, mut visit: impl FnMut(&dyn Node)) -> Vec<Arc<dyn Node>> {
    let mut nodes = vec![Arc::clone(root)];
    let mut next = 0;
    while let Some(node) = nodes.get(next).cloned() {
        // Before the children are listed: a visit that closes the group thus leaves no child unlisted.
        visit(&*node);
        nodes.extend(node.children());
        next += 1;
    }
    nodes
}

/// Waits until no task is alive here and below, then closes the groups below, even if they still have holders.
pub(crate) async fn finished(root: &Arc<dyn Node>) {
    loop {
        // One after the other, so that the end of one group does not cost a look at all of them.
        for node in walk(root, |_| {}) {
            poll_fn(|cx| node.poll_empty(cx)).await;
        }
        if close_if_finished(root) {
            return;
        }
    }
}

/// Closes a group and all groups below it if no task is alive in any of them; returns whether that is so.
fn close_if_finished(root: &Arc<dyn Node>) -> bool {
    // A task may end right after it has spawned another into a group that was already checked. But if two passes saw no
    // task, and none was entered between them, then no task was alive anywhere at the end of the first.
    let (Some(first), Some(second)) = (census(root), census(root)) else { return false };
    let same = |(one, two): (&Census, &Census)| Arc::ptr_eq(&one.0, &two.0) && one.1 == two.1;
    let mut finished = first.len() == second.len() && first.iter().zip(&second).all(same);
    if finished {
        for node in walk(root, |node| finished &= node.close_if_empty()) {
            ended(node.end());
        }
    }
    finished
}

/// A group that has no tasks now, and how many it ever had.
type Census = (Arc<dyn Node>, u64);

/// Looks at each group; `None` if one has tasks.
fn census(root: &Arc<dyn Node>) -> Option<Vec<Census>> {
    let nodes = walk(root, |_| {}).into_iter();
    nodes.map(|node| node.entered_if_empty().map(|entered| (node, entered))).collect()
}

/// Aborts every task of a stopped group and of the groups below it, however much grace is left.
pub(crate) fn abort_tree(root: &Arc<dyn Node>) {
    for node in tree(root) {
        node.abort_all();
        ended(node.end());
    }
}

/// Notes what each live task below `roots` is doing, and aborts it. Afterwards none is alive: what cannot be aborted is
/// recorded as abandoned. It takes at most `SAMPLE` and `SETTLE`. If dropped early, call it again.
///
/// The flag of each root says whether it is starved: whether the runtime has run nothing since the root was told to
/// stop.
pub(crate) async fn cut(roots: &[(Arc<dyn Node>, bool)], clock: &Clock) {
    let trees = roots.iter().flat_map(|(root, starved)| tree(root).into_iter().map(|node| (node, *starved)));
    let nodes: Vec<_> = trees.map(|(node, starved)| (node.look(), node, starved)).collect();
    if nodes.iter().any(|(looks, ..)| !looks.is_empty()) {
        clock.sleep(SAMPLE).await;
    }
    for (looks, node, starved) in &nodes {
        node.cut(looks, *starved);
        node.abort_all();
    }
    let settled = Instant::now() + SETTLE;
    for (root, _) in roots {
        // Elapsed or not, the next step is the same: what is still alive now is abandoned.
        let _elapsed = clock.timeout_at(settled, poll_fn(|cx| root.poll_idle(cx))).await;
    }
    for (_, node, _) in nodes {
        node.abandon();
        ended(node.end());
    }
}

/// Polls `look` to its end. Once the group is stopped and its grace over, cuts what is left, after which `look` is ready.
pub(crate) async fn bounded<R>(root: &Arc<dyn Node>, mut look: impl FnMut(&mut Context<'_>) -> Poll<R>) -> R {
    loop {
        let looking = poll_fn(&mut look);
        match root.stop().get() {
            Some(stopping) => match tokio::time::timeout_at(stopping.deadline, looking).await {
                Ok(found) => return found,
                Err(_) => cut(&[(Arc::clone(root), false)], &Clock::Tokio).await,
            },
            None => {
                if let Some(found) = root.stop().token().run_until_cancelled(looking).await {
                    return found;
                }
            }
        }
    }
}

/// Tells the group above that one below it has ended, and so on upwards. It is a loop for the same reason as `walk`.
pub(crate) fn ended(mut above: Option<Arc<dyn Node>>) {
    while let Some(node) = above {
        node.child_ended();
        above = node.end();
    }
}
