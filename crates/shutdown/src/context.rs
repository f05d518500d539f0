//! The context that a worker holds while it runs, and the values that one phase makes for the next.
//!
//! Invariant: a context only informs and records marks, and keeps no task alive. A value exists from when it is made
//! until its phase stops; none of the user's code runs under the lock.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::stop::{Stop, StopReason};
use crate::trace::Own;
use crate::tree::Node;

/// What a worker, or a task spawned with a context, knows about its stop. It is cheap to clone.
#[derive(Clone)]
pub struct WorkerContext {
    own: Arc<Own>,
    stop: Arc<Stop>,
    node: Arc<dyn Node>,
    ready: Option<CancellationToken>,
    values: Option<Arc<Values>>,
}

impl WorkerContext {
    pub(crate) fn new(own: Arc<Own>, node: Arc<dyn Node>) -> Self {
        Self { own, stop: Arc::clone(node.stop()), node, ready: None, values: None }
    }

    /// The context of an application's worker.
    pub(crate) fn of_worker(self, ready: CancellationToken, values: Arc<Values>) -> Self {
        Self { ready: Some(ready), values: Some(values), ..self }
    }

    /// Returns the name of the worker or task.
    pub fn name(&self) -> &str {
        &self.own.name
    }

    /// Waits until the worker is told to stop. Returns at once if it already has been.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, nothing has happened: the next call waits for the same.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_shutdown::WorkerContext;
    ///
    /// async fn worker(cx: WorkerContext) {
    ///     let mut tick = tokio::time::interval(Duration::from_secs(1));
    ///     loop {
    ///         tokio::select! {
    ///             () = cx.cancelled() => break,
    ///             _ = tick.tick() => {}
    ///         }
    ///     }
    ///     cx.mark("flush");
    /// }
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
    /// #     let group = cancel_safe_shutdown::TaskGroup::new();
    /// #     group.spawn_with("worker", worker)?;
    /// #     let result = group.shutdown(Duration::from_secs(60)).await;
    /// #     assert_eq!(result.completed, ["worker"]);
    /// #     Ok::<_, Box<dyn std::error::Error>>(())
    /// # })?;
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    pub async fn cancelled(&self) {
        self.own.stop.cancelled(&self.stop).await;
    }

    /// Works like [`cancelled`](Self::cancelled), for code that keeps the future it waits for, such as the graceful
    /// shutdown of a server.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe. If dropped before completion, nothing has happened.
    pub fn cancelled_owned(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let cx = self.clone();
        async move { cx.cancelled().await }
    }

    /// Returns whether the worker has been told to stop. Costs two atomic loads.
    pub fn is_cancelled(&self) -> bool {
        self.stop.is_set() || self.own.stop.is_set()
    }

    /// Returns why the worker has been told to stop; `None` exactly while [`is_cancelled`](Self::is_cancelled) is false.
    pub fn reason(&self) -> Option<StopReason> {
        self.own.stop.reason(&self.stop)
    }

    /// Returns when the worker will be cut; `None` while it has not been told to stop.
    pub fn deadline(&self) -> Option<Instant> {
        self.own.stop.deadline(&self.stop)
    }

    /// Returns a token that is cancelled when the worker is told to stop, for code that takes one.
    ///
    /// Cancelling this token reaches its holders and its children, but not the worker.
    pub fn token(&self) -> CancellationToken {
        self.own.stop.token(&self.stop)
    }

    /// Says that the worker has started. A phase with [`ready_within`](crate::Phase::ready_within) waits for this.
    ///
    /// It has no effect the second time, or in a task of a group.
    pub fn ready(&self) {
        if let Some(ready) = &self.ready {
            ready.cancel();
        }
    }

    /// Returns the value of this type that an earlier phase [provides](crate::Phase::provide), such as a connection
    /// pool.
    ///
    /// `None` if no phase provides one, after its phase has stopped, and in a task of a group: give a task what it
    /// needs.
    pub fn provided<T: Clone + Send + Sync + 'static>(&self) -> Option<T> {
        self.values.as_ref()?.get()
    }

    /// The group that the worker or task is in.
    pub(crate) fn node(&self) -> &Arc<dyn Node> {
        &self.node
    }

    pub(crate) fn values(&self) -> Option<&Arc<Values>> {
        self.values.as_ref()
    }

    /// Leaves a mark. The report shows the last mark if the worker does not end in time.
    pub fn mark(&self, mark: impl Into<Cow<'static, str>>) {
        self.own.set_mark(mark.into());
    }
}

impl fmt::Debug for WorkerContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerContext")
            .field("name", &self.own.name)
            .field("reason", &self.reason())
            .finish_non_exhaustive()
    }
}

/// One value of each type.
#[derive(Default)]
pub(crate) struct Values(Mutex<HashMap<TypeId, Arc<dyn Any + Send + Sync>>>);

impl Values {
    pub(crate) fn put<T: Send + Sync + 'static>(&self, value: T) {
        let before = self.lock().insert(TypeId::of::<T>(), Arc::new(value));
        // Outside the lock.
        drop(before);
    }

    pub(crate) fn remove<T: 'static>(&self) {
        let value = self.lock().remove(&TypeId::of::<T>());
        drop(value);
    }

    pub(crate) fn get<T: Clone + Send + Sync + 'static>(&self) -> Option<T> {
        let value = self.lock().get(&TypeId::of::<T>()).cloned();
        value?.downcast::<T>().ok().map(|value| (*value).clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TypeId, Arc<dyn Any + Send + Sync>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Values {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Values").field("len", &self.lock().len()).finish()
    }
}
