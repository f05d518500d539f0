//! A connection's stream that the server can close even after an upgrade has handed it on. Once it is severed, the
//! socket is closed, and every read and write fails.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

/// The end that may be handed on.
#[derive(Debug)]
pub(crate) struct Line<I>(Arc<Shared<I>>);

/// The end that stays: it severs the line when it is dropped.
#[derive(Debug)]
pub(crate) struct Hold<I>(Arc<Shared<I>>);

#[derive(Debug)]
struct Shared<I> {
    state: Mutex<State<I>>,
    released: Notify,
}

#[derive(Debug)]
struct State<I> {
    /// `None` when the line is severed or released.
    stream: Option<I>,
    /// The task that waits for the stream. Dropping a socket wakes no task.
    reader: Option<Waker>,
    writer: Option<Waker>,
    released: bool,
}

impl<I> Shared<I> {
    fn state(&self) -> MutexGuard<'_, State<I>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Splits a stream into the line and the hold on it.
pub(crate) fn line<I>(stream: I) -> (Line<I>, Hold<I>) {
    let state = State { stream: Some(stream), reader: None, writer: None, released: false };
    let shared = Arc::new(Shared { state: Mutex::new(state), released: Notify::new() });
    (Line(Arc::clone(&shared)), Hold(shared))
}

impl<I> Hold<I> {
    /// Returns whether the line has been dropped.
    pub(crate) fn is_released(&self) -> bool {
        self.0.state().released
    }

    /// Waits until the line has been dropped.
    pub(crate) async fn released(&self) {
        // `Notify` stores one permit, so a release before this call is not missed; and there is only one waiter.
        while !self.is_released() {
            self.0.released.notified().await;
        }
    }
}

impl<I> Drop for Hold<I> {
    fn drop(&mut self) {
        let (stream, wakers) = {
            let mut state = self.0.state();
            (state.stream.take(), [state.reader.take(), state.writer.take()])
        };
        drop(stream);
        wakers.into_iter().flatten().for_each(Waker::wake);
    }
}

impl<I> Drop for Line<I> {
    fn drop(&mut self) {
        let stream = {
            let mut state = self.0.state();
            state.released = true;
            state.stream.take()
        };
        // Before the release is announced, so that the socket is closed by then.
        drop(stream);
        self.0.released.notify_one();
    }
}

fn severed() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the connection's time was over")
}

/// Remembers the task to wake.
fn park(place: &mut Option<Waker>, cx: &Context<'_>) {
    if !place.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
        *place = Some(cx.waker().clone());
    }
}

impl<I: Unpin> Line<I> {
    fn write<R>(
        &self,
        cx: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut I>, &mut Context<'_>) -> Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        let mut state = self.0.state();
        let Some(stream) = &mut state.stream else { return Poll::Ready(Err(severed())) };
        let polled = write(Pin::new(stream), cx);
        if polled.is_pending() {
            park(&mut state.writer, cx);
        }
        polled
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Line<I> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.state();
        let Some(stream) = &mut state.stream else { return Poll::Ready(Err(severed())) };
        let polled = Pin::new(stream).poll_read(cx, buf);
        if polled.is_pending() {
            park(&mut state.reader, cx);
        }
        polled
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Line<I> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, |stream, cx| stream.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.0.state().stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |stream, cx| stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.write(cx, |stream, cx| stream.poll_shutdown(cx))
    }
}
