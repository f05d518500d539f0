//! Streams of futures, and their adaptors and consumers.
//!
//! Invariant: an adaptor that keeps something lives in the state; each call creates a future that keeps something anew.

use std::pin::Pin;

use futures_util::stream::{self, FuturesOrdered, FuturesUnordered};
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use tokio::task::yield_now;

use crate::fixtures::numbers;
use crate::row::{From, Row, SELECT, Says, on_paused_time};

const KEPT: &str = "`next` in a loop, with the result in a variable that outlives the call";

async fn slow(number: u32) -> u32 {
    for _ in 0..number % 3 {
        yield_now().await;
    }
    number
}

pub(crate) fn adaptors() -> Vec<Row> {
    vec![
        Row::futures("StreamExt::next", "stream/trait.StreamExt.html#method.next", || {
            on_paused_time(4).cancel_safe(async || numbers(4), async |stream| stream.next().await, async |_| ())
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("TryStreamExt::try_next", "stream/trait.TryStreamExt.html#method.try_next", || {
            on_paused_time(4).cancel_safe(
                async || numbers(4).map(Ok::<_, ()>),
                async |stream| stream.try_next().await,
                async |_| (),
            )
        }),
        Row::futures("StreamExt::then", "stream/trait.StreamExt.html#method.then", || {
            on_paused_time(4).cancel_safe(
                async || Box::pin(numbers(4).then(slow)),
                async |stream| stream.next().await,
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("StreamExt::chunks", "stream/trait.StreamExt.html#method.chunks", || {
            on_paused_time(2).cancel_safe(
                async || Box::pin(numbers(6).chunks(3)),
                async |stream| stream.next().await,
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("StreamExt::chunks", "stream/trait.StreamExt.html#method.chunks", || {
            on_paused_time(2).cancel_safe(
                async || numbers(6),
                async |stream| stream.chunks(3).next().await,
                async |_| (),
            )
        })
        .how("a new one for each call")
        .instead("an adaptor that outlives the call"),
        Row::futures("StreamExt::ready_chunks", "stream/trait.StreamExt.html#method.ready_chunks", || {
            on_paused_time(1).cancel_safe(
                async || (Box::pin(numbers(3).ready_chunks(2)), Vec::new()),
                async |(stream, all)| {
                    // How many come at once depends on when they are polled.
                    while let Some(chunk) = stream.next().await {
                        all.extend(chunk);
                    }
                    all.clone()
                },
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("StreamExt::buffered", "stream/trait.StreamExt.html#method.buffered", || {
            on_paused_time(4).cancel_safe(
                async || Box::pin(numbers(4).map(slow).buffered(2)),
                async |stream| stream.next().await,
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("StreamExt::buffer_unordered", "stream/trait.StreamExt.html#method.buffer_unordered", || {
            on_paused_time(1).cancel_safe(
                async || (Box::pin(numbers(4).map(slow).buffer_unordered(2)), Vec::new()),
                async |(stream, all)| {
                    while let Some(number) = stream.next().await {
                        all.push(number);
                    }
                    all.sort_unstable();
                    all.clone()
                },
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("stream::select", "stream/fn.select.html", || {
            on_paused_time(1).cancel_safe(
                async || (stream::select(numbers(3), numbers(2).map(|number| 10 + number)), Vec::new()),
                async |(stream, all)| {
                    while let Some(number) = stream.next().await {
                        all.push(number);
                    }
                    all.sort_unstable();
                    all.clone()
                },
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("StreamExt::zip", "stream/trait.StreamExt.html#method.zip", || {
            on_paused_time(3).cancel_safe(
                async || numbers(3).zip(Box::pin(numbers(3).then(slow))),
                async |stream| stream.next().await,
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("Peekable::peek", "stream/struct.Peekable.html#method.peek", || {
            on_paused_time(3).cancel_safe(
                async || Box::pin(numbers(3).peekable()),
                async |stream| {
                    let peeked = stream.as_mut().peek().await.copied();
                    (peeked, next_ready(stream.as_mut()).await)
                },
                async |_| (),
            )
        }),
        Row::futures("FuturesUnordered::next", "stream/struct.FuturesUnordered.html", || {
            on_paused_time(3).cancel_safe(
                async || [2, 1, 3].map(slow).into_iter().collect::<FuturesUnordered<_>>(),
                async |set| set.next().await,
                async |_| (),
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures("FuturesOrdered::next", "stream/struct.FuturesOrdered.html", || {
            on_paused_time(3).cancel_safe(
                async || [2, 1, 3].map(slow).into_iter().collect::<FuturesOrdered<_>>(),
                async |set| set.next().await,
                async |_| (),
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
    ]
}

/// The item that was peeked at, without an await that could be dropped.
async fn next_ready(mut stream: Pin<&mut impl Stream<Item = u32>>) -> Option<u32> {
    futures_util::future::poll_immediate(stream.next()).await.flatten()
}

pub(crate) fn consumers() -> Vec<Row> {
    vec![
        Row::futures("StreamExt::for_each", "stream/trait.StreamExt.html#method.for_each", || {
            on_paused_time(1).cancel_safe(
                async || (numbers(4), std::cell::RefCell::new(Vec::new())),
                async |(stream, seen)| {
                    let each = async |number| {
                        yield_now().await;
                        seen.borrow_mut().push(number);
                    };
                    stream.for_each(each).await;
                },
                async |(_, seen)| seen.take(),
            )
        })
        .how("with an await in its body")
        .instead("`next` in a loop, and nothing awaited between `next` and the end of the work; or spawn it"),
        Row::futures(
            "StreamExt::for_each_concurrent",
            "stream/trait.StreamExt.html#method.for_each_concurrent",
            || {
                on_paused_time(1).cancel_safe(
                    async || (numbers(4), std::cell::RefCell::new(Vec::new())),
                    async |(stream, seen)| {
                        let each = async |number| {
                            yield_now().await;
                            seen.borrow_mut().push(number);
                        };
                        stream.for_each_concurrent(2, each).await;
                    },
                    async |(_, seen)| seen.take(),
                )
            },
        )
        .instead("`map` and `buffer_unordered` kept outside, with `next` in a loop; or spawn it"),
        Row::futures("StreamExt::collect", "stream/trait.StreamExt.html#method.collect", || {
            on_paused_time(1).cancel_safe(
                async || numbers(4),
                async |stream| stream.collect::<Vec<_>>().await,
                async |_| (),
            )
        })
        .instead(KEPT),
        Row::futures("StreamExt::fold", "stream/trait.StreamExt.html#method.fold", || {
            on_paused_time(1).cancel_safe(
                async || numbers(4),
                async |stream| stream.fold(0, async |sum, number| sum + number).await,
                async |_| (),
            )
        })
        .instead(KEPT),
        Row::futures("StreamExt::count", "stream/trait.StreamExt.html#method.count", || {
            on_paused_time(1).cancel_safe(async || numbers(4), async |stream| stream.count().await, async |_| ())
        })
        .instead(KEPT),
    ]
}
