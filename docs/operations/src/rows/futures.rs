//! Sinks, channels and combinators of futures.
//!
//! Invariant: each call creates the futures that it joins or selects, unless the row says that they are kept.

use std::pin::Pin;
use std::sync::Arc;

use futures_channel::{mpsc, oneshot};
use futures_util::future::{self, BoxFuture, Shared};
use futures_util::lock::Mutex;
use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _, stream};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::fixtures::{HELD, Queue, channel, hold, numbers};
use crate::row::{From, Row, SELECT, Says, on_paused_time};

/// A channel with room for one message, and what its receiver gets in the end.
fn narrow() -> (mpsc::Sender<u32>, JoinHandle<Vec<u32>>) {
    let (send, mut receive) = mpsc::channel(0);
    let received = tokio::spawn(async move {
        let mut received = Vec::new();
        loop {
            sleep(HELD).await;
            let Some(message) = receive.next().await else { return received };
            received.push(message);
        }
    });
    (send, received)
}

async fn received((send, received, _): &mut (mpsc::Sender<u32>, JoinHandle<Vec<u32>>, u32)) -> Vec<u32> {
    send.close_channel();
    received.await.unwrap()
}

fn numbered() -> (mpsc::Sender<u32>, JoinHandle<Vec<u32>>, u32) {
    let (send, received) = narrow();
    (send, received, 0)
}

pub(crate) fn sinks() -> Vec<Row> {
    vec![
        Row::futures("SinkExt::send", "sink/trait.SinkExt.html#method.send", || {
            on_paused_time(3).cancel_safe(
                async || numbered(),
                async |(send, _, number)| {
                    send.send(*number).await.unwrap();
                    *number += 1;
                },
                received,
            )
        })
        .how("of a clone, into a `futures_channel::mpsc`")
        .instead("`feed`; or `poll_ready`, then `start_send`")
        .note("As with `Framed`: `send` waits for the flush after the message has gone, and a retry sends it twice."),
        Row::futures("SinkExt::feed", "sink/trait.SinkExt.html#method.feed", || {
            on_paused_time(3).cancel_safe(
                async || numbered(),
                async |(send, _, number)| {
                    send.feed(*number).await.unwrap();
                    *number += 1;
                },
                received,
            )
        })
        .how("of a clone, into a `futures_channel::mpsc`"),
        Row::futures("SinkExt::flush", "sink/trait.SinkExt.html#method.flush", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (mut send, received, number) = numbered();
                    send.feed(7).await.unwrap();
                    (send, received, number)
                },
                async |(send, _, _)| send.flush().await.unwrap(),
                received,
            )
        })
        .how("of a `futures_channel::mpsc`"),
        Row::futures("SinkExt::send_all", "sink/trait.SinkExt.html#method.send_all", || {
            on_paused_time(1).cancel_safe(
                async || (numbered(), numbers(4).map(Ok)),
                async |((send, _, _), numbers)| send.send_all(numbers).await.unwrap(),
                async |(channel, _)| received(channel).await,
            )
        })
        .instead("`next`, then `feed`, with the message in a variable that outlives the call"),
        Row::futures("StreamExt::forward", "stream/trait.StreamExt.html#method.forward", || {
            on_paused_time(1).cancel_safe(
                async || (numbered(), numbers(4).map(Ok)),
                async |((send, _, _), numbers)| numbers.forward(send.clone()).await.unwrap(),
                async |(channel, _)| received(channel).await,
            )
        })
        .instead("spawn it, or keep the future and poll it by reference"),
        Row::futures_channel("mpsc::Receiver::next", "mpsc/struct.Receiver.html", || {
            on_paused_time(4).cancel_safe(
                async || {
                    let (mut send, receive) = mpsc::channel(0);
                    drop(tokio::spawn(async move {
                        for number in 0..4 {
                            send.feed(number).await.unwrap();
                        }
                        future::pending::<()>().await;
                    }));
                    receive
                },
                async |receive| receive.next().await,
                async |_| (),
            )
        })
        .said_at(Says::Safe, From::Tokio, SELECT),
        Row::futures_channel("oneshot::Receiver", "oneshot/struct.Receiver.html", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (send, receive) = oneshot::channel();
                    drop(tokio::spawn(async move {
                        sleep(HELD).await;
                        send.send("sent").unwrap();
                    }));
                    (receive,)
                },
                async |(receive,)| receive.await.unwrap(),
                async |_| (),
            )
        })
        .how("polled by reference"),
    ]
}

