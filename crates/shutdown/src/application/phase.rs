//! The declaration of phases: workers that start together and stop together. Nothing runs here.

use std::fmt;
use std::panic::Location;
use std::time::Duration;

use crate::application::restart::{RestartPolicy, Work};
use crate::context::WorkerContext;
use crate::task::{BoxError, WorkerOutput};

/// One worker as it was added.
pub(crate) struct Worker {
    pub(crate) name: String,
    pub(crate) added_at: &'static Location<'static>,
    pub(crate) work: Work,
    /// Its own policy, instead of the phase's.
    pub(crate) restart: Option<RestartPolicy>,
    /// Whether the application continues when it fails.
    pub(crate) is_tolerated: bool,
    /// Whether it makes a value for the phases that follow.
    pub(crate) is_provider: bool,
}

/// Workers that start together and stop together.
pub struct Phase {
    pub(crate) name: String,
    pub(crate) workers: Vec<Worker>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) ready_within: Option<Duration>,
    pub(crate) restart: Option<RestartPolicy>,
    /// Whether it holds the workers that were added to the application itself.
    pub(crate) is_own: bool,
}

impl Phase {
    pub(crate) fn new(name: String) -> Self {
        Self { name, workers: Vec::new(), timeout: None, ready_within: None, restart: None, is_own: false }
    }

    /// Adds a worker; see [`Application::worker`](crate::Application::worker).
    #[track_caller]
    pub fn worker<W, F>(mut self, name: impl Into<String>, work: W) -> Self
    where
        W: FnOnce(WorkerContext) -> F + Clone + Send + 'static,
        F: Future + Send + 'static,
        F::Output: WorkerOutput,
    {
        self.add(name.into(), again(work));
        self
    }

    /// Adds a worker that cannot be started twice; see [`Application::worker_once`](crate::Application::worker_once).
    #[track_caller]
    pub fn worker_once<W, F>(mut self, name: impl Into<String>, work: W) -> Self
    where
        W: FnOnce(WorkerContext) -> F + Send + 'static,
        F: Future + Send + 'static,
        F::Output: WorkerOutput,
    {
        self.add(name.into(), once(work));
        self
    }

    /// Makes a value for the phases that start after this one: a connection pool, a client, a configuration. They get
    /// copies of it with [`WorkerContext::provided`].
    ///
    /// The next phase starts when the value is made. An error or a panic stops the application; so does a value that is
    /// not made within [`ready_within`](Self::ready_within), or within 30 seconds. When this phase stops, all later
    /// phases have ended, and the value is dropped. The provider is one worker, named after the type.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::{Application, WorkerContext};
    ///
    /// #[derive(Clone)]
    /// struct Pool;
    ///
    /// async fn http(cx: WorkerContext) -> Result<(), &'static str> {
    ///     let _pool: Pool = cx.provided().ok_or("there is no pool")?;
    ///     Ok(())
    /// }
    ///
    /// let app = Application::new("shop")
    ///     .phase("storage", |phase| phase.provide(|_| async { Ok(Pool) }))
    ///     .phase("ingress", |phase| phase.worker("http", http));
    /// # let stop = app.shutdown_handle();
    /// # let app = app.worker("example", |_: WorkerContext| async move { stop.cancel() });
    /// # assert_eq!(
    /// app.run()
    /// # , std::process::ExitCode::SUCCESS);
    /// ```
    #[track_caller]
    pub fn provide<T, W, F>(self, make: W) -> Self
    where
        T: Clone + Send + Sync + 'static,
        W: FnOnce(WorkerContext) -> F + Send + 'static,
        F: Future<Output = Result<T, BoxError>> + Send + 'static,
    {
        self.provide_until(make, |value| async move { drop(value) })
    }

