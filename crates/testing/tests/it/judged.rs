//! `cancel_safe` against operations with a known answer, most of them from tokio's documentation.

#![expect(clippy::disallowed_methods, reason = "what is banned for its verdict is judged here")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use cancel_safe_testing::{Explore, Report, Verdict};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{
    AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, BufWriter, DuplexStream, duplex, split,
};
use tokio::sync::{broadcast, mpsc};
use tokio::task::{JoinHandle, JoinSet, yield_now};
use tokio::time::{Instant, sleep};
use tokio_util::codec::{Framed, LinesCodec};

const TEXT: &[u8] = b"alpha\nbeta\ngamma\ndelta\n";

fn explore(calls: usize) -> Explore {
    Explore::new().paused_time(true).calls(calls)
}

/// One end of a narrow pipe. The other end sends `bytes` three at a time, and keeps what it receives.
fn pipe(bytes: &'static [u8]) -> (DuplexStream, JoinHandle<Vec<u8>>) {
    let (here, there) = duplex(4);
    let (mut receive, mut send) = split(there);
    drop(tokio::spawn(async move {
        for piece in bytes.chunks(3) {
            if send.write_all(piece).await.is_err() {
                return;
            }
            yield_now().await;
        }
        // Kept open, because the end of the stream would be an answer too.
        std::future::pending::<()>().await;
    }));
    let received = tokio::spawn(async move {
        let mut received = Vec::new();
        while receive.read_buf(&mut received).await.is_ok_and(|bytes| bytes > 0) {
            yield_now().await;
        }
        received
    });
    (here, received)
}

/// Everything that the peer has received when this end is closed.
async fn received((here, received): &mut (DuplexStream, JoinHandle<Vec<u8>>)) -> String {
    here.shutdown().await.unwrap();
    String::from_utf8(received.await.unwrap()).unwrap()
}

/// A channel on which a task sends 0, 1, 2, …
fn channel(messages: u32) -> mpsc::Receiver<u32> {
    let (send, receive) = mpsc::channel(1);
    drop(tokio::spawn(async move {
        for number in 0..messages {
            if send.send(number).await.is_err() {
                return;
            }
            yield_now().await;
        }
        std::future::pending::<()>().await;
    }));
    receive
}

#[track_caller]
fn assert_not_safe(report: &Report) {
    let verdict = report.verdict();
    assert!(matches!(verdict, Verdict::NotSafe { .. }), "{verdict}\n{report}");
    let Verdict::NotSafe { site, undisturbed, seen, .. } = verdict else { return };
    assert!(site.is_some() && undisturbed != seen, "{report}");
}

#[test]
fn reading_what_is_there_is_safe() {
    // What has been read is kept in the state; a call reads until five bytes are there.
    let report = explore(1).cancel_safe(
        async || (pipe(TEXT), Vec::<u8>::new()),
        async |((here, _), read)| {
            while read.len() < TEXT.len() {
                let mut buffer = [0; 5];
                let bytes = here.read(&mut buffer).await.unwrap();
                read.extend(&buffer[..bytes]);
            }
            read.clone()
        },
        async |_| (),
    );
    report.assert_safe();
}

#[test]
fn reading_an_exact_number_of_bytes_loses_some() {
    let report = explore(4).cancel_safe(
        async || pipe(TEXT),
        async |(here, _)| {
            let mut buffer = [0; 5];
            here.read_exact(&mut buffer).await.map(|_| buffer).ok()
        },
        async |_| (),
    );
    assert_not_safe(&report);
}

#[test]
fn reading_a_number_loses_bytes() {
    assert_not_safe(&explore(4).cancel_safe(
        async || pipe(TEXT),
        async |(here, _)| here.read_u32().await.ok(),
        async |_| (),
    ));
}

