//! A change before the await that makes it true
//!
//! The copy in memory has changed, and the database has not. A reader in between, or after a drop, sees something that
//! was never true. Change a copy, store it, and publish it once it is stored.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use cancel_safe_testing::{Explore, Report};
use tokio::time::sleep;

// Broken:
async fn update_user_bad(user: &mut User, db: &Database) {
    user.last_login = now();
    db.update_user(user).await;
}

// Mended:
async fn update_user_good(user: &User, db: &Database) -> User {
    let updated = User { last_login: now(), ..user.clone() };
    db.update_user(&updated).await;
    updated
}

// Judged:
#[derive(Clone)]
struct User {
    last_login: u32,
    _name: &'static str,
}

fn now() -> u32 {
    7
}

struct Database {
    last_login: Cell<u32>,
}

impl Database {
    async fn update_user(&self, user: &User) {
        sleep(Duration::from_millis(10)).await;
        self.last_login.set(user.last_login);
    }
}

struct World {
    user: RefCell<Option<User>>,
    db: Database,
}

fn explore(login: impl AsyncFn(&World)) -> Report {
    let setup = async || World {
        user: RefCell::new(Some(User { last_login: 1, _name: "ann" })),
        db: Database { last_login: Cell::new(1) },
    };
    Explore::new().paused_time(true).run(setup, login, async |world, _outcome| {
        let (memory, stored) = (world.user.borrow().as_ref().map(|user| user.last_login), world.db.last_login.get());
        match memory {
            Some(memory) if memory > stored => Err(format!("login {memory} in memory, {stored} in the database")),
            _ => Ok(()),
        }
    })
}

/// The session's user, put back whatever happens, so that it is the change which is judged.
struct Lent<'a>(&'a World, Option<User>);

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.0.user.replace(self.1.take());
    }
}

pub(super) fn broken() -> Report {
    explore(async |world| {
        let mut lent = Lent(world, world.user.take());
        update_user_bad(lent.1.as_mut().unwrap(), &world.db).await;
    })
}

pub(super) fn mended() -> Report {
    explore(async |world| {
        let mut lent = Lent(world, world.user.take());
        let updated = update_user_good(lent.1.as_ref().unwrap(), &world.db).await;
        lent.1 = Some(updated);
    })
}
