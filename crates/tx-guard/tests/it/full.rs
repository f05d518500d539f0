//! A server, or a role, that accepts as many sessions as the pool may have, and not one more.

use cancel_safe_tx_guard::{Options, TxPool};
use sqlx::{MySql, Postgres};

use crate::silence::within;
use crate::world::{Server, World};

const SESSIONS: u32 = 3;

trait Limited: Server {
    /// Makes an account for `sessions` sessions.
    async fn limited(world: &World<Self>, sessions: u32) -> Options<Self>;
    async fn unlimited(world: &World<Self>);
}

impl Limited for Postgres {
    async fn limited(world: &World<Self>, sessions: u32) -> Options<Self> {
        let role = &world.table;
        let create = format!("CREATE ROLE {role} LOGIN PASSWORD 'secret' CONNECTION LIMIT {sessions}");
        world.run(format!("{create}; GRANT ALL ON {role} TO {role}")).await;
        Self::account(world.options.clone(), role, "secret")
    }

    async fn unlimited(world: &World<Self>) {
        let role = &world.table;
        world.run(format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    }
}

impl Limited for MySql {
    async fn limited(world: &World<Self>, sessions: u32) -> Options<Self> {
        let user = &world.table;
        world.run(format!("CREATE USER {user} IDENTIFIED BY 'secret' WITH MAX_USER_CONNECTIONS {sessions}")).await;
        world.run(format!("GRANT ALL ON *.* TO {user}")).await;
        Self::account(world.options.clone(), user, "secret")
    }

    async fn unlimited(world: &World<Self>) {
        world.run(format!("DROP USER {}", world.table)).await;
    }
}

/// The connection for cancelling makes room, or is not opened at all.
async fn all_sessions_of_a_limited_account_can_be_used<D: Limited>(sessions: u32) {
    let world = World::<D>::new().await;
    let options = D::limited(&world, sessions).await;
    let db = TxPool::<D>::builder().max_connections(sessions).connect_with(options).await.unwrap();
    for turn in 0..2_i64 {
        let mut guards = Vec::new();
        for n in 0..i64::from(sessions) {
            let mut tx = within(db.begin()).await.unwrap();
            world.insert(&mut tx, turn * 100 + n).await.unwrap();
            guards.push(tx);
        }
        for guard in guards {
            guard.commit().await.unwrap();
        }
    }
    assert_eq!(world.committed().await.len(), 2 * sessions as usize);
    assert!(db.close(crate::world::PATIENCE).await.is_clean());
    D::unlimited(&world).await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}

#[tokio::test]
async fn all_sessions_of_a_limited_role_can_be_used_on_postgres() {
    all_sessions_of_a_limited_account_can_be_used::<Postgres>(SESSIONS).await;
    all_sessions_of_a_limited_account_can_be_used::<Postgres>(1).await;
}

#[tokio::test]
async fn all_sessions_of_a_limited_account_can_be_used_on_mysql() {
    all_sessions_of_a_limited_account_can_be_used::<MySql>(SESSIONS).await;
    all_sessions_of_a_limited_account_can_be_used::<MySql>(1).await;
}

/// A server that is full because of others, not because of us.
#[tokio::test]
async fn a_full_server_that_has_nothing_of_ours_to_close_is_told_as_one() {
    let world = World::<Postgres>::new().await;
    let options = Postgres::limited(&world, 2).await;
    let db = TxPool::<Postgres>::builder().max_connections(4).connect_with(options).await.unwrap();
    let held = (within(db.begin()).await.unwrap(), within(db.begin()).await.unwrap());
    let error = within(db.begin()).await.unwrap_err();
    assert!(error.is_connect() && !error.is_timeout(), "{error:?}");
    held.0.rollback().await.unwrap();
    held.1.rollback().await.unwrap();
    assert!(db.close(crate::world::PATIENCE).await.is_clean());
    Postgres::unlimited(&world).await;
    world.run(format!("DROP TABLE {}", world.table)).await;
}
