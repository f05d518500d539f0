//! Checkpoints as other programs see them.

use std::{fs, time::Duration};

use cancel_safe_resumable::{Checkpoint, Codec, Done, TaskError};
use futures_util::StreamExt;

use crate::support::{checkpoint, complete, double, numbers};

fn golden(name: &str) -> String {
    format!("{}/tests/golden/format-1-{name}.ckpt", env!("CARGO_MANIFEST_DIR"))
}

/// Index and result of each finished item, or whether it is uncertain.
fn records(checkpoint: &Checkpoint<u64>) -> Vec<(usize, Result<u64, bool>)> {
    let record = |done: Result<Done<u64>, TaskError>| {
        let Done { index, result, .. } = done.unwrap();
        (index, result.map_err(|quarantined| quarantined.uncertain))
    };
    checkpoint.records().map(record).collect()
}

#[test]
fn a_checkpoint_says_what_it_is_of() {
    let mixed = Checkpoint::<u64>::read(golden("mixed")).unwrap();
    assert_eq!((mixed.job().as_str(), mixed.version().as_str(), mixed.result_type().as_str()), ("golden", "v1", "u64"));
    assert_eq!((mixed.codec(), mixed.is_keyed(), mixed.is_sealed()), (Some(Codec::MessagePack), false, false));
    let counts = mixed.counts();
    assert_eq!((counts.results, counts.quarantined, counts.uncertain, counts.failed), (2, 1, 1, 1));
    assert_eq!((counts.read, mixed.sessions(), mixed.torn_bytes()), (Some(6), 1, 0));
    assert_eq!(mixed.len_bytes(), fs::metadata(golden("mixed")).unwrap().len());
    assert_eq!(records(&mixed), [(0, Ok(0)), (2, Err(false)), (3, Err(true)), (4, Ok(40))]);
    // It can be repeated.
    assert_eq!(records(&mixed).len(), 4);
    let raw: Vec<_> = mixed.raw().map(Result::unwrap).collect();
    assert_eq!(raw[3].result, Ok(b"\x28".to_vec()));

    let sealed = Checkpoint::<u64>::read(golden("sealed")).unwrap();
    assert!(sealed.is_sealed() && sealed.sessions() == 2 && sealed.live_bytes() < sealed.len_bytes());
    assert_eq!(records(&sealed), [(0, Ok(0)), (1, Ok(10)), (2, Ok(20)), (3, Ok(30)), (4, Ok(40))]);

    let keyed = Checkpoint::<u64>::read(golden("key")).unwrap();
    assert!(keyed.is_keyed() && keyed.counts().read.is_none());
    let keys: Vec<_> = keyed.records().map(|done| done.unwrap().key.unwrap()).collect();
    assert_eq!(keys.iter().map(|key| &**key).collect::<Vec<_>>(), ["0", "ß", "1"]);
}

#[test]
fn a_result_of_another_type_is_an_error_that_names_both() {
    let other = Checkpoint::<String>::read(golden("sealed")).unwrap();
    let error = other.records().next().unwrap().unwrap_err();
    assert!(error.is_codec() && error.to_string().contains("u64"), "{error}");
}

#[tokio::test]
async fn a_file_that_is_not_there_or_damaged_is_an_error() {
    let (_dir, path) = checkpoint();
    assert!(Checkpoint::<u64>::read(&path).unwrap_err().is_io());
    complete(&path, 50).await.unwrap();
    complete(&path, 100).await.unwrap();
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(Checkpoint::<u64>::read(&path).unwrap_err().is_corrupt());
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[tokio::test]
async fn a_live_file_shows_a_prefix_that_grows_and_disturbs_nobody() {
    const ITEMS: u64 = 20_000;
    let (_dir, path) = checkpoint();
    // The run waits in its middle, and near its end, until this much of it was seen from outside.
    let (go, gate) = tokio::sync::watch::channel(ITEMS / 2);
    let mut run = numbers(&path).checkpoint_every(Duration::from_millis(1)).stream(0..ITEMS, move |_, x| {
        let mut gate = gate.clone();
        async move {
            if x % 50 == 0 {
                tokio::task::yield_now().await;
            }
            drop(gate.wait_for(|open| x < *open).await);
            double(x).await
        }
    });
    run.next().await.unwrap();
    let runner = tokio::spawn(run.finish());
    let reader = tokio::task::spawn_blocking({
        let path = path.clone();
        move || {
            let (mut before, mut reads, mut live_reads) = (0, 0, 0);
            loop {
                let live = Checkpoint::<u64>::read(&path).unwrap();
                let all = records(&live);
                assert!(all.len() >= before && all.len() == live.counts().results, "nothing that was there goes");
                assert!(all.iter().all(|(index, result)| *result == Ok(*index as u64 * 2)));
                // The same file again, however far the run has come meanwhile.
                assert_eq!(live.counts().results, records(&live).len());
                (before, reads) = (all.len(), reads + 1);
                live_reads += usize::from(!live.is_sealed() && before > 0);
                if live.is_sealed() {
                    return (before, reads, live_reads);
                }
                if before as u64 >= *go.borrow() {
                    go.send_modify(|open| *open = if *open < ITEMS - 1 { ITEMS - 1 } else { ITEMS });
                }
            }
        }
    });
    assert_eq!(runner.await.unwrap().unwrap().completed, ITEMS as usize);
    let (seen, reads, live_reads) = reader.await.unwrap();
    assert!(seen == ITEMS as usize && live_reads >= 2 && reads > live_reads, "{live_reads} of {reads}");
}

#[tokio::test]
async fn a_torn_tail_is_shown_and_left_where_it_is() {
    let (_dir, path) = checkpoint();
    complete(&path, 50).await.unwrap();
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 3]).unwrap();
    let torn = Checkpoint::<u64>::read(&path).unwrap();
    assert!(torn.torn_bytes() > 0 && !torn.is_sealed());
    assert_eq!(torn.len_bytes() + torn.torn_bytes(), whole.len() as u64 - 3);
    assert_eq!(records(&torn).len(), 50);
    assert_eq!(fs::read(&path).unwrap(), whole[..whole.len() - 3]);
}
