//! The types under the ledger. Invariant: this file contains only names, so that the tests can replace them with the
//! same names from a model checker.

pub(crate) use std::sync::atomic::AtomicUsize;

pub(crate) use tokio::sync::Notify;
