//! Restart policies. A worker that keeps failing is given up after a bounded number of attempts, and no attempt begins
//! while its phase is stopping.

use std::collections::VecDeque;
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;

use crate::context::WorkerContext;
use crate::panics::{Panic, catch};
use crate::task::BoxError;

/// When a worker is restarted after it has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Restart {
    /// Never: an error or a panic stops the application. The default.
    #[default]
    Never,
    /// After an error or a panic.
    OnFailure,
    /// After every end.
    Always,
}

impl Restart {
    /// Allows at most `restarts` within any period of `within`; see [`RestartPolicy::intensity`].
    pub fn intensity(self, restarts: u32, within: Duration) -> RestartPolicy {
        RestartPolicy::from(self).intensity(restarts, within)
    }

    /// Sets the pauses before restarts; see [`RestartPolicy::backoff`].
    pub fn backoff(self, first: Duration, longest: Duration) -> RestartPolicy {
        RestartPolicy::from(self).backoff(first, longest)
    }
}

/// A [`Restart`] with its limits: 5 restarts within 60 seconds, after pauses of 100 ms, 200 ms, … up to 10 s, each
/// randomly shortened by up to half.
#[derive(Debug, Clone, Copy)]
pub struct RestartPolicy {
    restart: Restart,
    restarts: u32,
    within: Duration,
    first: Duration,
    longest: Duration,
}

impl RestartPolicy {
    /// Allows at most `restarts` within any period of `within`. The next end stops the application: with the worker's
    /// error or panic, or, under [`Restart::Always`], as a failure because the worker ended too often. The default is 5
    /// restarts within 60 seconds.
    pub fn intensity(mut self, restarts: u32, within: Duration) -> Self {
        (self.restarts, self.within) = (restarts, within);
        self
    }

    /// Waits `first` before the first restart within the period, and twice as long before each further one, up to
    /// `longest`. Jitter shortens each wait by up to half, so workers that failed together do not come back together.
    /// The default is 100 ms, up to 10 s.
    pub fn backoff(mut self, first: Duration, longest: Duration) -> Self {
        (self.first, self.longest) = (first, longest);
        self
    }

    /// How a worker ends for good after ending too often.
    fn escalated(&self, end: End) -> End {
        let Self { restarts, within, .. } = self;
        match end {
            // A worker that should always run and does not has failed, however quietly it ends.
            Ok(Ok(())) => Ok(Err(format!("ended again after {restarts} restarts within {within:?}").into())),
            end => end,
        }
    }

    fn applies(&self, end: &End) -> bool {
        match self.restart {
            Restart::Never => false,
            Restart::OnFailure => !matches!(end, Ok(Ok(()))),
            Restart::Always => true,
        }
    }
}

impl From<Restart> for RestartPolicy {
    fn from(restart: Restart) -> Self {
        Self {
            restart,
            restarts: 5,
            within: Duration::from_secs(60),
            first: Duration::from_millis(100),
            longest: Duration::from_secs(10),
        }
    }
}

/// The restarts of one worker: at most `restarts` remembered moments.
struct Window {
    policy: RestartPolicy,
    restarted: VecDeque<Instant>,
}

impl Window {
    fn new(policy: RestartPolicy) -> Self {
        Self { policy, restarted: VecDeque::new() }
    }

    /// Grants a restart at `now` and returns the pause before it, without jitter. `None` means that the intensity is
    /// exceeded.
    fn grant(&mut self, now: Instant) -> Option<Duration> {
        while self.restarted.front().is_some_and(|then| now.duration_since(*then) >= self.policy.within) {
            self.restarted.pop_front();
        }
        let recent = u32::try_from(self.restarted.len()).unwrap_or(u32::MAX);
        if recent >= self.policy.restarts {
            return None;
        }
        self.restarted.push_back(now);
        Some(self.policy.first.saturating_mul(2_u32.saturating_pow(recent)).min(self.policy.longest))
    }
}

/// What a worker does: once, or as often as its policy allows.
pub(crate) enum Work {
    Once(Box<dyn FnOnce(WorkerContext) -> Attempt + Send>),
    Again(Box<dyn FnMut(WorkerContext) -> Attempt + Send>),
}

pub(crate) type Attempt = std::pin::Pin<Box<dyn Future<Output = Result<(), BoxError>> + Send>>;

/// How an attempt ended; the outer error is a panic.
pub(crate) type End = Result<Result<(), BoxError>, Panic>;

/// Runs a worker to its last end.
///
/// If a stop arrives during the pause before a restart, the previous end stands.
pub(crate) async fn run(work: Work, policy: RestartPolicy, cx: WorkerContext) -> End {
    let mut start = match work {
        Work::Once(start) => return attempt(start(cx)).await,
        Work::Again(start) => start,
    };
    let mut window = Window::new(policy);
    loop {
        let end = attempt(start(cx.clone())).await;
        if cx.is_cancelled() || !policy.applies(&end) {
            return end;
        }
        let Some(pause) = window.grant(Instant::now()) else { return policy.escalated(end) };
        #[cfg(feature = "tracing")]
        tracing::warn!(worker = cx.name(), failed = !matches!(end, Ok(Ok(()))), ?pause, "restarting a worker");
        let pause = pause.mul_f64(1.0 - fastrand::f64() / 2.0);
        if tokio::time::timeout(pause, cx.cancelled()).await.is_ok() {
            return end;
        }
    }
}

async fn attempt(mut attempt: Attempt) -> End {
    std::future::poll_fn(|cx| {
        // Whatever a panic may have broken is dropped with the attempt; the next attempt starts from scratch.
        match catch(|| attempt.as_mut().poll(cx)) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(result)) => Poll::Ready(Ok(result)),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// No period has more restarts than allowed; a restart is refused only when the period already has that many;
        /// and the pauses double from the first to the longest.
        #[test]
        fn restarts_keep_to_their_intensity(
            restarts in 0_u32..6,
            within_ms in 1_u64..1000,
            steps_ms in prop::collection::vec(0_u64..400, 0..200),
        ) {
            let (first, longest) = (Duration::from_millis(10), Duration::from_millis(75));
            let within = Duration::from_millis(within_ms);
            let mut window = Window::new(Restart::Always.intensity(restarts, within).backoff(first, longest));
            let mut now = Instant::now();
            let mut granted: Vec<Instant> = Vec::new();
            for step in steps_ms {
                now += Duration::from_millis(step);
                let recent = granted.iter().filter(|then| now.duration_since(**then) < within).count();
                let expected = [10, 20, 40, 75, 75, 75].map(Duration::from_millis);
                let pause = window.grant(now);
                prop_assert_eq!(pause, (recent < restarts as usize).then(|| expected[recent]));
                if pause.is_some() {
                    granted.push(now);
                }
                prop_assert!(window.restarted.len() <= restarts as usize);
            }
        }
    }
}
