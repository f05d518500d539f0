//! hyper-util's `Singleton`: the call that makes the connection is dropped. Do the others still get theirs?

#[path = "../verdict.rs"]
mod verdict;

use std::cell::RefCell;
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use cancel_safe_testing::{Explore, Way};
use hyper_util::client::pool::singleton::Singleton;
use tokio::time::sleep;
use tower_service::Service;

/// Makes connections, which take a while.
struct Dial;

impl Service<()> for Dial {
    type Response = &'static str;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<&'static str, Infallible>>>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        Box::pin(async {
            sleep(Duration::from_millis(10)).await;
            Ok("a connection")
        })
    }
}

type Call = <Singleton<Dial, ()> as Service<()>>::Future;

/// The pool, and a second call that waits for the connection of the first.
struct Scene {
    pool: RefCell<Singleton<Dial, ()>>,
    second: RefCell<Option<Call>>,
}

fn main() {
    // Not `Shutdown`: the second call has its timer in the runtime of the setup.
    let report = Explore::new().paused_time(true).ways([Way::Eager, Way::Settled]).run(
        async || Scene { pool: RefCell::new(Singleton::new(Dial)), second: RefCell::default() },
        async |scene| {
            let first = scene.pool.borrow_mut().call(());
            let second = scene.pool.borrow_mut().call(());
            scene.second.replace(Some(second));
            first.await.is_ok()
        },
        async |scene, _outcome| match scene.second.take() {
            Some(second) => second.await.map(drop).map_err(|error| format!("the second call failed: {error}")),
            None => Ok(()),
        },
    );
    verdict::tell(&report);
}
