//! Answers that come a byte at a time: a future can then be dropped in the middle of each, after sqlx has read a part
//! of it that it does not remember.

use std::collections::BTreeSet;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use cancel_safe_tx_guard::{CommitOutcome, Options, TxPool};
use futures_util::FutureExt;
use futures_util::future::join_all;
use sqlx::pool::PoolOptions;
use sqlx::{MySql, Postgres};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::fuzz::cut::cut;
use crate::world::{PATIENCE, Server, TestDb, World};

/// How the server's messages are passed on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Pace {
    AtOnce,
    ByteByByte,
    /// MySQL's number of columns, the first column, and the length of the first row; then nothing until the pace
    /// changes.
    ToTheFirstRow,
}

/// A proxy in front of the server that passes on its messages.
pub(crate) struct Door<D: Server> {
    pub(crate) through: Options<D>,
    pub(crate) pace: watch::Sender<Pace>,
    task: JoinHandle<()>,
}

impl<D: Server> Door<D> {
    pub(crate) async fn open(options: &Options<D>) -> Self {
        let door = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (server, through) = D::way(options, door.local_addr().unwrap().port());
        let pace = watch::Sender::new(Pace::AtOnce);
        let answers = pace.subscribe();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = door.accept().await {
                let server = TcpStream::connect(server.clone()).await.unwrap();
                client.set_nodelay(true).unwrap();
                server.set_nodelay(true).unwrap();
                let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
                tokio::spawn(carry(from_client, to_server, watch::Sender::new(Pace::AtOnce).subscribe()));
                tokio::spawn(carry(from_server, to_client, answers.clone()));
            }
        });
        Self { through, pace, task }
    }
}

impl<D: Server> Drop for Door<D> {
    /// Connections that are already open continue.
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[expect(clippy::disallowed_methods, reason = "nobody drops the door's tasks halfway")]
async fn carry(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, pace: watch::Receiver<Pace>) {
    let mut buffer = [0; 8192];
    while let Ok(size @ 1..) = from.read(&mut buffer).await {
        let mut rest = &buffer[..size];
        while !rest.is_empty() {
            let now = *pace.borrow();
            let part = match now {
                Pace::AtOnce => rest.len(),
                Pace::ByteByByte => 1,
                Pace::ToTheFirstRow => to_the_first_row(rest),
            };
            if to.write_all(&rest[..part]).await.is_err() {
                return;
            }
            rest = &rest[part..];
            match now {
                Pace::AtOnce => {}
                // Gives the other end time to read it.
                Pace::ByteByByte => {
                    for _ in 0..4 {
                        tokio::task::yield_now().await;
                    }
                }
                Pace::ToTheFirstRow => drop(pace.clone().wait_for(|pace| *pace != now).await),
            }
        }
    }
    drop(to.shutdown().await);
}

fn to_the_first_row(answer: &[u8]) -> usize {
    const HEADER: usize = 4;
    let after = |packet: usize| packet + HEADER + usize::from(answer[packet]);
    after(after(0)) + HEADER
}

/// How a transaction with a torn statement ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Drop,
    Rollback,
    Commit,
    /// A commit after everything has arrived.
    LateCommit,
}

/// How long a commit waits for an answer that will not come.
const SHORT: Duration = Duration::from_millis(500);

struct Torn<D: Server> {
    world: World<D>,
    door: Door<D>,
    db: TxPool<D>,
    next: i64,
    expected: BTreeSet<i64>,
    /// How many commits were errors.
    refused: usize,
}

impl<D: Server> Torn<D> {
    async fn new() -> Self {
        let world = World::<D>::new().await;
        world.run(format!("INSERT INTO {} (n) VALUES (1), (2), (3)", world.table)).await;
        let door = Door::<D>::open(&world.options).await;
        let db = TxPool::<D>::builder().max_connections(1).catch_up_timeout(SHORT).answer_timeout(SHORT);
        let db = db.connect_with(door.through.clone()).await.unwrap();
        Self { world, door, db, next: 10, expected: [1, 2, 3].into(), refused: 0 }
    }

