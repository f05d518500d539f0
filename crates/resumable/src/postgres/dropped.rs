//! The keeper and the items' transactions, polled directly by the task that is dropped. In a run the keeper is a
//! separate task, and the transactions are in a list with its own wakers, so an exploration of a run does not see their
//! awaits.

use std::{
    future::poll_fn,
    marker::PhantomData,
    pin::pin,
    sync::{Arc, atomic::AtomicU32, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use cancel_safe_testing::{Explore, Report};
use futures_util::{
    TryStreamExt,
    future::{Either, select},
};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, postgres::PgPoolOptions};

use super::{
    PgStore,
    job::Offer,
    keeper::Keeper,
    leases::Leases,
    ledger::Known,
    shared::{Hold, LetGo, Means, Shared, Told},
    transaction::{After, End, Job, Note, Turn, What, Worker},
    waiting::Ticket,
};
use crate::{
    codec::Codec,
    error::TaskError,
    item::ItemError,
    log::{Header, Identity, Kind},
    proof::Prover,
};

const ITEMS: u64 = 4;
const PATIENCE: Duration = Duration::from_secs(60);

fn pool() -> PgPool {
    let url = std::env::var("CANCEL_SAFE_TEST_POSTGRES_URL").expect("run cargo xtask test resumable");
    PgPoolOptions::new().max_connections(3).connect_lazy(&url).unwrap()
}

fn schema() -> String {
    static SCHEMAS: AtomicU32 = AtomicU32::new(0);
    format!("dropped_{}_{}", std::process::id(), SCHEMAS.fetch_add(1, Ordering::Relaxed))
}

/// A store with its own sessions: an operation's sessions may have ended with its runtime.
fn store(schema: &str) -> PgStore {
    PgStore::new(pool()).schema(schema).range_items(2).lease(PATIENCE).tolerate_lost(100)
}

async fn run_sql(sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&pool()).await.unwrap();
}

async fn keeper(store: PgStore, shared: &Arc<Shared>) -> Result<Keeper, TaskError> {
    let header = Header {
        salt: 7,
        codec: Codec::MessagePack.number(),
        identity: Identity::Position,
        job: "dropped".to_owned(),
        version: "1".to_owned(),
        result_type: "u64".to_owned(),
    };
    let offer = Offer { header, accepted: Vec::new(), chain: vec![7; ITEMS as usize], range_items: 2 };
    Keeper::open(store, shared, &offer, Duration::ZERO).await
}

/// Does what the loop of a run does, without its items: it records the first result of a range, and only then the
/// second. With `stops`, it stops after the very first.
async fn kept(store: PgStore, stops: bool) -> Result<(), TaskError> {
    let shared = Arc::new(Shared::default());
    let mut keeper = keeper(store, &shared).await?;
    let mut late = Vec::new();
    let loop_of_items = poll_fn(|cx| {
        let result = |hold, index: usize| {
            shared.record(hold, Kind::Result, index, &[index as u8], Means::Finished);
        };
        for told in shared.hear(cx.waker()).0 {
            match told {
                Told::Granted { hold, first, items, .. } => {
                    let left = items.iter().enumerate().filter(|(_, known)| **known == Known::Nothing);
                    let mut left = left.map(|(at, _)| first + at);
                    left.next().into_iter().for_each(|index| result(hold, index));
                    late.extend(left.map(|index| (hold, index)));
                    shared.exhausted(hold);
                }
                Told::Appended { .. } if stops => shared.stop(),
                Told::Appended { .. } => late.drain(..).for_each(|(hold, index)| result(hold, index)),
                _ => {}
            }
        }
        Poll::<()>::Pending
    });
    match select(pin!(keeper.keep()), pin!(loop_of_items)).await {
        Either::Left((ended, _)) => ended.map(drop),
        Either::Right(_) => unreachable!("it waits for ever"),
    }
}

/// The items of a range one after the other, each in its transaction; the failure of one is noted first.
async fn transacted(store: PgStore) -> Result<(), TaskError> {
    let schema = Arc::clone(&store.schema);
    let shared = Arc::new(Shared::default());
    let mut keeper = keeper(store.clone(), &shared).await?;
    let work = async |conn: &mut PgConnection, x: u64| {
        let insert = format!("INSERT INTO {schema}_beside.effect VALUES ({x})");
        sqlx::query(AssertSqlSafe(insert)).persistent(false).execute(conn).await?;
        if x == 1 { Err(ItemError::retry("not this time")) } else { Ok(x) }
    };
    let prover = std::sync::Mutex::new(Prover::new(Codec::MessagePack));
    let worker = Worker { store, work, prover, codec: Codec::MessagePack, of: PhantomData::<fn() -> u64> };
    let items = async {
        let mut leases = None;
        loop {
            let told = poll_fn(|cx| {
                let (told, _) = shared.hear(cx.waker());
                if told.is_empty() { Poll::Pending } else { Poll::Ready(told) }
            });
            for told in told.await {
                match told {
                    Told::Opened { leases: opened, .. } => leases = Some(opened),
                    Told::Granted { hold, first, items, place } => {
                        let (turn, count) = (Arc::new(Turn::new(place)), items.len());
                        for (at, known) in items.iter().enumerate() {
                            if matches!(known, Known::Result | Known::Quarantined) {
                                continue;
                            }
                            let leases = leases.clone().unwrap();
                            run_item(&worker, &turn, count, leases, hold, first + at).await?;
                        }
                        shared.exhausted(hold);
                        shared.let_go(hold, LetGo::Finished);
                    }
                    _ => {}
                }
            }
        }
    };
    match select(pin!(keeper.keep()), pin!(items)).await {
        Either::Left((ended, _)) => ended.map(drop),
        Either::Right((ended, _)) => ended,
    }
}

