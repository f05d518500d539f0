//! No signals: without the feature, or on a system that has none. Invariant: nothing is installed and nothing is
//! called.

use std::io;

use super::{Forward, Signal};

#[derive(Debug)]
pub(crate) struct Signals;

#[derive(Debug)]
pub(crate) struct Forwarding;

impl Signals {
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self)
    }

    pub(crate) fn add(&self, _signals: impl Iterator<Item = Signal>) -> io::Result<()> {
        Ok(())
    }

    pub(crate) fn forward<F, S, O>(self, forward: Forward<F, S, O>) -> io::Result<Forwarding> {
        let Forward { quiet, first, second, other, since } = forward;
        // Nothing will ever call them.
        let _unused = (quiet, first, second, other, since);
        Ok(Forwarding)
    }
}
