//! Panics in explored code are printed once.
//!
//! Invariant: only what has been printed already, from the same line of the same thread, is left out; every other panic
//! of the program reaches the hook that was there before.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::panic::{self, Location};
use std::sync::Once;

thread_local! {
    /// The lines of which a panic has been printed in the exploration on this thread.
    static PRINTED: RefCell<Option<BTreeSet<(String, u32, u32)>>> = const { RefCell::new(None) };
}

/// While it lives, a panic on this thread is printed the first time only: each run of an exploration repeats it, and the
/// report counts them.
#[derive(Debug)]
pub(crate) struct Quietly(());

impl Quietly {
    pub(crate) fn begin() -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                if info.location().is_none_or(is_news) {
                    before(info);
                }
            }));
        });
        PRINTED.set(Some(BTreeSet::new()));
        Self(())
    }
}

impl Drop for Quietly {
    fn drop(&mut self) {
        PRINTED.set(None);
    }
}

fn is_news(location: &Location<'_>) -> bool {
    let is_news = |printed: &RefCell<Option<BTreeSet<_>>>| match printed.borrow_mut().as_mut() {
        Some(printed) => printed.insert((location.file().to_owned(), location.line(), location.column())),
        None => true,
    };
    PRINTED.try_with(is_news).unwrap_or(true)
}
