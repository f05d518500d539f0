//! tokio-postgres' `build_transaction().start()`, dropped while it waits for a reply: is the session left inside?

#[path = "../stub_postgres.rs"]
mod stub_postgres;
#[path = "../tokio_postgres_session.rs"]
mod tokio_postgres_session;
#[path = "../verdict.rs"]
mod verdict;

use cancel_safe_testing::{Explore, Way};
use tokio_postgres_session::Session;

fn main() {
    // Not `Shutdown`: the server and the connection are tasks of the setup.
    let report = Explore::new().paused_time(true).ways([Way::Eager, Way::Settled]).run(
        Session::new,
        async |session| {
            let mut client = session.client.lock().await;
            client.build_transaction().read_only(true).start().await.is_ok()
        },
        Session::must_be_outside,
    );
    verdict::tell(&report);
}
