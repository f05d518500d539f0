//! Statements that reach the server after their cancel, which finds nothing to cancel and has to be repeated.

use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitOutcome, Options, TxError, TxEvent, TxPool};
use futures_util::FutureExt;
use futures_util::future::poll_immediate;
use sqlx::{AssertSqlSafe, MySql, Postgres};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::commit::works_as_before;
use crate::world::{PATIENCE, Server, TestDb, World, eventually, mostly_within};

/// The first connection of a pool is a session, the second its connection for cancelling.
const CANCELLER: usize = 1;

/// A proxy in front of the server that can hold back the sessions' messages and answers, records their messages, and
/// counts the answers to the canceller.
pub(crate) struct Door<D: TestDb> {
    pub(crate) through: Options<D>,
    held: watch::Sender<bool>,
    pub(crate) answers_held: watch::Sender<bool>,
    pub(crate) sent: Arc<Mutex<Vec<u8>>>,
    acknowledged: Arc<AtomicUsize>,
}

impl<D: Server> Door<D> {
    pub(crate) async fn open(options: &Options<D>) -> Self {
        let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (server, through) = D::way(options, door.local_addr().unwrap().port());
        let (held, answers_held) = (watch::Sender::new(false), watch::Sender::new(false));
        let (sent, acknowledged) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::new(AtomicUsize::new(0)));
        let (holds, holds_answers) = (held.subscribe(), answers_held.subscribe());
        let (notes, count) = (Arc::clone(&sent), Arc::clone(&acknowledged));
        tokio::spawn(async move {
            let mut number = 0;
            while let Ok((client, _)) = door.accept().await {
                let server = TcpStream::connect(server.clone()).await.unwrap();
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                let free = watch::Sender::new(false).subscribe();
                let (holds, holds_answers, notes, count) = match number {
                    CANCELLER => (free.clone(), free, Arc::default(), Arc::clone(&count)),
                    _ => (holds.clone(), holds_answers.clone(), Arc::clone(&notes), Arc::default()),
                };
                let note = move |bytes: &[u8]| notes.lock().unwrap().extend_from_slice(bytes);
                tokio::spawn(carry(from_client, to_server, holds, note));
                let count = move |_: &[u8]| {
                    count.fetch_add(1, Ordering::Relaxed);
                };
                tokio::spawn(carry(from_server, to_client, holds_answers, count));
                number += 1;
            }
        });
        Self { through, held, answers_held, sent, acknowledged }
    }
}

#[expect(clippy::disallowed_methods, reason = "nobody drops the door's tasks halfway")]
async fn carry(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut held: watch::Receiver<bool>,
    carried: impl Fn(&[u8]),
) {
    let mut buffer = [0; 8192];
    while let Ok(size @ 1..) = from.read(&mut buffer).await {
        // This fails if nobody is left to hold it, which is as good.
        drop(held.wait_for(|held| !held).await);
        if to.write_all(&buffer[..size]).await.is_err() {
            return;
        }
        carried(&buffer[..size]);
    }
    drop(to.shutdown().await);
}

/// Returns how long it took until the rollback.
async fn a_statement_after_its_cancel<D: Server>(world: &World<D>, door: &Door<D>, db: &TxPool<D>) -> Duration {
    let mut events = db.events();
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    let before = door.acknowledged.load(Ordering::Relaxed);
    door.held.send_replace(true);
    assert!(D::execute(&mut tx, D::SLOW.to_owned()).now_or_never().is_none());
    let start = Instant::now();
    drop(tx);
    eventually("a cancel has been answered", async || door.acknowledged.load(Ordering::Relaxed) > before).await;
    door.held.send_replace(false);
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    let took = start.elapsed();
    assert_eq!(events.next().await, Some(TxEvent::ImplicitRollback));
    assert_eq!(events.next().await, Some(TxEvent::CancelSent));
    works_as_before(world, db).await;
    assert_eq!(world.committed().await, [77]);
    world.run(format!("DELETE FROM {}", world.table)).await;
    took
}

