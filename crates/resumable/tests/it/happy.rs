//! What works when nothing goes wrong: the simple forms, results of every shape, progress.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use cancel_safe_resumable::{Builder, Codec, FileStore, ItemContext, ItemError, ResumableTask, Retry, TaskError, map};
use futures_util::{StreamExt, stream};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::support::{checkpoint, complete, double, numbers, restored};

#[tokio::test]
async fn a_cancelled_task_goes_on_where_it_was() {
    let (_dir, path) = checkpoint();
    let items: Vec<u64> = (0..1000).collect();
    let cancel = CancellationToken::new();
    let mut task = ResumableTask::new(items.clone(), path.clone(), cancel.clone());
    let mut progress = task.subscribe();
    let slow = |x: u64| async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        x * 2
    };
    let handle = tokio::spawn(async move { task.process(slow).await });
    progress.wait_for(|progress| progress.done >= 20).await.unwrap();
    cancel.cancel();
    assert!(matches!(handle.await.unwrap(), Err(TaskError::Cancelled)));
    let before = progress.borrow().done;

    let mut task = ResumableTask::new(items.clone(), path, CancellationToken::new());
    let results = task.process(|x| async move { x * 2 }).await.unwrap();
    assert_eq!(results, items.iter().map(|x| x * 2).collect::<Vec<_>>());
    let summary = task.summary().unwrap();
    assert_eq!((summary.restored, summary.completed), (before, 1000 - before), "every completed item was kept");
}

#[tokio::test]
async fn one_task_can_be_processed_again_after_a_cancel_by_drop() {
    let (_dir, path) = checkpoint();
    let mut task = ResumableTask::new((0..10u64).collect(), path, CancellationToken::new());
    let at_the_sixth = Notify::new();
    let stuck = task.process(async |x| {
        if x == 5 {
            at_the_sixth.notify_one();
            std::future::pending::<()>().await;
        }
        x
    });
    tokio::select! {
        results = stuck => panic!("it should be stuck: {results:?}"),
        () = at_the_sixth.notified() => {}
    }
    assert!((task.progress() - 0.5).abs() < 1e-9);
    let results = task.process(|x| async move { x }).await.unwrap();
    assert_eq!(results, (0..10).collect::<Vec<u64>>());
    assert_eq!(task.summary().unwrap().restored, 5);
}

#[tokio::test]
async fn a_complete_checkpoint_is_the_result_and_is_not_written_again() {
    let (_dir, path) = checkpoint();
    let first = map(&path, 0..10u64, |x| async move { x + 1 }).await.unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let second: Vec<u64> = map(&path, 0..10u64, |_| async move { unreachable!() }).await.unwrap();
    assert_eq!(first, second);
    assert_eq!(bytes, std::fs::read(&path).unwrap());
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing but the checkpoint is left");
}

