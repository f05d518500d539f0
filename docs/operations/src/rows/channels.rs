//! Channels of tokio: sending and receiving.
//!
//! Invariant: a call takes the message that it consumes from the state, as a caller would have to.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::fixtures::{HELD, Queue, channel, full_channel};
use crate::row::{Row, Says, on_paused_time};

pub(crate) fn mpsc() -> Vec<Row> {
    vec![
        Row::tokio("mpsc::Receiver::recv", "sync/mpsc/struct.Receiver.html#method.recv", || {
            on_paused_time(4).cancel_safe(async || channel(4), async |receive| receive.recv().await, async |_| ())
        })
        .says(Says::Safe),
        Row::tokio("mpsc::Receiver::recv_many", "sync/mpsc/struct.Receiver.html#method.recv_many", || {
            on_paused_time(1).cancel_safe(
                async || (channel(4), Vec::new()),
                async |(receive, all)| {
                    while all.len() < 4 {
                        receive.recv_many(all, 2).await;
                    }
                    all.clone()
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("mpsc::Receiver::recv", "sync/mpsc/struct.Receiver.html#method.recv", || {
            on_paused_time(2).cancel_safe(
                async || channel(4),
                async |receive| (receive.recv().await, receive.recv().await),
                async |_| (),
            )
        })
        .how("twice in one function")
        .instead("keep the first message in `self`, or `recv_many`")
        .note(
            "Each `recv` is cancel safe, as documented. A function that awaits two of them is not, because the first \
             message is in a local variable when the second is waited for. Cancel safety does not add up.",
        ),
        Row::tokio("mpsc::Sender::send", "sync/mpsc/struct.Sender.html#method.send", || {
            on_paused_time(2).cancel_safe(
                async || (full_channel(3), VecDeque::from([1, 2])),
                async |((send, _), messages)| {
                    // The message is moved, as a message that cannot be cloned has to be.
                    let Some(message) = messages.pop_front() else { return };
                    send.send(message).await.unwrap();
                },
                async |((send, received), _)| {
                    // Ends the wait for a message that was lost.
                    for _ in 0..2 {
                        send.send(99).await.unwrap_or_default();
                    }
                    received.await.unwrap()
                },
            )
        })
        .how("of a message that is moved")
        .says(Says::NotSafe)
        .instead("`reserve`, then `Permit::send`"),
        Row::tokio("mpsc::Sender::send", "sync/mpsc/struct.Sender.html#method.send", || {
            on_paused_time(2).cancel_safe(
                async || (full_channel(3), 1),
                async |((send, _), message)| {
                    send.send(*message).await.unwrap();
                    *message += 1;
                },
                async |((_, received), _)| received.await.unwrap(),
            )
        })
        .how("of a clone")
        .says(Says::NotSent),
        Row::tokio("mpsc::Sender::reserve", "sync/mpsc/struct.Sender.html#method.reserve", || {
            on_paused_time(2).cancel_safe(
                async || (full_channel(3), VecDeque::from([1, 2])),
                async |((send, _), messages)| {
                    let permit = send.reserve().await.unwrap();
                    permit.send(messages.pop_front().unwrap());
                },
                async |((_, received), _)| received.await.unwrap(),
            )
        })
        .how("then `Permit::send`, with no other sender")
        .says(Says::Place)
        .note("With no other sender there is no place to lose; the message stays with the caller until there is room."),
        Row::tokio("mpsc::Sender::reserve", "sync/mpsc/struct.Sender.html#method.reserve", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (send, mut receive) = mpsc::channel::<u32>(1);
                    send.try_send(0).unwrap();
                    drop(tokio::spawn(async move {
                        sleep(HELD).await;
                        receive.recv().await;
                        // A closed channel would serve everybody.
                        std::future::pending::<()>().await;
                    }));
                    Queue::new(Arc::new(send), async |send| drop(send.reserve().await))
                },
                async |queue| queue.call(queue.resource.reserve()).await,
                Queue::order,
            )
        })
        .how("with a rival")
        .says(Says::Place)
        .instead("keep the future, and poll it by reference"),
        Row::tokio("mpsc::Sender::closed", "sync/mpsc/struct.Sender.html#method.closed", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (send, receive) = mpsc::channel::<u32>(1);
                    crate::fixtures::hold(receive);
                    send
                },
                async |send| send.closed().await,
                async |send| send.is_closed(),
            )
        })
        .says(Says::Safe),
        Row::tokio("mpsc::UnboundedReceiver::recv", "sync/mpsc/struct.UnboundedReceiver.html#method.recv", || {
            on_paused_time(4).cancel_safe(
                async || {
                    let (send, receive) = mpsc::unbounded_channel();
                    drop(tokio::spawn(async move {
                        for number in 0..4 {
                            yield_now().await;
                            send.send(number).unwrap();
                        }
                        std::future::pending::<()>().await;
                    }));
                    receive
                },
                async |receive| receive.recv().await,
                async |_| (),
            )
        })
        .says(Says::Safe),
    ]
}

pub(crate) fn others() -> Vec<Row> {
    vec![
        Row::tokio("oneshot::Receiver", "sync/oneshot/struct.Receiver.html#cancel-safety", || {
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
        .how("polled by reference")
        .says(Says::Safe),
        Row::tokio("oneshot::Sender::closed", "sync/oneshot/struct.Sender.html#method.closed", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (send, receive) = oneshot::channel::<u32>();
                    crate::fixtures::hold(receive);
                    send
                },
                async |send| send.closed().await,
                async |send| send.is_closed(),
            )
        }),
        Row::tokio("broadcast::Receiver::recv", "sync/broadcast/struct.Receiver.html#method.recv", || {
            on_paused_time(4).cancel_safe(
                async || {
                    let (send, receive) = broadcast::channel(8);
                    drop(tokio::spawn(async move {
                        for number in 0..4 {
                            send.send(number).unwrap();
                            yield_now().await;
                        }
                        std::future::pending::<()>().await;
                    }));
                    receive
                },
                async |receive| receive.recv().await,
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("watch::Receiver::changed", "sync/watch/struct.Receiver.html#method.changed", || {
            on_paused_time(1).cancel_safe(
                async || watched(1),
                async |receive| {
                    receive.changed().await.unwrap();
                    *receive.borrow_and_update()
                },
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("watch::Receiver::wait_for", "sync/watch/struct.Receiver.html#method.wait_for", || {
            on_paused_time(1).cancel_safe(
                async || watched(3),
                async |receive| *receive.wait_for(|value| *value == 3).await.unwrap(),
                async |_| (),
            )
        })
        .says(Says::Safe),
        Row::tokio("watch::Sender::closed", "sync/watch/struct.Sender.html#method.closed", || {
            on_paused_time(1).cancel_safe(
                async || {
                    let (send, receive) = watch::channel(0);
                    crate::fixtures::hold(receive);
                    send
                },
                async |send| send.closed().await,
                async |send| send.is_closed(),
            )
        })
        .says(Says::Safe),
    ]
}

/// A value that is raised from 0 to `last`.
fn watched(last: u32) -> watch::Receiver<u32> {
    let (send, receive) = watch::channel(0);
    drop(tokio::spawn(async move {
        for value in 1..=last {
            sleep(HELD).await;
            send.send(value).unwrap();
        }
        std::future::pending::<()>().await;
    }));
    receive
}
