//! The server of the bank as a process, and a small client that can leave at any time.
#![cfg(unix)]

use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Server {
    child: Child,
    pub(crate) addr: SocketAddr,
}

impl Server {
    pub(crate) async fn start(mut program: Command) -> Self {
        let mut child = program.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let listens = async {
            loop {
                let line = lines.next_line().await.unwrap().expect("it ends before it listens");
                if let Some((_, addr)) = line.split_once("listening on http://") {
                    return addr.parse().unwrap();
                }
            }
        };
        let addr = timeout(PATIENCE, listens).await.expect("it does not listen");
        Self { child, addr }
    }

    pub(crate) fn tell_to_stop(&self) {
        let id = self.child.id().unwrap().try_into().unwrap();
        kill(Pid::from_raw(id), Signal::SIGTERM).unwrap();
    }

    pub(crate) async fn ends(mut self) -> ExitStatus {
        timeout(PATIENCE, self.child.wait()).await.expect("it does not end").unwrap()
    }

    /// Sends a request, and leaves the answer unread.
    pub(crate) async fn send(&self, line: &str, body: &str) -> TcpStream {
        let head = "host: bank\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length";
        let request = format!("{line} HTTP/1.1\r\n{head}: {}\r\n\r\n{body}", body.len());
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        stream.write_all_buf(&mut request.as_bytes()).await.unwrap();
        stream
    }

    /// The stream of events.
    pub(crate) async fn events(&self) -> Events {
        Events(BufReader::new(self.send("GET /events", "").await))
    }

    /// The status, and the body if it is JSON.
    pub(crate) async fn ask(&self, line: &str, body: &str) -> (u16, Value) {
        let mut stream = self.send(line, body).await;
        let mut answer = String::new();
        timeout(PATIENCE, stream.read_to_string(&mut answer)).await.expect("no answer").unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }
}

pub(crate) struct Events(BufReader<TcpStream>);

impl Events {
    /// Reads events until `is_right` accepts one.
    pub(crate) async fn until(&mut self, is_right: impl Fn(&Value) -> bool) -> Value {
        let mut last = Value::Null;
        let reading = async {
            loop {
                let mut line = String::new();
                assert!(self.0.read_line(&mut line).await.unwrap() > 0, "the stream ends early");
                if let Some(data) = line.strip_prefix("data: ") {
                    last = serde_json::from_str(data).unwrap();
                    if is_right(&last) {
                        return;
                    }
                }
            }
        };
        let waited = timeout(PATIENCE, reading).await;
        assert!(waited.is_ok(), "it is not so: {last}");
        last
    }

    pub(crate) async fn ends(mut self) {
        let rest = timeout(PATIENCE, self.0.read_to_end(&mut Vec::new())).await.expect("the stream goes on");
        assert!(rest.is_ok(), "the stream was cut: {rest:?}");
    }
}
