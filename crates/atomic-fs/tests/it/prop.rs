//! Random pieces, random drops: the file is the concatenation of the acknowledged pieces.

use std::pin::pin;
use std::task::{Context, Poll, Waker};

use cancel_safe_atomic_fs::{AtomicFileWriter, Durability};
use proptest::prelude::*;
use tempfile::tempdir;

/// One `write_all`: how many bytes, and after how many polls it is dropped at the latest.
fn piece() -> impl Strategy<Value = (usize, usize)> {
    (prop_oneof![0..5000_usize, 0..(3_usize << 20)], prop_oneof![Just(usize::MAX), 0..4_usize])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_dropped_write_leaves_no_piece_of_a_piece(pieces in proptest::collection::vec(piece(), 1..12)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let dir = tempdir().unwrap();
            let path = dir.path().join("file");
            let mut writer = AtomicFileWriter::options().durability(Durability::None).open(&path).await.unwrap();
            let mut expected = Vec::new();
            for (number, (length, polls)) in pieces.into_iter().enumerate() {
                let data = vec![number as u8 + 1; length];
                let complete = if polls == usize::MAX {
                    writer.write_all(&data).await.unwrap();
                    true
                } else {
                    let mut write = pin!(writer.write_all(&data));
                    let mut cx = Context::from_waker(Waker::noop());
                    (0..polls).any(|_| match write.as_mut().poll(&mut cx) {
                        Poll::Ready(result) => { result.unwrap(); true }
                        // With such a small budget of polls the job on the other thread is sometimes done and sometimes
                        // not.
                        Poll::Pending => { std::thread::yield_now(); false }
                    })
                };
                if complete {
                    expected.extend_from_slice(&data);
                }
            }
            writer.commit().await.unwrap();
            assert!(std::fs::read(&path).unwrap() == expected, "wanted {} bytes", expected.len());
        });
    }
}