#[test]
fn reading_a_line_into_a_fresh_string_loses_its_beginning() {
    let report = explore(4).cancel_safe(
        async || BufReader::new(pipe(TEXT).0),
        async |reader| {
            let mut line = String::new();
            reader.read_line(&mut line).await.unwrap();
            line
        },
        async |_| (),
    );
    assert_not_safe(&report);
}

#[test]
fn lines_keep_what_they_have_read() {
    explore(4)
        .cancel_safe(
            async || BufReader::new(pipe(TEXT).0).lines(),
            async |lines| lines.next_line().await.unwrap(),
            async |_| (),
        )
        .assert_safe();
}

#[test]
fn writing_all_of_a_slice_repeats_its_beginning() {
    assert_not_safe(&explore(1).cancel_safe(
        async || pipe(b""),
        async |(here, _)| here.write_all(TEXT).await.unwrap(),
        received,
    ));
}

#[test]
fn writing_all_of_a_buffer_keeps_its_place() {
    explore(1)
        .cancel_safe(
            async || (pipe(b""), Bytes::from_static(TEXT)),
            async |((here, _), bytes)| here.write_all_buf(bytes).await.unwrap(),
            async |(pipe, _)| received(pipe).await,
        )
        .assert_safe();
}

#[test]
fn flushing_can_be_called_again() {
    explore(1)
        .cancel_safe(
            async || {
                let (here, peer) = pipe(b"");
                let mut writer = BufWriter::with_capacity(64, here);
                writer.write_all(TEXT).await.unwrap();
                (writer, peer)
            },
            async |(writer, _)| writer.flush().await.unwrap(),
            async |(writer, peer)| {
                writer.shutdown().await.unwrap();
                String::from_utf8(peer.await.unwrap()).unwrap()
            },
        )
        .assert_safe();
}

#[test]
fn copying_loses_what_it_has_in_hand() {
    assert_not_safe(&explore(1).cancel_safe(
        async || (pipe(TEXT), pipe(b"")),
        async |((from, _), (to, _))| tokio::io::copy(&mut from.take(20), to).await.ok(),
        async |(_, to)| received(to).await,
    ));
}

#[test]
fn receiving_a_message_is_safe() {
    explore(4).cancel_safe(async || channel(4), async |channel| channel.recv().await, async |_| ()).assert_safe();
}

#[test]
fn receiving_many_messages_is_safe() {
    let report = explore(1).cancel_safe(
        async || (channel(4), Vec::new()),
        async |(channel, all)| {
            while all.len() < 4 {
                channel.recv_many(all, 2).await;
            }
            all.clone()
        },
        async |_| (),
    );
    report.assert_safe();
}

#[test]
fn two_messages_in_one_function_are_one_too_many() {
    let report = explore(2).cancel_safe(
        async || channel(4),
        async |channel| (channel.recv().await, channel.recv().await),
        async |_| (),
    );
    assert_not_safe(&report);
}

#[test]
fn receiving_a_broadcast_is_safe() {
    let setup = async || {
        let (send, receive) = broadcast::channel(8);
        drop(tokio::spawn(async move {
            for number in 0..4 {
                send.send(number).unwrap();
                yield_now().await;
            }
            std::future::pending::<()>().await;
        }));
        receive
    };
    explore(4).cancel_safe(setup, async |channel| channel.recv().await, async |_| ()).assert_safe();
}

#[test]
fn the_next_frame_is_safe() {
    let setup = async || Framed::new(pipe(TEXT).0, LinesCodec::new());
    explore(4).cancel_safe(setup, async |framed| framed.next().await.unwrap().unwrap(), async |_| ()).assert_safe();
}

#[test]
fn sending_a_frame_again_sends_it_twice() {
    let report = explore(3).cancel_safe(
        async || {
            let (here, peer) = pipe(b"");
            (Framed::new(here, LinesCodec::new()), peer, 0)
        },
        async |(framed, _, number)| {
            framed.send(format!("line {number}")).await.unwrap();
            *number += 1;
        },
        async |(framed, peer, _)| {
            framed.get_mut().shutdown().await.unwrap();
            String::from_utf8(peer.await.unwrap()).unwrap()
        },
    );
    assert_not_safe(&report);
}