async fn a_statement_that_comes_after_its_cancel_is_cancelled_all_the_same<D: Server>() {
    let world = World::<D>::new().await;
    let door = Door::<D>::open(&world.options).await;
    let db = TxPool::<D>::builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    // Less than the two seconds after which a session is given up.
    let once = async || a_statement_after_its_cancel(&world, &door, &db).await;
    mostly_within(Duration::from_millis(1_500), 10, once).await;
    world.end(db).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_comes_after_its_cancel_is_cancelled_all_the_same_on_postgres() {
    a_statement_that_comes_after_its_cancel_is_cancelled_all_the_same::<Postgres>().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_comes_after_its_cancel_is_cancelled_all_the_same_on_mysql() {
    a_statement_that_comes_after_its_cancel_is_cancelled_all_the_same::<MySql>().await;
}

/// sqlx does not know the length of an answer that it has not waited for, and would wait for another one for ever.
#[tokio::test]
async fn a_savepoint_after_a_statement_that_was_dropped_while_it_was_prepared_is_an_error_on_mysql() {
    let world = World::<MySql>::new().await;
    let door = Door::<MySql>::open(&world.options).await;
    let db = TxPool::<MySql>::builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    door.held.send_replace(true);
    let wide = AssertSqlSafe(format!("SELECT ? + ?, n, v FROM {}", world.table));
    let prepared = sqlx::query(wide).bind(1).bind(2).fetch_all(&mut *tx);
    assert!(prepared.now_or_never().is_none());
    {
        let mut savepoint = pin!(tx.savepoint(async |sp| world.insert(sp, 2).await.map_err(TxError::from)));
        assert!(poll_immediate(savepoint.as_mut()).await.is_none());
        door.held.send_replace(false);
        let error = timeout(PATIENCE, savepoint).await.unwrap().unwrap_err();
        assert!(matches!(error, TxError::Database(sqlx::Error::Protocol(_))), "{error:?}");
    }
    let error = tx.commit().await.unwrap_err();
    assert!(matches!(error, TxError::Lost { .. }), "{error:?}");
    assert_eq!(handle.outcome().await, CommitOutcome::RolledBack);
    assert!(world.committed().await.is_empty());
    works_as_before(&world, &db).await;
    world.end(db).await;
}

/// The first position of these bytes in the sent data.
fn position(sent: &[u8], wanted: &[u8]) -> usize {
    let found = sent.windows(wanted.len()).position(|bytes| bytes == wanted);
    found.unwrap_or_else(|| panic!("not sent: {}", wanted.escape_ascii()))
}

/// The locks are free a round trip sooner. The statement is one that ends well when it is cancelled, as some do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_goes_out_ahead_of_the_proof_that_nothing_is_left_to_be_read_on_mysql() {
    let world = World::<MySql>::new().await;
    let door = Door::<MySql>::open(&world.options).await;
    let db = TxPool::<MySql>::builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let mut other = world.plain().await;
    MySql::execute(&mut other, format!("SELECT GET_LOCK('{}', 0)", world.table)).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    let slow = MySql::execute(&mut tx, format!("SELECT GET_LOCK('{}', 10000)", world.table));
    assert!(timeout(Duration::from_millis(100), slow).await.is_err(), "it was not slow");
    door.sent.lock().unwrap().clear();
    drop(tx);
    assert_eq!(timeout(PATIENCE, handle.outcome()).await.unwrap(), CommitOutcome::RolledBack);
    works_as_before(&world, &db).await;
    let sent = door.sent.lock().unwrap().clone();
    // A prepare message starts with the byte 0x16.
    assert!(position(&sent, b"ROLLBACK") < position(&sent, b"\x16SELECT "), "{}", sent.escape_ascii());
    drop(other);
    world.end(db).await;
}
