//! The server of all clients: nginx where it is installed, this program elsewhere.
//!
//! Invariant: it is a process of its own, and ends with this one, however that ends.

use std::convert::Infallible;
use std::io::Write;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

const PIECE: usize = 64 * 1024;
/// What a body below `/slow/` brings a second.
const SLOW_BYTES: usize = 4 << 20;

/// A server over a directory.
pub(crate) struct Origin {
    pub(crate) base: String,
    pub(crate) name: &'static str,
    /// Ends the server when it is closed.
    shell: Child,
}

impl Origin {
    /// Serves the files below `root`; those below `slow/` arrive slowly.
    pub(crate) fn over(root: &Path, scratch: &Path) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = free.local_addr().expect("an address");
        drop(free);
        let nginx = ["nginx", "/usr/sbin/nginx"].into_iter().find(|nginx| {
            Command::new(nginx).arg("-v").stderr(Stdio::null()).status().is_ok_and(|status| status.success())
        });
        let mut server = Command::new("sh");
        // The shell reads until this process has gone, however it went.
        server.args(["-c", "\"$@\" & read -r _; kill $! 2>/dev/null; wait", "sh"]);
        match nginx {
            Some(nginx) => {
                let config = configure(root, scratch, &address.to_string());
                server.arg(nginx).arg("-p").arg(scratch).arg("-c").arg(config);
            }
            None => {
                server.arg(std::env::current_exe().expect("this program")).arg("serve");
                server.arg(address.to_string()).arg(root);
            }
        }
        let shell = server.stdin(Stdio::piped()).stderr(Stdio::null()).spawn().expect("a shell");
        let started = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(started.elapsed() < Duration::from_secs(10), "the server does not come up");
            std::thread::park_timeout(Duration::from_millis(10));
        }
        let name = if nginx.is_some() { "nginx" } else { "a hyper server, as nginx is not installed" };
        Self { base: format!("http://{address}"), name, shell }
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        let _gone = self.shell.wait();
    }
}

/// What nginx is told: all of it in `scratch`, and one process, which the shell ends.
fn configure(root: &Path, scratch: &Path, address: &str) -> PathBuf {
    let own: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|kind| format!("{kind}_temp_path {};\n", scratch.join("nginx-temp").display()))
        .collect();
    // As root its workers would be somebody else, to whom the directory is closed.
    let user = if rustix::process::geteuid().is_root() { "user root;\n" } else { "" };
    let text = format!(
        "{user}daemon off;\nmaster_process off;\npid {pid};\nerror_log stderr emerg;\nevents {{ }}\n\
         http {{\naccess_log off;\n{own}server {{\nlisten {address};\nroot {root};\n\
         location /slow/ {{ limit_rate {SLOW_BYTES}; }}\n}}\n}}\n",
        pid = scratch.join("nginx.pid").display(),
        root = root.display(),
    );
    let path = scratch.join("nginx.conf");
    std::fs::write(&path, text).expect("a writable directory");
    path
}

/// Whether this process was started as the server; then it has ended.
pub(crate) fn is_ours(arguments: &[String]) -> bool {
    let [mode, address, root] = arguments else { return false };
    if mode != "serve" {
        return false;
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    runtime.block_on(serve(address, Path::new(root)));
    true
}

async fn serve(address: &str, root: &Path) {
    let listener = tokio::net::TcpListener::bind(address).await.expect("the port is free");
    while let Ok((stream, _)) = listener.accept().await {
        let root = root.to_owned();
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let response = respond(&request, &root);
                async move { Ok::<_, Infallible>(response) }
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
            if let Err(error) = connection.await {
                let _closed = writeln!(std::io::stderr(), "connection: {error}");
            }
        });
    }
}

fn respond(request: &Request<Incoming>, root: &Path) -> Response<BoxBody<Bytes, Infallible>> {
    let path = request.uri().path().trim_start_matches('/');
    let content = Bytes::from(std::fs::read(root.join(path)).expect("only what is there is asked for"));
    let pause = path.starts_with("slow/").then(|| Duration::from_secs_f64(PIECE as f64 / SLOW_BYTES as f64));
    let length = content.len();
    let pieces = (0..length).step_by(PIECE).map(move |at| content.slice(at..length.min(at + PIECE)));
    let body = futures_util::stream::iter(pieces).then(move |piece| async move {
        if let Some(pause) = pause {
            tokio::time::sleep(pause).await;
        }
        Ok(Frame::data(piece))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(Box::pin(body))));
    response.headers_mut().insert(hyper::header::CONTENT_LENGTH, length.into());
    response
}
