//! Frames, and the other bridges of tokio-util.
//!
//! Invariant: a message that is sent again is a clone of the previous one, so a doubled message was sent before.

use std::io;

use bytes::Bytes;
use futures_util::{SinkExt, Stream, StreamExt as _, future, stream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::task::{JoinHandle, yield_now};
use tokio_util::codec::{Framed, FramedRead, FramedWrite, LinesCodec};
use tokio_util::io::{CopyToBytes, ReaderStream, SinkWriter, StreamReader};
use tokio_util::sync::PollSender;

use crate::fixtures::{Pipe, TEXT, full_channel, heard, text};
use crate::row::{From, Row, SELECT, Says, on_paused_time};

type Lines = (Framed<DuplexStream, LinesCodec>, JoinHandle<Vec<u8>>, u32);

fn lines() -> Lines {
    let Pipe { here, peer } = Pipe::silent();
    (Framed::new(here, LinesCodec::new()), peer, 0)
}

async fn sent((framed, peer, _): &mut Lines) -> String {
    SinkExt::<String>::close(framed).await.unwrap();
    heard(peer).await
}

const FEED: &str = "`feed`, then `flush`: both can be called again; or `PollSender` and a task that sends";
const DOUBLED: &str = "Its page guarantees that the message of a dropped `send` \"was not sent, but the message itself is \
    lost\". That is so only while it waits for room. Once the message has been encoded into the buffer, `send` waits for \
    the flush; dropped there, the message is sent with the next flush, and whoever sends it again sends it twice. So in \
    the first case it has to be sent again, in the second it must not be, and the caller cannot tell which it was.";

pub(crate) fn frames() -> Vec<Row> {
    vec![
        Row::tokio_util("Framed::next", "codec/struct.Framed.html#cancellation-safety", || {
            on_paused_time(4).cancel_safe(
                async || Framed::new(Pipe::sending(TEXT).here, LinesCodec::new()),
                async |framed| framed.next().await.unwrap().unwrap(),
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio_util("FramedRead::next", "codec/struct.FramedRead.html#cancellation-safety", || {
            on_paused_time(4).cancel_safe(
                async || FramedRead::new(Pipe::sending(TEXT).here, LinesCodec::new()),
                async |framed| framed.next().await.unwrap().unwrap(),
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio_util("Framed::send", "codec/struct.Framed.html#cancellation-safety", || {
            on_paused_time(3).cancel_safe(
                async || lines(),
                async |(framed, _, number)| {
                    framed.send(format!("line {number}")).await.unwrap();
                    *number += 1;
                },
                sent,
            )
        })
        .how("of a clone")
        .says(Says::NotSent)
        .instead(FEED)
        .note(DOUBLED),
        Row::tokio_util("FramedWrite::send", "codec/struct.FramedWrite.html#cancellation-safety", || {
            on_paused_time(3).cancel_safe(
                async || {
                    let Pipe { here, peer } = Pipe::silent();
                    (FramedWrite::new(here, LinesCodec::new()), peer, 0)
                },
                async |(framed, _, number)| {
                    framed.send(format!("line {number}")).await.unwrap();
                    *number += 1;
                },
                async |(framed, peer, _)| {
                    SinkExt::<String>::close(framed).await.unwrap();
                    heard(peer).await
                },
            )
        })
        .how("of a clone")
        .says(Says::NotSent)
        .instead(FEED)
        .note("As with `Framed`."),
        Row::tokio_util("Framed::feed", "codec/struct.Framed.html", || {
            on_paused_time(3).cancel_safe(
                async || {
                    let (mut framed, peer, number) = lines();
                    framed.set_backpressure_boundary(8);
                    (framed, peer, number)
                },
                async |(framed, _, number)| {
                    framed.feed(format!("line {number}")).await.unwrap();
                    *number += 1;
                },
                sent,
            )
        })
        .how("of a clone"),
        Row::tokio_util("Framed::flush", "codec/struct.Framed.html", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (mut framed, peer, number) = lines();
                    for line in ["alpha", "beta", "gamma"] {
                        framed.feed(line.to_owned()).await.unwrap();
                    }
                    (framed, peer, number)
                },
                async |(framed, _, _)| SinkExt::<String>::flush(framed).await.unwrap(),
                sent,
            )
        }),
    ]
}

/// Pieces of the text, each after a while.
fn pieces() -> impl Stream<Item = io::Result<Bytes>> + Unpin {
    Box::pin(stream::iter(TEXT.chunks(3)).then(async |piece| {
        yield_now().await;
        Ok(Bytes::from_static(piece))
    }))
}

pub(crate) fn bridges() -> Vec<Row> {
    vec![
        Row::tokio_util("StreamReader::read", "io/struct.StreamReader.html", || {
            on_paused_time(1).cancel_safe(
                async || (StreamReader::new(pieces()), Vec::<u8>::new()),
                async |(reader, read)| {
                    while read.len() < TEXT.len() {
                        let mut buffer = [0; 5];
                        let bytes = reader.read(&mut buffer).await.unwrap();
                        read.extend(&buffer[..bytes]);
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::tokio_util("ReaderStream::next", "io/struct.ReaderStream.html", || {
            on_paused_time(1).cancel_safe(
                async || (ReaderStream::new(Pipe::sending(TEXT).here), Vec::new()),
                async |(stream, read)| {
                    // How much comes at once depends on when it is polled.
                    while read.len() < TEXT.len() {
                        read.extend(stream.next().await.unwrap().unwrap());
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::tokio_util("SinkWriter::write", "io/struct.SinkWriter.html", || {
            on_paused_time(3).cancel_safe(
                async || {
                    let (send, received) = full_channel(4);
                    let sink = PollSender::new(send).sink_map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe));
                    let sink = sink.with(|bytes: Bytes| future::ready(io::Result::Ok(u32::from(bytes[0]))));
                    (SinkWriter::new(CopyToBytes::new(sink)), received, 1)
                },
                async |(writer, _, number)| {
                    let written = writer.write(&[*number]).await.unwrap();
                    *number += 1;
                    written
                },
                async |(writer, received, _)| {
                    // A `with` keeps one message until then.
                    writer.flush().await.unwrap();
                    received.await.unwrap()
                },
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::tokio_util("PollSender::send", "sync/struct.PollSender.html", || {
            on_paused_time(2).cancel_safe(
                async || {
                    let (send, received) = full_channel(3);
                    (PollSender::new(send), received, 1)
                },
                async |(send, _, number)| {
                    send.send(*number).await.unwrap();
                    *number += 1;
                },
                async |(_, received, _)| received.await.unwrap(),
            )
        })
        .how("of a clone"),
    ]
}
