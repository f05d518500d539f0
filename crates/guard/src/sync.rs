//! What the ledger is made of. Invariant: only names are here, so that the tests can put the same names of a model checker in
//! their place.

pub(crate) use std::sync::atomic::AtomicUsize;

pub(crate) use tokio::sync::Notify;