    /// Makes a value as [`provide`](Self::provide) does, and closes it when this phase stops, within the phase's time.
    ///
    /// # Examples
    ///
    /// ```
    /// use cancel_safe_shutdown::Application;
    ///
    /// # #[derive(Clone)]
    /// # struct Pool;
    /// # impl Pool {
    /// #     async fn close(&self) {}
    /// # }
    /// let app = Application::new("shop").phase("storage", |phase| {
    ///     let close = |pool: Pool| async move { pool.close().await };
    ///     phase.provide_until(|_| async { Ok(Pool) }, close)
    /// });
    /// # drop(app);
    /// ```
    #[track_caller]
    pub fn provide_until<T, W, F, C, G>(mut self, make: W, close: C) -> Self
    where
        T: Clone + Send + Sync + 'static,
        W: FnOnce(WorkerContext) -> F + Send + 'static,
        F: Future<Output = Result<T, BoxError>> + Send + 'static,
        C: FnOnce(T) -> G + Send + 'static,
        G: Future<Output = ()> + Send + 'static,
    {
        let provide = move |cx: WorkerContext| async move {
            // A worker told to stop before it made a value has nothing to close.
            let Some(made) = cx.token().run_until_cancelled_owned(make(cx.clone())).await else { return Ok(()) };
            let value = made?;
            if let Some(values) = cx.values() {
                values.put(value.clone());
            }
            cx.ready();
            cx.cancelled().await;
            if let Some(values) = cx.values() {
                values.remove::<T>();
            }
            close(value).await;
            Ok::<_, BoxError>(())
        };
        self.add(std::any::type_name::<T>().to_owned(), once(provide));
        if let Some(worker) = self.workers.last_mut() {
            worker.is_provider = true;
        }
        self
    }

    /// Sets how long the phase may take to stop. The default is an equal share of the remaining total budget among the
    /// phases that have yet to stop. A timeout longer than what remains is clipped to it.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Holds the next phase back until every worker of this one has called [`WorkerContext::ready`], and stops the
    /// application if that takes longer than `limit`. By default the next phase starts at once.
    pub fn ready_within(mut self, limit: Duration) -> Self {
        self.ready_within = Some(limit);
        self
    }

    /// Sets the restart policy of the last worker added, instead of the phase's policy.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::time::Duration;
    /// use cancel_safe_shutdown::{Application, Restart, WorkerContext};
    ///
    /// async fn metrics(cx: WorkerContext) -> Result<(), std::io::Error> {
    ///     cx.cancelled().await;
    ///     Ok(())
    /// }
    /// async fn http(cx: WorkerContext) {
    ///     cx.cancelled().await;
    /// }
    ///
    /// // The metrics are tried again now and then, and the service goes on without them.
    /// let app = Application::new("shop").phase("ingress", |phase| {
    ///     phase
    ///         .worker("metrics", metrics)
    ///         .restarted(Restart::OnFailure.intensity(3, Duration::from_secs(60)))
    ///         .tolerated()
    ///         .worker("http", http)
    /// });
    /// # drop(app);
    /// ```
    pub fn restarted(mut self, policy: impl Into<RestartPolicy>) -> Self {
        if let Some(worker) = self.workers.last_mut() {
            worker.restart = Some(policy.into());
        }
        self
    }

    /// Lets the application continue if the last worker added fails or panics past its restarts. The exit code can then
    /// still be 0. The report shows the worker's end like any other.
    pub fn tolerated(mut self) -> Self {
        if let Some(worker) = self.workers.last_mut() {
            worker.is_tolerated = true;
        }
        self
    }

    /// Sets the restart policy of the phase's workers. The default is the application's.
    pub fn restart(mut self, policy: impl Into<RestartPolicy>) -> Self {
        self.restart = Some(policy.into());
        self
    }

    #[track_caller]
    pub(crate) fn add(&mut self, name: String, work: Work) {
        let added_at = Location::caller();
        self.workers.push(Worker { name, added_at, work, restart: None, is_tolerated: false, is_provider: false });
    }
}

impl fmt::Debug for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workers: Vec<_> = self.workers.iter().map(|worker| &worker.name).collect();
        f.debug_struct("Phase").field("name", &self.name).field("workers", &workers).finish_non_exhaustive()
    }
}

pub(crate) fn again<W, F>(work: W) -> Work
where
    W: FnOnce(WorkerContext) -> F + Clone + Send + 'static,
    F: Future + Send + 'static,
    F::Output: WorkerOutput,
{
    Work::Again(Box::new(move |cx| {
        let work = work.clone();
        // Called inside the attempt, so that a panic of `work` itself counts as a panic of the attempt.
        Box::pin(async move { work(cx).await.into_result() })
    }))
}

pub(crate) fn once<W, F>(work: W) -> Work
where
    W: FnOnce(WorkerContext) -> F + Send + 'static,
    F: Future + Send + 'static,
    F::Output: WorkerOutput,
{
    Work::Once(Box::new(move |cx| Box::pin(async move { work(cx).await.into_result() })))
}
