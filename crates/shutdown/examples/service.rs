//! A service of four workers: a database, an HTTP server, metrics, and a health check that may stop them all.
//!
//! ```text
//! cargo run -p cancel-safe-shutdown --example service
//! cargo run -p cancel-safe-shutdown --example service -- --unhealthy
//! ```
//!
//! Stop it with Ctrl-C: each worker ends its work and says so. With `--unhealthy`, the health check fails after a moment
//! and stops the application by its handle. SIGQUIT (Ctrl-\) lists what each worker is doing.
#![expect(clippy::print_stdout, reason = "an example speaks through its output")]

use std::process::ExitCode;
use std::time::Duration;

use cancel_safe_shutdown::Application;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Works off a batch a second, and closes its connections at the end.
async fn database_worker(cancel: CancellationToken) {
    while cancel.run_until_cancelled(sleep(Duration::from_secs(1))).await.is_some() {
        println!("[DB] Processing batch...");
    }
    println!("[DB] Closing connections...");
    sleep(Duration::from_millis(500)).await;
}

/// Answers two requests a second; at the end, finishes the requests that it has begun.
async fn http_server_worker(cancel: CancellationToken) {
    while cancel.run_until_cancelled(sleep(Duration::from_millis(500))).await.is_some() {
        println!("[HTTP] Handling request...");
    }
    println!("[HTTP] Draining active connections...");
    sleep(Duration::from_secs(1)).await;
}

/// Reports now and then; at the end, reports the rest.
async fn metrics_worker(cancel: CancellationToken) {
    while cancel.run_until_cancelled(sleep(Duration::from_secs(10))).await.is_some() {
        println!("[Metrics] Reporting metrics...");
    }
    println!("[Metrics] Flushing final metrics...");
    sleep(Duration::from_millis(200)).await;
}

/// Adds the workers, and runs them until a signal or the health check stops them.
fn run_service(healthy: bool) -> ExitCode {
    let mut app = Application::new("service");
    app.add_worker("database", database_worker);
    app.add_worker("http-server", http_server_worker);
    app.add_worker("metrics", metrics_worker);
    let shutdown = app.shutdown_handle();
    app.add_worker("health-check", move |cancel| async move {
        let period = Duration::from_secs(if healthy { 30 } else { 1 });
        while cancel.run_until_cancelled(sleep(period)).await.is_some() {
            println!("[Health] Checking system health...");
            if !healthy {
                println!("[Health] Unhealthy: stopping the service");
                shutdown.cancel();
            }
        }
    });
    app.run()
}

pub(crate) fn main() -> ExitCode {
    run_service(!std::env::args().any(|argument| argument == "--unhealthy"))
}
