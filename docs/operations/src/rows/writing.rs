//! Writing in pieces, and copying.
//!
//! Invariant: the comparison uses what the peer has received in the end.

use std::io::IoSlice;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt as _, BufReader, BufWriter, copy, copy_bidirectional, copy_buf};

use crate::fixtures::{Pipe, TEXT, heard};
use crate::row::{Row, Says, TWO_UNITS, on_paused_time};

pub(crate) fn pieces() -> Vec<Row> {
    vec![
        Row::tokio("AsyncWriteExt::write", "io/trait.AsyncWriteExt.html#method.write", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::silent(), 0),
                async |(pipe, written)| {
                    while *written < TEXT.len() {
                        *written += pipe.here.write(&TEXT[*written..]).await.unwrap();
                    }
                },
                async |(pipe, _)| pipe.received().await,
            )
        })
        .says(Says::Safe),
        Row::tokio("AsyncWriteExt::write_vectored", "io/trait.AsyncWriteExt.html#method.write_vectored", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::silent(), 0),
                async |(pipe, written)| {
                    while *written < TEXT.len() {
                        let slices = [IoSlice::new(&TEXT[*written..])];
                        *written += pipe.here.write_vectored(&slices).await.unwrap();
                    }
                },
                async |(pipe, _)| pipe.received().await,
            )
        })
        .says(Says::Safe),
        Row::tokio("AsyncWriteExt::write_buf", "io/trait.AsyncWriteExt.html#method.write_buf", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::silent(), Bytes::from_static(TEXT)),
                async |(pipe, bytes)| {
                    while !bytes.is_empty() {
                        pipe.here.write_buf(bytes).await.unwrap();
                    }
                },
                async |(pipe, _)| pipe.received().await,
            )
        })
        .says(Says::Safe),
        Row::tokio("AsyncWriteExt::write_all", "io/trait.AsyncWriteExt.html#method.write_all", || {
            on_paused_time(1).cancel_safe(
                async || Pipe::silent(),
                async |pipe| pipe.here.write_all(TEXT).await.unwrap(),
                async |pipe| pipe.received().await,
            )
        })
        .says(Says::NotSafe)
        .instead("`write_all_buf` with a buffer that outlives the call"),
        Row::tokio("AsyncWriteExt::write_all_buf", "io/trait.AsyncWriteExt.html#method.write_all_buf", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::silent(), Bytes::from_static(TEXT)),
                async |(pipe, bytes)| pipe.here.write_all_buf(bytes).await.unwrap(),
                async |(pipe, _)| pipe.received().await,
            )
        })
        .how("with a buffer that is kept")
        .says(Says::Safe),
        Row::tokio("AsyncWriteExt::write_u8", "io/trait.AsyncWriteExt.html#method.write_u8", || {
            on_paused_time(6).cancel_safe(
                async || (Pipe::silent(), b'a'),
                async |(pipe, letter)| {
                    pipe.here.write_u8(*letter).await.unwrap();
                    *letter += 1;
                },
                async |(pipe, _)| pipe.received().await,
            )
        }),
        Row::tokio("AsyncWriteExt::write_u32", "io/trait.AsyncWriteExt.html#method.write_u32", || {
            on_paused_time(3).cancel_safe(
                async || Pipe::silent(),
                async |pipe| pipe.here.write_u32(u32::from_be_bytes(*b"abcd")).await.unwrap(),
                async |pipe| pipe.received().await,
            )
        })
        .instead("`BufMut::put_u32` into a buffer that outlives the call, then `write_all_buf`")
        .note("The code is the same for all numbers of two bytes and more."),
        Row::tokio("AsyncWriteExt::flush", "io/trait.AsyncWriteExt.html#method.flush", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let Pipe { here, peer } = Pipe::silent();
                    let mut writer = BufWriter::with_capacity(64, here);
                    writer.write_all(TEXT).await.unwrap();
                    (writer, peer)
                },
                async |(writer, _)| writer.flush().await.unwrap(),
                async |(writer, peer)| {
                    writer.shutdown().await.unwrap();
                    heard(peer).await
                },
            )
        })
        .how("of a `BufWriter`")
        .says(Says::Safe),
        Row::tokio("AsyncWriteExt::shutdown", "io/trait.AsyncWriteExt.html#method.shutdown", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let Pipe { here, peer } = Pipe::silent();
                    let mut writer = BufWriter::with_capacity(64, here);
                    writer.write_all(TEXT).await.unwrap();
                    (writer, peer)
                },
                async |(writer, _)| writer.shutdown().await.unwrap(),
                async |(_, peer)| heard(peer).await,
            )
        })
        .how("of a `BufWriter`"),
    ]
}

pub(crate) fn copies() -> Vec<Row> {
    vec![
        Row::tokio("io::copy", "io/fn.copy.html", || {
            on_paused_time(1).budgets(TWO_UNITS).cancel_safe(
                async || (Pipe::closing(TEXT), Pipe::silent()),
                async |(from, to)| {
                    copy(&mut from.here, &mut to.here).await.unwrap();
                },
                async |(_, to)| to.received().await,
            )
        })
        .instead("`copy_buf` from a `BufReader` that outlives the call"),
        Row::tokio("io::copy_buf", "io/fn.copy_buf.html", || {
            on_paused_time(1).budgets(TWO_UNITS).cancel_safe(
                async || (BufReader::new(Pipe::closing(TEXT).here), Pipe::silent()),
                async |(from, to)| {
                    copy_buf(from, &mut to.here).await.unwrap();
                },
                async |(_, to)| to.received().await,
            )
        })
        .how("from a reader that is kept")
        .note("It returns only the count of the last call."),
        Row::tokio("io::copy_bidirectional", "io/fn.copy_bidirectional.html", || {
            on_paused_time(1).budgets(TWO_UNITS).cancel_safe(
                async || (Pipe::closing(TEXT), Pipe::closing(b"one two three")),
                async |(one, other)| {
                    copy_bidirectional(&mut one.here, &mut other.here).await.unwrap();
                },
                async |(one, other)| (heard(&mut one.peer).await, heard(&mut other.peer).await),
            )
        })
        .instead("spawn it, or keep the future and poll it by reference"),
    ]
}