#[test]
fn a_stream_of_buffered_futures_keeps_them() {
    let setup = async || {
        let numbers = (0..4).map(|number| async move {
            yield_now().await;
            number
        });
        futures_util::stream::iter(numbers).buffered(2)
    };
    explore(4).cancel_safe(setup, async |stream| stream.next().await, async |_| ()).assert_safe();
}

#[test]
fn the_next_of_a_set_of_tasks_is_safe() {
    let setup = async || {
        let mut set = JoinSet::new();
        for number in 0..3 {
            set.spawn(async move {
                for _ in 0..number {
                    yield_now().await;
                }
                number
            });
        }
        set
    };
    explore(3).cancel_safe(setup, async |set| set.join_next().await.unwrap().unwrap(), async |_| ()).assert_safe();
}

#[test]
fn a_tick_is_not_lost() {
    let report = explore(3).cancel_safe(
        async || (tokio::time::interval(Duration::from_millis(10)), Instant::now()),
        async |(interval, begun)| {
            interval.tick().await;
            begun.elapsed().as_millis() / 10
        },
        async |_| (),
    );
    report.assert_safe();
}

#[test]
fn a_sleep_that_begins_anew_starves() {
    let report = explore(1).cancel_safe(async || (), async |()| sleep(Duration::from_millis(10)).await, async |()| ());
    let verdict = report.verdict();
    assert!(matches!(verdict, Verdict::Starves { point: 1, .. }), "{verdict}\n{report}");
    assert!(std::panic::catch_unwind(|| report.assert_safe()).is_err());
}

#[test]
fn calls_that_differ_by_themselves_are_not_judged() {
    let count = std::cell::Cell::new(0);
    let report = explore(1).cancel_safe(
        async || (),
        async |()| {
            count.set(count.get() + 1);
            yield_now().await;
            count.get()
        },
        async |()| (),
    );
    let verdict = report.verdict();
    assert!(verdict.to_string().starts_with("unjudged: undisturbed runs differ: once 1"), "{verdict}");
}

#[test]
fn a_panic_and_a_hang_are_not_judged() {
    let panics = explore(1).cancel_safe(async || (), async |()| panic!("out of cheese"), async |()| ());
    assert!(matches!(panics.verdict(), Verdict::Unjudged { reason, .. } if reason.contains("out of cheese")));
    let hangs = explore(1).hang_after(Duration::from_secs(1)).cancel_safe(
        async || (),
        async |()| std::future::pending::<()>().await,
        async |()| (),
    );
    assert!(matches!(hangs.verdict(), Verdict::Unjudged { reason, .. } if reason.contains("did not end")));
    let elsewhere = explore(1).run(async || (), async |()| (), async |(), _| Ok(()));
    assert!(matches!(elsewhere.verdict(), Verdict::Unjudged { .. }));
}

#[test]
fn a_task_of_the_call_that_dies_between_its_awaits_is_not_safe() {
    let report = explore(1).cancel_safe(
        async || Arc::new(AtomicU32::new(0)),
        async |step| {
            let mut set = JoinSet::new();
            let step = Arc::clone(step);
            set.spawn(async move {
                if step.fetch_max(1, SeqCst) == 0 {
                    yield_now().await;
                    yield_now().await;
                    step.store(2, SeqCst);
                }
            });
            set.join_next().await;
        },
        async |step| step.load(SeqCst),
    );
    assert_not_safe(&report);
}

#[test]
fn a_call_that_takes_its_own_unit_is_not_starved_by_the_exploration() {
    let report = Explore::new().cancel_safe(
        async || tokio::process::Command::new("true").spawn().unwrap(),
        async |child| child.wait().await.unwrap().code(),
        async |_| (),
    );
    report.assert_safe();
}
