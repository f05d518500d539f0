//! kanal's `recv`, dropped after a message was handed to it: is the message still there?

#[path = "../verdict.rs"]
mod verdict;

use std::cell::Cell;

use cancel_safe_testing::Explore;
use futures_util::join;
use kanal::{AsyncReceiver, AsyncSender};
use tokio::task::yield_now;

struct Channel {
    sender: AsyncSender<u32>,
    receiver: AsyncReceiver<u32>,
    sent: Cell<bool>,
}

fn main() {
    let report = Explore::new().run(
        async || {
            let (sender, receiver) = kanal::bounded_async(1);
            Channel { sender, receiver, sent: Cell::new(false) }
        },
        async |channel| {
            let send = async {
                yield_now().await;
                channel.sender.send(7).await.expect("the receiver is alive");
                channel.sent.set(true);
            };
            let (received, ()) = join!(channel.receiver.recv(), send);
            received.is_ok()
        },
        async |channel, outcome| match channel.receiver.try_recv() {
            Ok(None) if channel.sent.get() && outcome.is_dropped() => {
                Err("the message was sent, and is neither received nor in the channel".to_owned())
            }
            _ => Ok(()),
        },
    );
    verdict::tell(&report);
}
