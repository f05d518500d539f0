//! The error for a user who has forgotten the feature for TLS, sqlx's runtime, or the runtime itself.

use std::error::Error;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use cancel_safe_http_timeout::TimeoutClient;
use cancel_safe_tx_guard::TxPool;
use sqlx::Postgres;

const DATABASE: &str = "postgres://localhost/none";

fn main() -> Result<(), Box<dyn Error>> {
    let client = TimeoutClient::builder().build()?;
    outside("http without a runtime", client.get("http://localhost/").send());
    outside("file without a runtime", cancel_safe_atomic_fs::write("never", b"written"));
    outside("transaction without a runtime", TxPool::<Postgres>::connect(DATABASE));

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tell("https without TLS", runtime.block_on(client.get("https://localhost/").send()));
    tell("sqlx without a runtime", runtime.block_on(TxPool::<Postgres>::connect(DATABASE)));
    Ok(())
}

fn outside<T, E: Error>(what: &str, call: impl Future<Output = Result<T, E>>) {
    match pin!(call).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => tell(what, result),
        Poll::Pending => println!("{what}: waits"),
    }
}

fn tell<T, E: Error>(what: &str, result: Result<T, E>) {
    match result {
        Ok(_) => println!("{what}: works"),
        Err(error) => println!("{what}: {error}"),
    }
}
