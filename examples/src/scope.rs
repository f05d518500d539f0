//! Structured concurrency in two ways: tasks that borrow and block their caller, and tasks that own and can be dropped.
//!
//! Invariant: both count the same words, and after both no task is alive.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_scoped::TokioScope;
use cancel_safe_shutdown::{BoxError, TaskGroup};

/// Counts each word of one text, which a real program would have to wait for.
async fn count(text: &str) -> BTreeMap<String, usize> {
    let mut words = BTreeMap::new();
    for line in text.lines() {
        tokio::task::yield_now().await;
        for word in line.split_whitespace() {
            *words.entry(word.to_owned()).or_default() += 1;
        }
    }
    words
}

fn add(to: &mut BTreeMap<String, usize>, words: BTreeMap<String, usize>) {
    for (word, times) in words {
        *to.entry(word).or_default() += times;
    }
}

/// Borrows the texts. That is sound only because `scope_and_block` blocks its thread until the last task has ended: it
/// cannot be dropped, so no timeout reaches it, and it needs a runtime with several threads.
pub fn borrowing(texts: &[String]) -> BTreeMap<String, usize> {
    let ((), counted) = TokioScope::scope_and_block(|scope| {
        for text in texts {
            scope.spawn(count(text));
        }
    });
    let mut words = BTreeMap::new();
    for counted in counted.into_iter().flatten() {
        add(&mut words, counted);
    }
    words
}

/// Owns the texts, by an `Arc`, and waits without blocking. It can be dropped at any moment, and its tasks go with it.
/// The first task that fails ends the others.
///
/// # Cancel safety
///
/// This method is not cancel safe. If dropped, the tasks are dropped at their current await and the counts are lost.
///
/// # Errors
///
/// The error of a task, or its panic.
pub async fn owning(texts: Vec<String>) -> Result<BTreeMap<String, usize>, BoxError> {
    let words = Arc::new(Mutex::new(BTreeMap::new()));
    let counted = Arc::clone(&words);
    TaskGroup::try_scope(async move |group| {
        for (index, text) in texts.into_iter().enumerate() {
            let counted = Arc::clone(&counted);
            group.spawn(format!("text {index}"), async move {
                let words = count(&text).await;
                add(&mut counted.lock().unwrap_or_else(PoisonError::into_inner), words);
            })?;
        }
        while let Some((name, outcome)) = group.join_next().await {
            if !outcome.is_completed() {
                return Err(BoxError::from(format!("{name}: {outcome:?}")));
            }
        }
        Ok(())
    })
    .await?;
    Ok(std::mem::take(&mut *words.lock().unwrap_or_else(PoisonError::into_inner)))
}