    /// Drops `run` after a number of pendings, ends the transaction, and checks the two transactions that follow.
    /// Returns whether there was anything to drop.
    async fn once(
        &mut self,
        run: impl AsyncFnOnce(&mut D::Connection, String),
        sql: &str,
        after: u32,
        end: End,
    ) -> bool {
        let what = format!("{sql}, dropped after {after} pendings, {end:?}");
        let mut tx = self.db.begin().await.unwrap_or_else(|error| panic!("{what}: {error}"));
        let handle = tx.outcome_handle();
        self.next += 1;
        let torn = self.next;
        // Each statement has its own text, so that none is prepared already.
        let sql = sql.replace("TABLE", &self.world.table).replace('#', &torn.to_string());
        self.door.pace.send_replace(Pace::ByteByByte);
        let was_cut = cut(run(&mut tx, sql), Some(after)).await.is_none();
        self.door.pace.send_replace(Pace::AtOnce);
        let committed = match end {
            End::Drop => {
                drop(tx);
                false
            }
            End::Rollback => {
                drop(tx.rollback().await);
                false
            }
            End::Commit | End::LateCommit => {
                if matches!(end, End::LateCommit) {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
                timeout(PATIENCE, tx.commit()).await.unwrap_or_else(|_| panic!("{what}: it hangs")).is_ok()
            }
        };
        let told = handle.outcome().await;
        assert_eq!(committed, told == CommitOutcome::Committed, "{what}: {told:?}");
        self.refused += usize::from(matches!(end, End::Commit | End::LateCommit) && !committed);
        for _ in 0..2 {
            self.next += 1;
            let number = self.next;
            let probe = AssertUnwindSafe(async {
                let mut tx = self.db.begin().await.unwrap();
                let answer = D::numbers(&mut tx, format!("SELECT CAST({number} AS {})", D::BIGINT)).await.unwrap();
                assert_eq!(answer, [number]);
                self.world.insert(&mut tx, number).await.unwrap();
                tx.commit().await.unwrap();
            });
            let probed = timeout(PATIENCE, probe.catch_unwind()).await;
            assert!(matches!(probed, Ok(Ok(()))), "{what}: the next transaction panics or hangs");
            self.expected.insert(number);
        }
        let there: BTreeSet<i64> = self.world.committed().await.into_iter().collect();
        // Nobody can tell whether a dropped statement was run.
        if told != CommitOutcome::RolledBack && there.contains(&torn) {
            self.expected.insert(torn);
        }
        assert_eq!(there, self.expected, "{what}");
        was_cut
    }

    /// Returns how many commits were errors.
    async fn end(self) -> usize {
        self.world.end(self.db).await;
        self.refused
    }
}

/// Reads its rows, which are in binary form, because the statement is prepared.
async fn read<D: Server>(conn: &mut D::Connection, sql: String) {
    drop(D::numbers(conn, sql).await);
}

async fn write<D: Server>(conn: &mut D::Connection, sql: String) {
    drop(D::execute(conn, sql).await);
}
const TRANSFER: &str = "UPDATE TABLE SET v = v - 1 WHERE n = 1; UPDATE TABLE SET v = v + 1 WHERE n = 2;
    INSERT INTO TABLE (n) VALUES (#)";
const SELECT: &str = "SELECT n FROM TABLE WHERE n < 4 AND # > 0";

/// Drops after each pending; it commits only occasionally, because a stuck commit takes seconds.
async fn whatever_is_torn_the_next_transactions_are_whole<D: Server>() -> usize {
    let mut torn = Torn::<D>::new().await;
    for (end, step) in [(End::Drop, 1), (End::Rollback, 1), (End::Commit, 61), (End::LateCommit, 47)] {
        for after in (1..).step_by(step) {
            if !torn.once(read::<D>, SELECT, after, end).await {
                break;
            }
        }
        for sql in [TRANSFER, SELECT] {
            for after in (1..).step_by(step) {
                if !torn.once(write::<D>, sql, after, end).await {
                    break;
                }
            }
        }
    }
    torn.end().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_torn_the_next_transactions_are_whole_on_postgres() {
    // On PostgreSQL, sqlx does not lose its place.
    assert_eq!(whatever_is_torn_the_next_transactions_are_whole::<Postgres>().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_torn_the_next_transactions_are_whole_on_mysql() {
    assert_ne!(whatever_is_torn_the_next_transactions_are_whole::<MySql>().await, 0, "no commit met anything torn");
}

/// Values that look like answers to other messages once sqlx has lost its place between them.
pub(crate) const ROWS: &str = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900)
    SELECT x'000000fe00000000' FROM n WHERE # > 0";
const IN_THE_ROWS: Range<u32> = 60..200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_look_like_answers_are_not_believed() {
    const LANES: usize = 4;
    let lane = |lane| async move {
        let mut torn = Torn::<MySql>::new().await;
        for (end, step) in [(End::Drop, 1), (End::Commit, 61), (End::LateCommit, 47)] {
            for after in IN_THE_ROWS.step_by(step).skip(lane).step_by(LANES) {
                torn.once(write::<MySql>, ROWS, after, end).await;
            }
        }
        torn.end().await
    };
    // At the same time, because each session that has lost its place takes a while to end.
    let refused: usize = join_all((0..LANES).map(lane)).await.into_iter().sum();
    assert_ne!(refused, 0, "no commit met anything torn");
}

/// Read from the second half of the first row on, the rows are an end, two answers `OK`, the first of which says that
/// more will come, and no remainder. The transaction has already ended, so the true answers are errors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_look_like_the_answers_to_a_commit_are_not_believed() {
    let world = World::<MySql>::new().await;
    let door = Door::<MySql>::open(&world.options).await;
    let db = TxPool::<MySql>::builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let filler = format!("{}1200000000000008000000", "61".repeat(3059));
    let rows =
        format!("SELECT x'000000fe00000000' UNION ALL SELECT x'000000000008000000616161' UNION ALL SELECT x'{filler}'");
    let mut tx = db.begin().await.unwrap();
    let handle = tx.outcome_handle();
    world.insert(&mut tx, 1).await.unwrap();
    MySql::execute(&mut tx, "ROLLBACK".to_owned()).await.unwrap();
    door.pace.send_replace(Pace::ToTheFirstRow);
    let read = timeout(Duration::from_millis(200), MySql::execute(&mut tx, rows)).await;
    assert!(read.is_err(), "nothing was torn");
    door.pace.send_replace(Pace::AtOnce);
    // By the next read, everything has arrived.
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(timeout(PATIENCE, tx.commit()).await.unwrap().is_err());
    assert_ne!(handle.outcome().await, CommitOutcome::Committed);
    assert!(world.committed().await.is_empty());
    world.end(db).await;
}

/// Read from the second half of the first row on, the rows are an end, and then an answer that announces 2^40 columns.
/// sqlx allocates room for them before it reads on, and if that fails the process ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_look_like_the_head_of_an_enormous_answer_do_not_end_the_process() {
    let world = World::<MySql>::new().await;
    let door = Door::<MySql>::open(&world.options).await;
    let db = TxPool::<MySql>::builder().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let columns = (1_u64 << 40).to_le_bytes().map(|byte| format!("{byte:02x}")).concat();
    let filler = "61".repeat(4000);
    let rows = format!("SELECT x'000000fe00000000' UNION ALL SELECT x'0000fe{columns}' UNION ALL SELECT x'{filler}'");
    for tear in [Tear::Transaction, Tear::Reader] {
        door.pace.send_replace(Pace::AtOnce);
        let (mut tx, mut reader) = match tear {
            Tear::Transaction => (Some(db.begin().await.unwrap()), None),
            Tear::Reader => (None, Some(db.reader().await.unwrap())),
        };
        let conn = match (&mut tx, &mut reader) {
            (Some(tx), _) => &mut **tx,
            (_, reader) => &mut **reader.as_mut().unwrap(),
        };
        door.pace.send_replace(Pace::ToTheFirstRow);
        let read = timeout(Duration::from_millis(200), MySql::execute(conn, rows.clone())).await;
        assert!(read.is_err(), "nothing was torn");
        drop((tx, reader));
        // By then, the drop waits for what is left.
        tokio::time::sleep(Duration::from_millis(100)).await;
        door.pace.send_replace(Pace::AtOnce);
        timeout(PATIENCE, db.begin()).await.unwrap().unwrap().rollback().await.unwrap();
    }
    world.end(db).await;
}

/// The holder of the torn connection.
enum Tear {
    Transaction,
    Reader,
}

/// The twin: sqlx alone returns connections that are out of step, so the check can fail.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_look_like_answers_are_believed_by_plain_sqlx() {
    let world = World::<MySql>::new().await;
    let door = Door::<MySql>::open(&world.options).await;
    let pool = PoolOptions::<MySql>::new().max_connections(1).connect_with(door.through.clone()).await.unwrap();
    let mut is_caught = false;
    for after in IN_THE_ROWS {
        let mut tx = pool.begin().await.unwrap();
        door.pace.send_replace(Pace::ByteByByte);
        cut(write::<MySql>(&mut tx, ROWS.replace('#', "1")), Some(after)).await;
        door.pace.send_replace(Pace::AtOnce);
        drop(tx);
        let number = i64::from(after);
        let probe = AssertUnwindSafe(async {
            let mut tx = pool.begin().await?;
            let answer = MySql::numbers(&mut tx, format!("SELECT CAST({number} AS SIGNED)")).await?;
            world.insert(&mut tx, number).await?;
            tx.commit().await?;
            Ok::<_, sqlx::Error>(answer == [number])
        });
        let probed = timeout(Duration::from_secs(2), probe.catch_unwind()).await;
        if !matches!(probed, Ok(Ok(Ok(true)))) || !world.committed().await.contains(&number) {
            is_caught = true;
            break;
        }
    }
    assert!(is_caught, "plain sqlx passes, so the check shows nothing");
    drop(timeout(Duration::from_secs(1), pool.close()).await);
    world.run(format!("DROP TABLE {}", world.table)).await;
}
