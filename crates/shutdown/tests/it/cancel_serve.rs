//! An application dropped at every await point of a run that uses everything: readiness, a drain delay, phases that use
//! up their time, callbacks.

use std::future::pending;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use cancel_safe_shutdown::{Application, Phase, WorkerContext};
use cancel_safe_testing::{Explore, Outcome};
use tokio::time::sleep;

use crate::Alive;

const SECOND: Duration = Duration::from_secs(1);

/// What remains when the application is gone.
struct Scene {
    alive: Alive,
    tell: Sender<u8>,
    told: Receiver<u8>,
}

impl Scene {
    fn new() -> Self {
        let (tell, told) = channel();
        Self { alive: Alive::default(), tell, told }
    }

    /// A worker that is ready after a second and does not listen to its stop.
    fn deaf(&self, phase: Phase, name: &str) -> Phase {
        let guest = self.alive.guest();
        phase.worker_once(name, move |cx: WorkerContext| async move {
            let _guest = guest;
            sleep(SECOND).await;
            cx.ready();
            pending::<()>().await;
        })
    }

    /// Workers that never end by themselves. The ones that are stopped first use up the whole time of the stop, so that
    /// the others are cut without any.
    async fn serve(&self) -> (u8, usize) {
        let tell = self.tell.clone();
        let app = Application::new("app");
        let handle = app.shutdown_handle();
        let timer = |_: WorkerContext| async move {
            sleep(4 * SECOND).await;
            handle.cancel();
        };
        let app = app
            .shutdown_timeout(3 * SECOND)
            .drain_delay(SECOND)
            .worker_once("timer", timer)
            .phase("storage", |phase| self.deaf(phase, "db").ready_within(2 * SECOND))
            .phase("ingress", |phase| self.deaf(phase, "http").timeout(3 * SECOND))
            .on_report(move |report| tell.send(report.exit_code()).unwrap());
        let report = app.serve().await.unwrap();
        (report.exit_code(), report.stragglers().count())
    }
}

#[test]
fn a_dropped_serve_leaves_no_worker_behind_at_any_step_of_its_course() {
    let report = Explore::new().paused_time(true).run(
        async || Scene::new(),
        async |scene| scene.serve().await,
        async |Scene { alive, told, .. }, outcome| match (alive.count(), outcome) {
            // The callbacks have their own thread, and may have the report by then.
            (0, Outcome::Dropped { .. }) => Ok(()),
            (0, Outcome::Completed((70, 2))) => match told.recv_timeout(10 * SECOND) {
                Ok(70) => Ok(()),
                told => Err(format!("the callback was told {told:?}")),
            },
            (left, outcome) => Err(format!("{left} workers left: {outcome:?}")),
        },
    );
    report.publish("shutdown", "Application::serve, to the deadline").assert_clean();
}