pub(crate) fn combinators() -> Vec<Row> {
    vec![
        Row::futures("future::join", "future/fn.join.html", || {
            on_paused_time(2).cancel_safe(
                async || (channel(2), channel(2)),
                async |(one, other)| future::join(one.recv(), other.recv()).await,
                async |_| (),
            )
        })
        .how("of two `recv`")
        .instead("keep the joined future, and poll it by reference; `select!` over both in a loop"),
        Row::futures("future::try_join", "future/fn.try_join.html", || {
            on_paused_time(2).cancel_safe(
                async || (channel(2), channel(2)),
                async |(one, other)| {
                    let (one, other) = (one.recv().map(Ok::<_, ()>), other.recv().map(Ok));
                    future::try_join(one, other).await
                },
                async |_| (),
            )
        })
        .how("of two `recv`")
        .instead("as for `join`"),
        Row::tokio("join!", "macro.join.html", || {
            on_paused_time(2).cancel_safe(
                async || (channel(2), channel(2)),
                async |(one, other)| tokio::join!(one.recv(), other.recv()),
                async |_| (),
            )
        })
        .how("of two `recv`")
        .instead("as for `future::join`"),
        Row::futures("future::select", "future/fn.select.html", || {
            on_paused_time(1).cancel_safe(
                async || (channel(2), channel(2), Vec::new()),
                async |(one, other, all)| {
                    while all.len() < 4 {
                        let (one, other) = (Box::pin(one.recv()), Box::pin(other.recv()));
                        all.extend(future::select(one, other).await.factor_first().0);
                    }
                    all.sort_unstable();
                    all.clone()
                },
                async |_| (),
            )
        })
        .how("of two `recv`"),
        Row::futures("future::select_all", "future/fn.select_all.html", || {
            on_paused_time(3).cancel_safe(
                async || Vec::from([3, 1, 2].map(after)),
                async |futures: &mut Vec<Later>| {
                    let (number, index, _) = future::select_all(futures.iter_mut()).await;
                    drop(futures.remove(index));
                    number
                },
                async |_| (),
            )
        })
        .how("of futures that are kept"),
        Row::futures("FutureExt::shared", "future/trait.FutureExt.html#method.shared", || {
            on_paused_time(1).cancel_safe(
                async || after(1).boxed().shared(),
                async |shared: &mut Shared<BoxFuture<'static, u32>>| shared.clone().await,
                async |_| (),
            )
        })
        .how("a clone for each call, and one that is kept"),
        Row::futures("stream::unfold", "stream/fn.unfold.html", || {
            on_paused_time(4).cancel_safe(
                async || {
                    Box::pin(stream::unfold(channel(4), async |mut receive| {
                        let first = receive.recv().await?;
                        sleep(HELD).await;
                        Some((first, receive))
                    }))
                },
                async |stream| stream.next().await,
                async |_| (),
            )
        })
        .how("then `next`")
        .said_at(Says::Safe, From::Tokio, SELECT)
        .note(
            "The stream keeps the future of its step, so that even a step with two awaits is resumed, not begun again.",
        ),
        Row::futures("lock::Mutex::lock", "lock/struct.Mutex.html#method.lock", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let mutex = Arc::new(Mutex::new(()));
                    hold(Arc::clone(&mutex).lock_owned().await);
                    Queue::new(mutex, async |mutex| drop(mutex.lock().await))
                },
                async |queue| queue.call(queue.resource.lock()).await,
                Queue::order,
            )
        })
        .instead("keep the future, and poll it by reference")
        .note("Only the place in the queue is lost."),
    ]
}

type Later = Pin<Box<dyn Future<Output = u32> + Send>>;

/// A number, after as many turns as it says.
fn after(number: u32) -> Later {
    Box::pin(async move {
        sleep(HELD * number).await;
        number
    })
}
