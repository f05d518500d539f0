//! Long computations that can stop anywhere and go on from there.

mod codec;
mod drive;
mod error;
mod flight;
mod history;
mod intake;
mod item;
mod log;
mod progress;
mod store;
mod task;
mod varint;

pub use crate::{
    codec::Codec,
    drive::Summary,
    error::TaskError,
    item::{Done, ItemContext, ItemError, Quarantined, Retry},
    progress::Progress,
    store::FileStore,
    task::{Builder, ResumableTask, Run, map},
};
