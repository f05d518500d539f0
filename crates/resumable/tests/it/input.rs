//! Inputs that differ from those of the previous run.

use std::path::Path;

use cancel_safe_resumable::{Done, FileStore, ResumableTask, TaskError, map};
use futures_util::StreamExt;
use proptest::prelude::*;
use tokio_util::sync::CancellationToken;

use crate::support::checkpoint;

async fn process(path: &Path, items: Vec<u64>) -> Result<Vec<u64>, TaskError> {
    ResumableTask::new(items, path.to_owned(), CancellationToken::new()).process(|x| async move { x * 2 }).await
}

/// The position at which the run with changed items is refused.
async fn mismatch(path: &Path, items: Vec<u64>) -> usize {
    let before = std::fs::read(path).unwrap();
    let error = process(path, items).await.unwrap_err();
    assert!(error.is_mismatch(), "{error}");
    assert_eq!(before, std::fs::read(path).unwrap(), "a refused run changes nothing");
    match error {
        TaskError::InputMismatch { index, path: named, .. } if named == path => index,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_changed_input_without_keys_is_refused_at_the_position_that_changed() {
    let (_dir, path) = checkpoint();
    let items: Vec<u64> = (0..1000).collect();
    process(&path, items.clone()).await.unwrap();
    let changed = |change: fn(&mut Vec<u64>)| {
        let mut items = items.clone();
        change(&mut items);
        items
    };
    assert_eq!(mismatch(&path, changed(|items| items[500] = 7)).await, 500);
    assert_eq!(mismatch(&path, changed(|items| items[999] = 7)).await, 999);
    assert_eq!(mismatch(&path, changed(|items| items.insert(0, 7))).await, 0);
    assert_eq!(mismatch(&path, changed(|items| items.retain(|x| *x != 300))).await, 300);
    assert_eq!(mismatch(&path, changed(|items| items.swap(10, 20))).await, 10);
    assert_eq!(mismatch(&path, changed(|items| items.truncate(990))).await, 990);
    assert_eq!(process(&path, items).await.unwrap().len(), 1000);
}

#[tokio::test]
async fn a_change_far_into_a_long_input_does_not_go_unnoticed() {
    let (_dir, path) = checkpoint();
    let mut items: Vec<u64> = (0..20_000).collect();
    process(&path, items.clone()).await.unwrap();
    for at in (2_000..20_000).step_by(1997) {
        items[at] += 1_000_000;
        let found = mismatch(&path, items.clone()).await;
        assert!((at..at + 8).contains(&found), "edited {at}, found {found}");
        items[at] -= 1_000_000;
    }
}

#[tokio::test]
async fn an_input_that_grew_at_its_end_goes_on() {
    let (_dir, path) = checkpoint();
    process(&path, (0..100).collect()).await.unwrap();
    let mut task = ResumableTask::new((0..150u64).collect(), path, CancellationToken::new());
    task.process(|x| async move { x * 2 }).await.unwrap();
    assert_eq!((task.summary().unwrap().restored, task.summary().unwrap().completed), (100, 50));
}

/// Runs keyed words and returns, for each, whether it was restored.
async fn words(path: &Path, words: &[String]) -> Result<Vec<Done<String>>, TaskError> {
    let mut run = ResumableTask::builder("words")
        .store(FileStore::at(path))
        .key(|word: &String| word.clone())
        .concurrency(4)
        .ordered()
        .stream(words.to_vec(), |cx, word: String| async move {
            assert_eq!(cx.key(), Some(word.as_str()));
            Ok(word.to_uppercase())
        });
    let all = run.by_ref().collect().await;
    run.finish().await.map(|_| all)
}

#[tokio::test]
async fn two_items_of_one_key_are_refused() {
    let (_dir, path) = checkpoint();
    let twice: Vec<String> = ["a", "b", "c", "b"].map(str::to_owned).into();
    let error = words(&path, &twice).await.unwrap_err();
    assert!(matches!(error, TaskError::DuplicateKey { first: 1, index: 3 }), "{error}");
}

#[tokio::test]
async fn keys_find_their_results_wherever_the_items_went() {
    let (_dir, path) = checkpoint();
    let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    words(&path, &named(&["a", "b", "c", "d"])).await.unwrap();
    let all = words(&path, &named(&["new", "d", "b", "", "a"])).await.unwrap();
    let seen: Vec<_> = all.iter().map(|done| (done.key.as_deref().unwrap(), done.restored)).collect();
    assert_eq!(seen, [("new", false), ("d", true), ("b", true), ("", false), ("a", true)]);
    assert_eq!(all[1].result, Ok("D".to_owned()));
    // An item that was removed from the input is still known if it comes back.
    let all = words(&path, &named(&["c"])).await.unwrap();
    assert!(all[0].restored);
}

#[tokio::test]
async fn an_item_that_cannot_be_serialised_is_named() {
    struct Unwilling;
    impl serde::Serialize for Unwilling {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            Err(serde::ser::Error::custom("no"))
        }
    }
    impl<'de> serde::Deserialize<'de> for Unwilling {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            Err(serde::de::Error::custom("no"))
        }
    }
    let (_dir, path) = checkpoint();
    let error = map(&path, [Unwilling], |_| async move { 1u8 }).await.unwrap_err();
    assert!(matches!(error, TaskError::Codec { index: 0, action: "written", .. }), "{error}");
    let error = map(path.with_extension("2"), [1u8, 2], |_| async move { Unwilling }).await;
    assert!(matches!(error, Err(TaskError::Codec { index: 0, action: "written", .. })));
    // The file is there and has no result of the other type.
    assert_eq!(map(path.with_extension("2"), [1u8, 2], |x| async move { x }).await.unwrap(), [1, 2]);
}

