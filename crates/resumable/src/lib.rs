//! Long computations that can stop anywhere and go on from there.

mod builder;
mod codec;
mod drive;
mod error;
mod file;
mod flight;
mod history;
mod intake;
mod item;
mod log;
mod progress;
mod run;
mod store;
mod task;
mod varint;

pub use crate::{
    builder::Builder,
    codec::Codec,
    drive::Summary,
    error::TaskError,
    item::{Done, ItemContext, ItemError, Quarantined, Retry},
    progress::Progress,
    run::Run,
    store::FileStore,
    task::{ResumableTask, map},
};
