//! The fixtures on which the operations are called.
//!
//! Invariant: every fixture does the same in each run; what it waits for is a call, a peer or a timer, never a while.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::{self, Stream, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex, split};
use tokio::sync::{Notify, mpsc};
use tokio::task::{JoinHandle, yield_now};
use tokio::time::sleep;

/// The text that is read and written.
pub(crate) const TEXT: &[u8] = b"alpha\nbeta\ngamma\ndelta\n";

/// How long a holder holds what others wait for.
pub(crate) const HELD: Duration = Duration::from_millis(10);

/// The width of a pipe, in bytes: less than a number of 32 bits, so that no such number fits at once.
const WIDTH: usize = 3;

/// One end of a pipe, and what its peer receives.
#[derive(Debug)]
pub(crate) struct Pipe {
    pub(crate) here: DuplexStream,
    pub(crate) peer: JoinHandle<Vec<u8>>,
}

impl Pipe {
    /// The peer sends these bytes two at a time, and keeps its end open.
    pub(crate) fn sending(bytes: &'static [u8]) -> Self {
        Self::new(bytes, true)
    }

    /// The peer closes its end after the last byte.
    pub(crate) fn closing(bytes: &'static [u8]) -> Self {
        Self::new(bytes, false)
    }

    /// The peer only receives.
    pub(crate) fn silent() -> Self {
        Self::sending(b"")
    }

    fn new(bytes: &'static [u8], open: bool) -> Self {
        let (here, there) = duplex(WIDTH);
        let (mut receive, mut send) = split(there);
        drop(tokio::spawn(async move {
            for piece in bytes.chunks(2) {
                if send.write_all(piece).await.is_err() {
                    return;
                }
                yield_now().await;
            }
            if open {
                // An end of the stream would be an answer too.
                std::future::pending::<()>().await;
            }
            // A peer that has already gone does not mind.
            send.shutdown().await.unwrap_or_default();
        }));
        let peer = tokio::spawn(async move {
            let mut received = Vec::new();
            while receive.read_buf(&mut received).await.is_ok_and(|bytes| bytes > 0) {
                yield_now().await;
            }
            received
        });
        Self { here, peer }
    }

    /// What the peer has received once this end is closed.
    pub(crate) async fn received(&mut self) -> String {
        self.here.shutdown().await.unwrap();
        heard(&mut self.peer).await
    }
}

/// What a peer has received once the other end is closed.
pub(crate) async fn heard(peer: &mut JoinHandle<Vec<u8>>) -> String {
    text(&peer.await.unwrap())
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).replace('\n', " ").trim_end().to_owned()
}

/// A channel on which a task sends 0, 1, 2, … and then keeps silent.
pub(crate) fn channel(messages: u32) -> mpsc::Receiver<u32> {
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

/// The numbers 0, 1, 2, …, each after a while. Polled again after its end, it says again that it has ended, because a
/// call that was dropped there comes back.
pub(crate) fn numbers(count: u32) -> impl Stream<Item = u32> + Unpin {
    let numbers = stream::unfold(0, move |number| async move {
        yield_now().await;
        (number < count).then_some((number, number + 1))
    });
    Box::pin(numbers).fuse()
}

/// A full channel, and what its receiver gets from it, one message after each wait.
pub(crate) fn full_channel(messages: usize) -> (mpsc::Sender<u32>, JoinHandle<Vec<u32>>) {
    let (send, mut receive) = mpsc::channel(1);
    send.try_send(0).unwrap();
    let received = tokio::spawn(async move {
        let mut received = Vec::new();
        while received.len() < messages {
            sleep(HELD).await;
            received.extend(receive.recv().await);
        }
        received
    });
    (send, received)
}

/// Something that others wait for in turn: the rival asks for it after the call.
#[derive(Debug)]
pub(crate) struct Queue<R> {
    pub(crate) resource: Arc<R>,
    asked: Arc<Notify>,
    served: Arc<Mutex<Vec<&'static str>>>,
    rival: JoinHandle<()>,
}

impl<R: Send + Sync + 'static> Queue<R> {
    /// `rival` waits for the resource and gives it back.
    pub(crate) fn new<F>(resource: Arc<R>, rival: impl FnOnce(Arc<R>) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send,
    {
        let (asked, served) = (Arc::new(Notify::new()), Arc::new(Mutex::new(Vec::new())));
        let task = tokio::spawn({
            let (resource, asked, served) = (Arc::clone(&resource), Arc::clone(&asked), Arc::clone(&served));
            async move {
                asked.notified().await;
                rival(resource).await;
                served.lock().unwrap().push("rival");
            }
        });
        Self { resource, asked, served, rival: task }
    }

    /// The call waits for the resource.
    pub(crate) async fn call<T>(&self, wait: impl Future<Output = T>) {
        self.asked.notify_one();
        let _held = wait.await;
        self.served.lock().unwrap().push("call");
    }

    /// In which order they were served.
    pub(crate) async fn order(&mut self) -> String {
        (&mut self.rival).await.unwrap();
        self.served.lock().unwrap().join(", ")
    }
}

/// Keeps something for a while, so that others have to wait.
pub(crate) fn hold(guard: impl Send + 'static) {
    drop(tokio::spawn(async move {
        sleep(HELD).await;
        drop(guard);
    }));
}
