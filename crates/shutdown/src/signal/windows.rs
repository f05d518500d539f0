//! The events of a Windows console. Ctrl-C is SIGINT; Ctrl-Break and the ends of the console, of the session and of the
//! system are SIGTERM. Invariant: once the handlers are installed, no event ends the process by its default action
//! while an application runs; after one of the latter three, the system itself ends it within seconds.

use std::convert::Infallible;
use std::io;
use std::task::{Context, Poll, Waker};

use tokio::signal::windows::{
    CtrlBreak, CtrlC, CtrlClose, CtrlLogoff, CtrlShutdown, ctrl_break, ctrl_c, ctrl_close, ctrl_logoff, ctrl_shutdown,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Forward, INTERRUPT, Signal, TERMINATE};
use crate::clock::{Alarm, drive};

/// The installed handlers. Events that arrive before [`Signals::forward`] are kept for it.
#[derive(Debug)]
pub(crate) struct Signals {
    interrupt: CtrlC,
    r#break: CtrlBreak,
    close: CtrlClose,
    logoff: CtrlLogoff,
    shutdown: CtrlShutdown,
}

/// Ends the thread that forwards events when it is dropped.
#[derive(Debug)]
pub(crate) struct Forwarding {
    _over: DropGuard,
}

impl Signals {
    pub(crate) fn install() -> io::Result<Self> {
        Ok(Self {
            interrupt: ctrl_c()?,
            r#break: ctrl_break()?,
            close: ctrl_close()?,
            logoff: ctrl_logoff()?,
            shutdown: ctrl_shutdown()?,
        })
    }

    pub(crate) fn add(&self, _signals: impl Iterator<Item = Signal>) -> io::Result<()> {
        Ok(())
    }

    /// An event that has already arrived is the first, and is forwarded before this returns.
    pub(crate) fn forward<F, S, O>(mut self, mut forward: Forward<F, S, O>) -> io::Result<Forwarding>
    where
        F: FnOnce(i32) + Send + 'static,
        S: FnMut(i32) + Send + 'static,
        O: FnMut(Signal) + Send + 'static,
    {
        // Every event stops the application.
        let _never = &forward.other;
        let over = CancellationToken::new();
        let guard = over.clone().drop_guard();
        while let Poll::Ready(number) = self.poll(&mut Context::from_waker(Waker::noop())) {
            forward.kept(number);
        }
        let listen = async move {
            loop {
                forward.stops(std::future::poll_fn(|cx| self.poll(cx)).await);
            }
        };
        let listen = move || {
            let _over: Option<Infallible> = drive(&Alarm::default(), over.run_until_cancelled_owned(listen), || None);
        };
        std::thread::Builder::new().name("shutdown-signals".to_owned()).spawn(listen)?;
        Ok(Forwarding { _over: guard })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<i32> {
        // All of them are polled, so that each can wake this task. They never end, so they never yield `None`.
        let terminated = [
            self.r#break.poll_recv(cx).is_ready(),
            self.close.poll_recv(cx).is_ready(),
            self.logoff.poll_recv(cx).is_ready(),
            self.shutdown.poll_recv(cx).is_ready(),
        ];
        match self.interrupt.poll_recv(cx) {
            Poll::Ready(_) => Poll::Ready(INTERRUPT),
            Poll::Pending if terminated.contains(&true) => Poll::Ready(TERMINATE),
            Poll::Pending => Poll::Pending,
        }
    }
}