#[tokio::test]
async fn a_vector_is_collected_in_the_order_of_the_input_and_an_item_without_a_result_is_an_error() {
    let (_dir, path) = checkpoint();
    let builder = || numbers(&path).concurrency(8).quarantine(5);
    let work = |poison: u64| {
        move |_: ItemContext, x: u64| async move {
            tokio::time::sleep(Duration::from_millis(7 - x % 8)).await;
            if x % poison == 3 { Err(ItemError::permanent(format!("no {x}"))) } else { Ok(x * 2) }
        }
    };
    let error = builder().collect(0..40, work(20)).await.unwrap_err();
    assert!(matches!(&error, TaskError::Quarantined { items: 2, index: 3, cause, .. } if cause == "no 3"), "{error}");
    let results = builder().retry_quarantined(true).collect(0..40, work(1)).await.unwrap();
    assert_eq!(results, (0..40).map(|x| x * 2).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_simple_forms_say_their_version_and_refuse_the_results_of_another() {
    let (_dir, path) = checkpoint();
    let first = map(&path, 0..10u64, |x| async move { x }).version("2").await.unwrap();
    let refused = map(&path, 0..10u64, |x| async move { x + 1 }).version("3").await.unwrap_err();
    assert!(matches!(&refused, TaskError::VersionMismatch { field: "version", .. }), "{refused}");
    let task = || ResumableTask::new((0..10u64).collect(), path.clone(), CancellationToken::new());
    let refused = task().process(|x| async move { x + 1 }).await.unwrap_err();
    assert!(matches!(&refused, TaskError::VersionMismatch { field: "version", .. }), "{refused}");
    let again: Vec<u64> = task().version("2").process(|_| async { unreachable!() }).await.unwrap();
    assert_eq!(again, first);
}

#[tokio::test]
async fn a_checkpoint_is_written_after_so_many_results_whatever_the_interval() {
    let (_dir, path) = checkpoint();
    let never = Duration::from_secs(3600);
    let mut run = numbers(&path).checkpoint_every(never).checkpoint_every_items(10).stream(0..100, |_, x| double(x));
    for _ in 0..25 {
        run.next().await.unwrap();
    }
    let copy = path.with_extension("copy");
    let mut seen = 0;
    for _ in 0..12_000 {
        std::fs::copy(&path, &copy).unwrap();
        seen = restored(&copy, 100).await.len();
        if seen >= 10 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!((10..=25).contains(&seen), "{seen}");
}

#[test]
fn a_runtime_without_a_time_driver_is_an_error_and_no_panic() {
    let (_dir, path) = checkpoint();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let finish = |builder: Builder<u64, u64>| {
        let later = |_, _| async { Err(ItemError::defer(Duration::from_secs(1), "later")) };
        runtime.block_on(builder.stream(0..3, later).finish()).unwrap_err()
    };
    let error = finish(numbers(&path).retry(Retry::attempts(2)));
    assert!(matches!(error, TaskError::Config(_)) && !path.exists(), "{error}");
    // Only an item itself knows that it will wait.
    let error = finish(numbers(&path));
    assert!(matches!(error, TaskError::Config(_)), "{error}");
    let summary = runtime.block_on(numbers(&path).stream(0..3, |_, x| double(x)).finish()).unwrap();
    assert_eq!(summary.completed, 3, "what needs no timer runs without one");
}

#[tokio::test]
async fn an_empty_input_completes() {
    let (_dir, path) = checkpoint();
    let results: Vec<u64> = map(&path, Vec::<u64>::new(), |x| async move { x }).await.unwrap();
    assert!(results.is_empty());
}

#[tokio::test]
async fn a_token_that_fired_before_the_start_runs_nothing() {
    let (_dir, path) = checkpoint();
    let token = CancellationToken::new();
    token.cancel();
    let run = numbers(&path).cancel(token).stream(0..10, |_, _| async { unreachable!() });
    assert!(run.finish().await.unwrap_err().is_cancelled());
}

#[tokio::test]
async fn a_run_that_is_never_polled_leaves_nothing() {
    let (_dir, path) = checkpoint();
    drop(numbers(&path).stream(0..10, |_, x| double(x)));
    assert!(!path.exists());
}

#[tokio::test]
async fn a_stream_hands_out_each_item_once_restored_ones_included() {
    let (_dir, path) = checkpoint();
    for round in 0..2 {
        let mut run = numbers(&path).concurrency(64).stream(0..500, |_, x| double(x));
        let mut seen = vec![0; 500];
        while let Some(done) = run.next().await {
            seen[done.index] += 1;
            assert_eq!((done.restored, done.result), (round == 1, Ok(done.index as u64 * 2)));
        }
        assert!(seen.iter().all(|times| *times == 1));
        assert!((run.progress() - 1.0).abs() < 1e-9);
        let summary = run.finish().await.unwrap();
        assert_eq!((summary.total, summary.restored, summary.quarantined), (500, if round == 1 { 500 } else { 0 }, 0));
    }
}

#[tokio::test]
async fn finish_runs_what_was_not_taken_from_the_stream() {
    let (_dir, path) = checkpoint();
    let summary = numbers(&path).concurrency(4).stream(0..100, |_, x| double(x)).finish().await.unwrap();
    assert_eq!(summary.completed, 100);
}

#[tokio::test]
async fn the_input_may_be_an_asynchronous_stream() {
    let (_dir, path) = checkpoint();
    let source = stream::iter(0..50u64).then(|x| async move {
        tokio::task::yield_now().await;
        x
    });
    let run = numbers(&path).concurrency(3).stream_from(source, |_, x| double(x));
    assert_eq!(run.finish().await.unwrap().total, 50);
    assert_eq!(complete(&path, 50).await.unwrap().len(), 50);
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Number { value: f64 },
    Text { text: String },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Rich {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    note: Option<String>,
    #[serde(flatten)]
    more: BTreeMap<String, i64>,
    either: Untagged,
    any: serde_json::Value,
}

/// Stores a value, restores it, and returns what came back.
async fn restored_value<R>(value: R, codec: Codec) -> R
where
    R: Serialize + DeserializeOwned + Clone + Send + Sync + 'static,
{
    let (_dir, path) = checkpoint();
    let run = |value: R| {
        ResumableTask::<u8>::builder::<R>("values").store(FileStore::at(&path)).codec(codec).stream([0], move |_, _| {
            let value = value.clone();
            async move { Ok(value) }
        })
    };
    assert_eq!(run(value.clone()).finish().await.unwrap().completed, 1);
    let done = run(value).next().await.unwrap();
    assert!(done.restored);
    done.result.unwrap()
}

#[tokio::test]
async fn results_of_every_shape_come_back_as_they_were() {
    let nan = f64::from_bits(0x7ff8_0000_dead_beef);
    assert_eq!(restored_value(nan, Codec::MessagePack).await.to_bits(), nan.to_bits());
    assert_eq!(restored_value(-0.0f64, Codec::MessagePack).await.to_bits(), (-0.0f64).to_bits());
    assert_eq!(restored_value(0.1f64 + 0.2, Codec::MessagePack).await, 0.1 + 0.2);
    assert_eq!(restored_value(u128::MAX, Codec::MessagePack).await, u128::MAX);
    assert_eq!(restored_value(i128::MIN, Codec::MessagePack).await, i128::MIN);
    assert_eq!(restored_value((), Codec::MessagePack).await, ());
    let map: BTreeMap<u64, Vec<Option<char>>> = [(7, vec![Some('ß'), None]), (u64::MAX, vec![])].into();
    assert_eq!(restored_value(map.clone(), Codec::MessagePack).await, map);
    let rich = Rich {
        name: "x".repeat(100_000),
        note: None,
        more: [("a".to_owned(), -1)].into(),
        either: Untagged::Text { text: "t".to_owned() },
        any: serde_json::json!({ "list": [1, 2.5, null, "s"], "big": u64::MAX }),
    };
    assert_eq!(restored_value(rich.clone(), Codec::MessagePack).await, rich);
}

#[cfg(feature = "postcard")]
#[tokio::test]
async fn postcard_brings_results_of_a_fixed_shape_back() {
    assert_eq!(restored_value(u128::MAX, Codec::Postcard).await, u128::MAX);
    assert_eq!(restored_value(Some(Some(3u8)), Codec::Postcard).await, Some(Some(3)));
    assert_eq!(restored_value(Some(None::<u8>), Codec::Postcard).await, Some(None));
    assert!(restored_value(f32::NAN, Codec::Postcard).await.is_nan());
}

#[tokio::test(start_paused = true)]
async fn the_rate_and_the_eta_are_those_of_this_session() {
    let (_dir, path) = checkpoint();
    let work = |_, x: u64| async move {
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(x)
    };
    let mut first = numbers(&path).stream(0..100, work);
    for _ in 0..90 {
        first.next().await.unwrap();
    }
    drop(first);
    let mut second = numbers(&path).stream(0..100, work);
    let progress = second.subscribe();
    for _ in 0..95 {
        second.next().await.unwrap();
    }
    // The next poll publishes its state before it waits for the next item.
    assert!(futures_util::poll!(second.next()).is_pending());
    let seen = *progress.borrow();
    assert_eq!((seen.done, seen.restored, seen.failed, seen.total), (95, 90, 0, 100));
    assert!((seen.session_rate - 1.0).abs() < 0.1, "{seen:?}");
    let eta = seen.eta.unwrap().as_secs_f64();
    assert!((eta - 5.0).abs() < 0.5, "{seen:?}");
    assert!((seen.percent() - 95.0).abs() < 1e-9);
}

/// They do not need a turn of the runtime each, but they do not take all of its time either.
#[tokio::test]
async fn while_a_run_restores_others_run_and_a_token_ends_it() {
    const MANY: u64 = 50_000;
    let (_dir, path) = checkpoint();
    numbers(&path).stream(0..MANY, |_, x| double(x)).finish().await.unwrap();
    let turns = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&turns);
    let other = tokio::spawn(async move {
        loop {
            counter.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
        }
    });
    let token = CancellationToken::new();
    let mut run = numbers(&path).cancel(token.clone()).stream(0..MANY, |_, x| double(x));
    for index in 0..MANY as usize / 2 {
        let done = run.next().await.unwrap();
        assert_eq!((done.index, done.restored, done.result), (index, true, Ok(index as u64 * 2)));
    }
    assert!(turns.load(Ordering::Relaxed) > 5, "{turns:?} turns of another task");
    other.abort();
    token.cancel();
    assert!(run.next().await.is_none(), "a result was handed out after the token had fired");
    assert!(run.finish().await.unwrap_err().is_cancelled());
}