#[tokio::test]
async fn an_item_that_cannot_be_copied_is_named() {
    /// Written as a number, and read as nothing.
    struct OneWay;
    impl serde::Serialize for OneWay {
        fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.serialize_u8(1)
        }
    }
    impl<'de> serde::Deserialize<'de> for OneWay {
        fn deserialize<D: serde::Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
            Err(serde::de::Error::custom("one way only"))
        }
    }
    let (_dir, path) = checkpoint();
    let error = map(&path, [OneWay], |_| async move { 1u8 }).await.unwrap_err();
    let TaskError::Codec { index: 0, action: "read back", cause, .. } = &error else { panic!("{error}") };
    assert!(cause.to_string().contains("one way only"), "{cause}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_edit_of_a_keyed_input_gives_each_word_its_own_result(
        before in prop::collection::btree_set("[a-z]{0,3}", 0..30),
        after in prop::collection::hash_set("[a-z]{0,3}", 0..30),
    ) {
        let (_dir, path) = checkpoint();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let before: Vec<String> = before.into_iter().collect();
            let after: Vec<String> = after.into_iter().collect();
            words(&path, &before).await.unwrap();
            let all = words(&path, &after).await.unwrap();
            assert_eq!(all.len(), after.len());
            for (word, done) in after.iter().zip(all) {
                assert_eq!(done.result.unwrap(), word.to_uppercase());
                assert_eq!(done.restored, before.contains(word));
            }
        });
    }

    #[test]
    fn any_edit_of_an_unkeyed_input_is_refused_or_harmless(
        before in prop::collection::vec(0..4u64, 1..40),
        after in prop::collection::vec(0..4u64, 0..40),
    ) {
        let (_dir, path) = checkpoint();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            process(&path, before.clone()).await.unwrap();
            let expected = before.iter().zip(&after).position(|(a, b)| a != b);
            let expected = expected.or((after.len() < before.len()).then_some(after.len()));
            match (process(&path, after.clone()).await, expected) {
                (Ok(results), None) => assert_eq!(results, after.iter().map(|x| x * 2).collect::<Vec<_>>()),
                (Err(TaskError::InputMismatch { index, .. }), Some(expected)) => assert_eq!(index, expected),
                (outcome, expected) => panic!("{outcome:?}, expected {expected:?}"),
            }
        });
    }
}
