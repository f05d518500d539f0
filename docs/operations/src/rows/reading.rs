//! Reading data that arrives in pieces.
//!
//! Invariant: a buffer that the documentation lets the caller keep is kept in the state.

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};

use crate::fixtures::{Pipe, TEXT, text};
use crate::row::{From, Row, SELECT, Says, on_paused_time};

pub(crate) fn unbuffered() -> Vec<Row> {
    vec![
        Row::tokio("AsyncReadExt::read", "io/trait.AsyncReadExt.html#method.read", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::sending(TEXT), Vec::<u8>::new()),
                async |(pipe, read)| {
                    while read.len() < TEXT.len() {
                        let mut buffer = [0; 5];
                        let bytes = pipe.here.read(&mut buffer).await.unwrap();
                        read.extend(&buffer[..bytes]);
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("AsyncReadExt::read_buf", "io/trait.AsyncReadExt.html#method.read_buf", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::sending(TEXT), Vec::<u8>::new()),
                async |(pipe, read)| {
                    while read.len() < TEXT.len() {
                        pipe.here.read_buf(read).await.unwrap();
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("AsyncReadExt::read_exact", "io/trait.AsyncReadExt.html#method.read_exact", || {
            on_paused_time(4).cancel_safe(
                async || Pipe::sending(TEXT),
                async |pipe| {
                    let mut buffer = [0; 5];
                    pipe.here.read_exact(&mut buffer).await.map(|_| text(&buffer)).unwrap()
                },
                async |_| (),
            )
        })
        .says(Says::NotSafe)
        .instead("`read_buf` into a buffer that outlives the call, until it is long enough; `FramedRead`"),
        Row::tokio("AsyncReadExt::read_to_end", "io/trait.AsyncReadExt.html#method.read_to_end", || {
            on_paused_time(1).cancel_safe(
                async || Pipe::closing(TEXT),
                async |pipe| {
                    let mut read = Vec::new();
                    pipe.here.read_to_end(&mut read).await.unwrap();
                    text(&read)
                },
                async |_| (),
            )
        })
        .how("into a new buffer")
        .said_at(Says::NotSafe, From::Tokio, SELECT)
        .instead("the same, into a buffer that outlives the call"),
        Row::tokio("AsyncReadExt::read_to_end", "io/trait.AsyncReadExt.html#method.read_to_end", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::closing(TEXT), Vec::new()),
                async |(pipe, read)| {
                    pipe.here.read_to_end(read).await.unwrap();
                    text(read)
                },
                async |_| (),
            )
        })
        .how("into a buffer that is kept")
        .said_at(Says::NotSafe, From::Tokio, SELECT)
        .note(
            "What was read is in the buffer, and a second call appends the rest, as a second call of `read_until` \
             does. Only the count that the call returns starts again. The list of `select!` makes no difference \
             between a buffer that is kept and one that is dropped with the call; the page of the method says nothing, \
             so this is today's behaviour, not a promise.",
        ),
        Row::tokio("AsyncReadExt::read_to_string", "io/trait.AsyncReadExt.html#method.read_to_string", || {
            on_paused_time(1).cancel_safe(
                async || (Pipe::closing(TEXT), String::new()),
                async |(pipe, read)| {
                    pipe.here.read_to_string(read).await.unwrap();
                    text(read.as_bytes())
                },
                async |_| (),
            )
        })
        .how("into a buffer that is kept")
        .said_at(Says::NotSafe, From::Tokio, SELECT)
        .instead("`read_to_end` into a buffer that outlives the call, then `String::from_utf8`"),
        Row::tokio("AsyncReadExt::read_u8", "io/trait.AsyncReadExt.html#method.read_u8", || {
            on_paused_time(5).cancel_safe(
                async || Pipe::sending(TEXT),
                async |pipe| char::from(pipe.here.read_u8().await.unwrap()),
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("AsyncReadExt::read_u32", "io/trait.AsyncReadExt.html#method.read_u32", || {
            on_paused_time(4).cancel_safe(
                async || Pipe::sending(TEXT),
                async |pipe| text(&pipe.here.read_u32().await.unwrap().to_be_bytes()),
                async |_| (),
            )
        })
        .says(Says::NotSafe)
        .note("Its pages say the same of all numbers of two bytes and more.")
        .instead("`read_buf` until four bytes are there, then `Buf::get_u32`"),
    ]
}

pub(crate) fn buffered() -> Vec<Row> {
    vec![
        Row::tokio("AsyncBufReadExt::fill_buf", "io/trait.AsyncBufReadExt.html#method.fill_buf", || {
            on_paused_time(1).cancel_safe(
                async || (BufReader::new(Pipe::sending(TEXT).here), Vec::new()),
                async |(reader, read)| {
                    while read.len() < TEXT.len() {
                        let bytes = reader.fill_buf().await.unwrap();
                        read.extend(bytes);
                        let bytes = bytes.len();
                        reader.consume(bytes);
                    }
                    text(read)
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("AsyncBufReadExt::read_until", "io/trait.AsyncBufReadExt.html#method.read_until", || {
            on_paused_time(4).cancel_safe(
                async || (BufReader::new(Pipe::sending(TEXT).here), Vec::new()),
                async |(reader, line)| {
                    reader.read_until(b'\n', line).await.unwrap();
                    text(&std::mem::take(line))
                },
                async |_| (),
            )
        })
        .how("into a buffer that is kept")
        .says(Says::Safe)
        .note("It returns only the count of the last call, as its page says: look at the buffer instead."),
        Row::tokio("AsyncBufReadExt::read_line", "io/trait.AsyncBufReadExt.html#method.read_line", || {
            on_paused_time(4).cancel_safe(
                async || (BufReader::new(Pipe::sending(TEXT).here), String::new()),
                async |(reader, line)| {
                    reader.read_line(line).await.unwrap();
                    text(std::mem::take(line).as_bytes())
                },
                async |_| (),
            )
        })
        .how("into a buffer that is kept")
        .says(Says::NotSafe)
        .instead("`lines().next_line()` with a `Lines` that outlives the call, or `read_until`"),
        Row::tokio("Lines::next_line", "io/struct.Lines.html#method.next_line", || {
            on_paused_time(4).cancel_safe(
                async || BufReader::new(Pipe::sending(TEXT).here).lines(),
                async |lines| lines.next_line().await.unwrap(),
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("Split::next_segment", "io/struct.Split.html#method.next_segment", || {
            on_paused_time(4).cancel_safe(
                async || BufReader::new(Pipe::sending(TEXT).here).split(b'\n'),
                async |pieces| pieces.next_segment().await.unwrap().map(|piece| text(&piece)),
                async |_| (),
            )
        }),
    ]
}
