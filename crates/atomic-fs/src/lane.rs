//! The lane between a writer, which fills buffers, and the blocking job that writes them.
//!
//! Invariant: at most one buffer waits. Together with the one being filled and the one being written that makes three.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use crate::Error;
use crate::commit::Gate;
use crate::staged::Staged;

/// A piece of content, and where in the file it belongs.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

/// Shared by a writer and its job. A job lives as long as the writer keeps ahead of it, so that a fast stream is one job.
#[derive(Debug, Default)]
pub(crate) struct Lane(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    waiting: Option<Piece>,
    /// Set by a job that found nothing waiting: it will not look again.
    closed: bool,
    /// A buffer that has been written, to be filled anew.
    written: Option<Vec<u8>>,
    /// Whom to tell when there is room.
    writer: Option<Waker>,
}

impl Lane {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Makes ready for a new job.
    pub(crate) fn open(&self) {
        self.state().closed = false;
    }

    /// Leaves a piece for the running job; hands it back if one is already waiting, or if the job is about to end.
    ///
    /// If it is handed back, the caller is woken when there is room. The end of the job is for the caller to await.
    pub(crate) fn offer(&self, cx: &mut Context<'_>, piece: Piece) -> Result<(), Piece> {
        let mut state = self.state();
        if state.closed || state.waiting.is_some() {
            state.writer = Some(cx.waker().clone());
            return Err(piece);
        }
        state.waiting = Some(piece);
        Ok(())
    }

    /// An empty buffer, used before if there is one.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        self.state().written.take().unwrap_or_default()
    }

    /// Writes `piece` and all that are left here meanwhile.
    pub(crate) fn drain(&self, mut staged: Box<Staged>, mut piece: Piece, gate: &Gate) -> Result<Box<Staged>, Error> {
        loop {
            staged.write_at(piece.offset, &piece.bytes, gate)?;
            piece.bytes.clear();
            let mut state = self.state();
            state.written = Some(piece.bytes);
            match state.waiting.take() {
                Some(next) => piece = next,
                None => {
                    state.closed = true;
                    return Ok(staged);
                }
            }
            let writer = state.writer.take();
            drop(state);
            if let Some(writer) = writer {
                writer.wake();
            }
        }
    }

    /// Nothing panics while it is locked, so a poisoned lock has spoiled nothing.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
