//! Work as a boxed future, for compilers that cannot see that a closure's future is `Send`.
//!
//! Invariant: what the work borrows outlives each attempt, and its future is `Send`. The types ensure both.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;

use crate::TransactionGuard;
use crate::backend::Backend;

/// What [`Tx::run_boxed`](crate::Tx::run_boxed) runs: `Box::pin(async move { … })`.
pub type BoxedWork<'tx, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'tx>>;

/// A guard lent to boxed work. It dereferences to the guard, so `&mut **tx` runs statements.
///
/// It also carries `'env`, the lifetime of what the work borrows. That tells the compiler that those borrows outlive
/// each attempt.
pub struct TxRef<'tx, 'env, DB: Backend> {
    guard: &'tx mut TransactionGuard<DB>,
    env: PhantomData<&'tx &'env ()>,
}

impl<'tx, DB: Backend> TxRef<'tx, '_, DB> {
    pub(crate) fn new(guard: &'tx mut TransactionGuard<DB>) -> Self {
        Self { guard, env: PhantomData }
    }
}

impl<DB: Backend> Deref for TxRef<'_, '_, DB> {
    type Target = TransactionGuard<DB>;

    fn deref(&self) -> &TransactionGuard<DB> {
        self.guard
    }
}

impl<DB: Backend> DerefMut for TxRef<'_, '_, DB> {
    fn deref_mut(&mut self) -> &mut TransactionGuard<DB> {
        self.guard
    }
}

impl<DB: Backend> fmt::Debug for TxRef<'_, '_, DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TxRef").field(&self.guard).finish()
    }
}
