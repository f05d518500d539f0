//! State that is taken and not put back
//!
//! A value that was taken out of its place lives in the future and goes with it. Put it back in the destructor of a
//! guard that is made before the await.

use std::cell::RefCell;
use std::time::Duration;

use cancel_safe_testing::{Explore, Report};
use tokio::time::sleep;

// Broken:
async fn query_bad(session: &RefCell<Option<Connection>>) -> u32 {
    let connection = session.take().expect("a connection");
    let answer = connection.query().await;
    session.replace(Some(connection));
    answer
}

// Mended:
async fn query_good(session: &RefCell<Option<Connection>>) -> u32 {
    let connection = session.take().expect("a connection");
    let lent = Lent { session, connection: Some(connection) };
    lent.connection.as_ref().expect("it is there until the drop").query().await
}

struct Lent<'a> {
    session: &'a RefCell<Option<Connection>>,
    connection: Option<Connection>,
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.session.replace(self.connection.take());
    }
}

// Judged:
struct Connection;

impl Connection {
    async fn query(&self) -> u32 {
        sleep(Duration::from_millis(10)).await;
        7
    }
}

fn explore(query: impl AsyncFn(&RefCell<Option<Connection>>) -> u32) -> Report {
    Explore::new().paused_time(true).run(
        async || RefCell::new(Some(Connection)),
        query,
        async |session, _outcome| match &*session.borrow() {
            Some(_) => Ok(()),
            None => Err("the session has no connection any more".to_owned()),
        },
    )
}

pub(super) fn broken() -> Report {
    explore(query_bad)
}

pub(super) fn mended() -> Report {
    explore(query_good)
}
