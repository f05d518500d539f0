//! What an application does on signals that do not stop it: it runs the user's actions, or lists what is alive. Actions
//! run on their own thread, so a hanging action keeps no signal from stopping the application.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use tokio_util::sync::CancellationToken;

use crate::panics::catch;
use crate::signal::Signal;
use crate::state::Core;
use crate::state::voice::print;
use crate::tree::{SAMPLE, Seen, list};

pub(crate) type Action = Box<dyn FnMut(SignalContext) + Send>;

/// What an [action](crate::Application::on_signal) knows about the signal and its application.
#[derive(Clone)]
pub struct SignalContext {
    core: Arc<Core>,
    signal: Signal,
}

impl SignalContext {
    /// Returns the signal that has arrived.
    pub fn signal(&self) -> Signal {
        self.signal
    }

    /// Returns a token that stops the application when it is cancelled.
    pub fn shutdown_handle(&self) -> CancellationToken {
        self.core.stop.token().clone()
    }

    /// Lists the live workers and the live tasks of their groups, one on each line: where each was spawned, its last
    /// mark, and whether it is inside a poll or parked at an await. It looks twice, some milliseconds apart.
    pub fn dump(&self) -> String {
        let nodes: Vec<_> = self.core.roots().iter().flat_map(|(root, _)| list(root)).collect();
        let looks: Vec<_> = nodes.into_iter().map(|node| (node.look(), node)).collect();
        if looks.iter().any(|(looks, _)| !looks.is_empty()) {
            thread::park_timeout(SAMPLE);
        }
        let seen = looks.iter().flat_map(|(looks, node)| node.seen(looks).into_iter().map(move |task| (node, task)));
        let seen: Vec<_> = seen.collect();
        let mut text = format!("`{}`: tasks alive: {}", self.core.name, seen.len());
        for (node, Seen { name, spawned_at, last_mark, state }) in seen {
            text.push_str(&format!("\n  `{name}` of `{}`: {state}, spawned at {spawned_at}", node.path()));
            if let Some(mark) = last_mark {
                text.push_str(&format!(", last mark `{mark}`"));
            }
        }
        text
    }
}

impl fmt::Debug for SignalContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SignalContext").field("signal", &self.signal).finish_non_exhaustive()
    }
}

/// The actions of an application. If a signal has several, they all run.
#[derive(Default)]
pub(crate) struct Actions(Vec<(Signal, Action)>);

impl Actions {
    pub(crate) fn add(&mut self, signal: Signal, action: Action) {
        self.0.push((signal, action));
    }

    /// Makes SIGQUIT list on standard error what is alive, unless the user gave it an action.
    pub(crate) fn add_dump(&mut self) {
        if !self.signals().any(|signal| signal == Signal::Quit) {
            self.add(Signal::Quit, Box::new(|cx| print(format_args!("{}", cx.dump()))));
        }
    }

    pub(crate) fn signals(&self) -> impl Iterator<Item = Signal> {
        self.0.iter().map(|(signal, _)| *signal)
    }

    /// Starts the thread that runs the actions for each signal sent to it, until the last sender is gone.
    pub(crate) fn start(mut self, core: Arc<Core>) -> io::Result<Sender<Signal>> {
        let (send, signals) = channel();
        let act = move || {
            for signal in signals {
                self.act(&core, signal);
            }
        };
        thread::Builder::new().name("shutdown-actions".to_owned()).spawn(act)?;
        Ok(send)
    }

    /// Runs the actions for a signal, on this thread.
    pub(crate) fn act(&mut self, core: &Arc<Core>, signal: Signal) {
        for (_, action) in self.0.iter_mut().filter(|(of, _)| *of == signal) {
            // The panic hook has reported it, and a panic must not cost the next signal.
            drop(catch(|| action(SignalContext { core: Arc::clone(core), signal })));
        }
    }
}
