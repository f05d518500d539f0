//! Applications, workers and task groups that end in order, by the deadline, and say how.

mod application;
mod group;
mod report;
mod restart;
mod roster;
mod signal;
mod stop;
mod supervisor;
mod task;
mod voice;
mod watchdog;
mod worker;

pub use application::{AppError, Application, Phase};
pub use group::{Rejected, Straggler, TaskGroup, TaskGroupResult};
pub use report::{Report, TaskReport};
pub use restart::{Restart, RestartPolicy};
pub use stop::StopReason;
pub use task::{BoxError, StragglerState, TaskOutcome, TaskOutput, WorkerOutput};
pub use worker::{BackgroundWorker, WorkerContext};