async fn run_item<F>(
    worker: &Worker<F, u64>,
    turn: &Arc<Turn>,
    count: usize,
    leases: Leases,
    hold: Hold,
    index: usize,
) -> Result<(), TaskError>
where
    F: AsyncFn(&mut PgConnection, u64) -> Result<u64, ItemError>,
{
    let job = |item, what| Job {
        ticket: Ticket { hold, index, key: None, item, attempts: 0, defers: 0, launch: 0 },
        what,
        turn: Arc::clone(turn),
        count,
        leases: leases.clone(),
    };
    let mut end = worker.run(job(index as u64, What::Attempt)).await.1;
    if let End::Failed(_) = end {
        let note = Note { attempts: 1, cause: "not this time".to_owned(), after: After::Quarantine };
        end = worker.run(job(index as u64, What::Note(note))).await.1;
    }
    match end {
        End::Broken(error) => Err(error),
        End::Recorded | End::Noted(_) | End::Lost | End::Failed(_) => Ok(()),
    }
}

/// Whether each point creates new tables, which takes most of the time, or only a new job.
#[derive(Clone, Copy, PartialEq)]
enum Tables {
    Fresh,
    Kept,
}

/// Drops an operation at every point, lets another keeper complete the job, and looks for missing or doubled results.
fn explore(tables: Tables, operation: impl AsyncFn(PgStore) -> Result<(), TaskError>) -> Report {
    let schema = schema();
    let drop_all = format!("DROP SCHEMA IF EXISTS {schema}_beside CASCADE; DROP SCHEMA IF EXISTS {schema} CASCADE");
    let report = Explore::new().budgets([]).hang_after(PATIENCE).timeout(6 * PATIENCE).run(
        async || {
            if tables == Tables::Fresh {
                run_sql(drop_all.clone()).await;
            }
            let afresh = format!(
                "CREATE SCHEMA IF NOT EXISTS {schema}_beside;
                 CREATE TABLE IF NOT EXISTS {schema}_beside.effect (n bigint); TRUNCATE {schema}_beside.effect;
                 DO $$ BEGIN IF to_regclass('{schema}.job') IS NOT NULL THEN DELETE FROM {schema}.job; END IF; END $$"
            );
            run_sql(afresh).await;
        },
        async |()| operation(store(&schema)).await,
        async |(), _| {
            // Nothing is left to give back what it held, so let its lease lapse.
            let lapse = format!(
                "DO $$ BEGIN IF to_regclass('{schema}.range') IS NOT NULL THEN
                 UPDATE {schema}.range SET lease_until = 'epoch' WHERE lease_until IS NOT NULL; END IF; END $$"
            );
            run_sql(lapse).await;
            kept(store(&schema), false).await.map_err(|error| format!("by another: {error}"))?;
            let store = store(&schema);
            let all: Vec<_> = store.results::<u64>("dropped").try_collect().await.map_err(|error| error.to_string())?;
            let indexes: Vec<_> = all.iter().map(|done| done.index).collect();
            let doubled = format!("SELECT count(*) - count(DISTINCT n) FROM {schema}_beside.effect");
            let doubled: i64 = sqlx::query_scalar(AssertSqlSafe(doubled)).fetch_one(&pool()).await.unwrap();
            match (indexes == [0, 1, 2, 3], doubled) {
                (true, 0) => Ok(()),
                _ => Err(format!("recorded are {indexes:?}, and {doubled} effects are there twice")),
            }
        },
    );
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(run_sql(drop_all));
    report
}

#[test]
fn a_dropped_opening_leaves_a_job_that_another_makes_or_finds() {
    let opening = async |store| keeper(store, &Arc::default()).await.map(drop);
    explore(Tables::Fresh, opening).publish("resumable", "the opening of a job").assert_clean();
}

#[test]
fn a_dropped_keeper_leaves_a_job_that_another_completes() {
    let report = explore(Tables::Kept, async |store| kept(store, false).await);
    report.publish("resumable", "the keeper of a run").assert_clean();
    let report = explore(Tables::Kept, async |store| kept(store, true).await);
    report.publish("resumable", "the keeper of a stopped run").assert_clean();
}

#[test]
fn a_dropped_transaction_of_an_item_leaves_its_effect_with_its_result_or_neither() {
    explore(Tables::Kept, transacted).publish("resumable", "the transaction of an item").assert_clean();
}
