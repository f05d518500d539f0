//! crossfire's `send`, created and dropped without having been polled: is its message freed?

#[path = "../verdict.rs"]
mod verdict;

use std::future::Future;
use std::sync::Arc;

use cancel_safe_testing::Explore;
use crossfire::mpmc::Array;
use crossfire::{MAsyncRx, MAsyncTx};

struct Channel {
    sender: MAsyncTx<Array<Arc<()>>>,
    receiver: MAsyncRx<Array<Arc<()>>>,
    message: Arc<()>,
}

/// A function with a name, not an async closure: so the future exists at point 0, where nobody has polled it.
fn send(channel: &Channel) -> impl Future<Output = bool> {
    let sending = channel.sender.send(Arc::clone(&channel.message));
    async move { sending.await.is_ok() }
}

fn main() {
    let report = Explore::new().run(
        async || {
            let (sender, receiver) = crossfire::mpmc::bounded_async(1);
            Channel { sender, receiver, message: Arc::default() }
        },
        send,
        async |channel, _outcome| {
            while channel.receiver.try_recv().is_ok() {}
            match Arc::strong_count(&channel.message) {
                1 => Ok(()),
                _ => Err("the message is neither in the channel nor freed".to_owned()),
            }
        },
    );
    verdict::tell(&report);
}
