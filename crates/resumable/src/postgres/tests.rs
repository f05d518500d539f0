//! The moment of a take-over, over and over: with the fence of this crate, and with a check before the write.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgPool, Row, postgres::PgPoolOptions};

use super::{
    job::{self, Offer},
    leases::{Append, Claimed, Leases},
    schema,
    session::Bounds,
};
use crate::log::{Header, Identity};

const RACERS: u32 = 4;
const MINUTE: Duration = Duration::from_secs(60);

struct Race {
    schema: String,
    pool: PgPool,
    leases: Leases,
    job: i64,
}

/// How a zombie appends to a range that is being taken over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zombie {
    Fenced,
    /// It looks whether the range is still its own, and then writes.
    ChecksFirst,
}

impl Race {
    async fn new(ranges: usize, what: &str) -> Self {
        let url = std::env::var("CANCEL_SAFE_TEST_POSTGRES_URL").expect("run cargo xtask test resumable");
        let pool = PgPoolOptions::new().max_connections(RACERS).connect(&url).await.unwrap();
        let (schema, bounds) = (format!("race_{what}_{}", std::process::id()), Bounds::new(MINUTE));
        schema::ensure(&pool, &bounds, &schema).await.unwrap();
        let header = Header {
            salt: 1,
            codec: 1,
            identity: Identity::Position,
            job: "race".to_owned(),
            version: "1".to_owned(),
            result_type: "u64".to_owned(),
        };
        let offer = Offer { header, accepted: Vec::new(), chain: vec![7; ranges], range_items: 1 };
        let job = job::open(&pool, &bounds, &schema, &offer).await.unwrap();
        let leases = Leases::new(pool.clone(), bounds, &schema, job.id, "racer", Duration::from_secs(3600));
        Self { schema, pool, leases, job: job.id }
    }

    async fn run(&self, sql: &str) -> u64 {
        let sql = sql.replace("{s}", &self.schema);
        sqlx::query(AssertSqlSafe(sql)).persistent(false).execute(&self.pool).await.unwrap().rows_affected()
    }

    /// A zombie appends to the lowest range while a successor takes it over. Returns how many of the two recorded it.
    async fn take_over(&self, zombie: Zombie) -> usize {
        let [held] = <[Claimed; 1]>::try_from(self.leases.claim(1, &[]).await.unwrap()).unwrap();
        // Its lease is over now, and it does not know.
        self.run(&format!("UPDATE {{s}}.range SET lease_until = 'epoch', owner = 'zombie' WHERE n = {}", held.n)).await;
        let late = async {
            tokio::time::sleep(Duration::from_micros(fastrand::u64(..600))).await;
            match zombie {
                Zombie::Fenced => self.leases.append(&[append(&held)]).await.unwrap().len(),
                Zombie::ChecksFirst => self.check_then_insert(&held).await,
            }
        };
        let successor = async {
            tokio::time::sleep(Duration::from_micros(fastrand::u64(..300))).await;
            match self.leases.claim(1, &[]).await.unwrap().first() {
                Some(range) if range.n == held.n => self.leases.append(&[append(range)]).await.unwrap().len(),
                // The zombie was first, and the next range is not part of this race.
                _ => 0,
            }
        };
        let (late, successor) = tokio::join!(late, successor);
        self.run(&format!("UPDATE {{s}}.range SET finished = true WHERE n <= {}", held.n)).await;
        self.run("UPDATE {s}.range SET lease_until = NULL, owner = NULL WHERE NOT finished").await;
        late + successor
    }

    async fn check_then_insert(&self, held: &Claimed) -> usize {
        let Claimed { n, epoch, .. } = held;
        let check = format!("UPDATE {{s}}.range SET n = n WHERE n = {n} AND epoch = {epoch}");
        if self.run(&check).await == 0 {
            return 0;
        }
        let insert = format!(
            "INSERT INTO {{s}}.block (job, n, seq, epoch, body) SELECT id, {n}, 1000, {epoch}, '' FROM {{s}}.job"
        );
        self.run(&insert).await as usize
    }

    async fn doubles(&self) -> i64 {
        let sql = format!(
            "SELECT count(*) FROM (SELECT n FROM {}.block GROUP BY n HAVING count(*) > 1) doubled",
            self.schema
        );
        sqlx::query(AssertSqlSafe(sql)).persistent(false).fetch_one(&self.pool).await.unwrap().get(0)
    }

    async fn end(self) {
        self.run("DROP SCHEMA {s} CASCADE").await;
    }
}

fn append(range: &Claimed) -> Append {
    Append { n: range.n, epoch: range.epoch, seq: range.seq, done: 1, quarantined: 0, body: vec![1] }
}

fn races() -> usize {
    if std::env::var("CANCEL_SAFE_CAMPAIGN").is_ok_and(|form| form == "full") { 300 } else { 20 }
}

#[tokio::test]
async fn of_a_zombie_and_its_successor_exactly_one_records_the_range() {
    let race = Race::new(races() * 2 + 2, "fence").await;
    for _ in 0..races() {
        assert_eq!(race.take_over(Zombie::Fenced).await, 1, "a range is recorded by neither, or by both");
    }
    assert_eq!(race.doubles().await, 0);
    race.end().await;
}

/// Between the check and the write there is time for a whole take-over: sooner or later it happens.
#[tokio::test]
async fn the_same_race_catches_a_check_before_the_write() {
    let race = Race::new(4000, "twin").await;
    let mut caught = 0;
    for _ in 0..1500 {
        caught += usize::from(race.take_over(Zombie::ChecksFirst).await > 1);
        if caught > 0 {
            break;
        }
    }
    assert!(caught > 0, "the broken twin must be caught");
    assert!(race.doubles().await > 0);
    race.end().await;
}

/// A worker frozen between its append and its COMMIT holds the row, but only up to a bound that the server enforces.
#[tokio::test]
async fn a_worker_frozen_before_its_commit_holds_its_range_no_longer_than_its_bound() {
    let race = Race::new(1, "frozen").await;
    for (bound, is_taken_over) in [(60 * MINUTE, false), (Duration::from_secs(3), true)] {
        let [held] = <[Claimed; 1]>::try_from(race.leases.claim(1, &[]).await.unwrap()).unwrap();
        let mut frozen = super::session::Tx::begin(&race.pool, &Bounds::new(bound)).await.unwrap();
        race.leases.append_on(frozen.connection().unwrap(), &[append(&held)]).await.unwrap();
        // Not the row it holds, because changing that would wait: its lease is not committed yet.
        let mut claimed = 0;
        for _ in 0..if is_taken_over { 60_000 } else { 20 } {
            claimed = race.leases.claim(1, &[]).await.unwrap().len();
            if claimed > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(claimed == 1, is_taken_over, "with a bound of {bound:?}");
        drop(frozen);
        race.run("UPDATE {s}.range SET lease_until = NULL, owner = NULL").await;
    }
    race.end().await;
}

/// Its keeper renews the leases before it hears that the last item of a range is done.
#[tokio::test]
async fn a_range_that_was_finished_a_moment_ago_is_renewed_and_not_lost() {
    let race = Race::new(2, "finished").await;
    let held = race.leases.claim(2, &[]).await.unwrap();
    let pairs: Vec<_> = held.iter().map(|range| (range.n, range.epoch)).collect();
    assert_eq!(race.leases.append(&[append(&held[0])]).await.unwrap(), [held[0].n]);
    let mut kept = race.leases.heartbeat(&pairs).await.unwrap();
    kept.sort_unstable();
    assert_eq!(kept, [0, 1]);
    let leased = race.run("UPDATE {s}.range SET n = n WHERE lease_until IS NOT NULL").await;
    assert_eq!(leased, 1, "nobody holds what is finished");
    // The epoch still decides.
    let others: Vec<_> = pairs.iter().map(|(n, epoch)| (*n, epoch - 1)).collect();
    assert!(race.leases.heartbeat(&others).await.unwrap().is_empty());
    race.end().await;
}

/// A commit in flight holds the row: until it arrives or fails, nobody knows whether the block is there.
#[tokio::test]
async fn who_looks_for_a_block_waits_for_the_commit_that_may_bring_it() {
    let race = Race::new(2, "look").await;
    let held = race.leases.claim(2, &[]).await.unwrap();
    for (range, is_committed) in held.iter().zip([true, false]) {
        let appends = [append(range)];
        let mut late = super::session::Tx::begin(&race.pool, &Bounds::new(60 * MINUTE)).await.unwrap();
        race.leases.append_on(late.connection().unwrap(), &appends).await.unwrap();
        let mut look = std::pin::pin!(race.leases.look(&appends));
        let early = tokio::time::timeout(Duration::from_millis(500), look.as_mut()).await;
        assert!(early.is_err(), "it was said to be there, or not, before anybody knew: {early:?}");
        if is_committed {
            late.commit().await.unwrap();
        } else {
            drop(late);
        }
        let there = tokio::time::timeout(MINUTE, look).await.unwrap().unwrap();
        assert_eq!(there, if is_committed { vec![range.n] } else { vec![] });
    }
    race.end().await;
}

#[tokio::test]
async fn results_are_read_in_pages_of_whole_ranges() {
    let race = Race::new(20, "pages").await;
    // Three ranges with two blocks each, of a kilobyte, and then some without.
    for range in race.leases.claim(3, &[]).await.unwrap() {
        for seq in [0, 1] {
            let body = vec![seq as u8; 1024];
            let append = Append { n: range.n, epoch: range.epoch, seq, done: seq, quarantined: 0, body };
            assert_eq!(race.leases.append(&[append]).await.unwrap().len(), 1);
        }
    }
    let (store, job) = (super::PgStore::new(race.pool.clone()).schema(&race.schema), race.job);
    let page = async |from, bytes| {
        let ranges = super::results::read(&store, job, from, bytes).await.unwrap();
        ranges.iter().map(|range| (range.n, range.blocks.len(), range.rows)).collect::<Vec<_>>()
    };
    let whole = |n| (n, 2048, 2);
    assert_eq!(page(0, 1).await, [whole(0)], "one comes whole, however large");
    assert_eq!(page(1, 2049).await, [whole(1), whole(2)]);
    assert_eq!(page(2, 1).await, [whole(2)]);
    assert_eq!(page(3, 1).await.len(), 16);
    let all = page(0, 1 << 20).await;
    assert_eq!(all.len(), 16);
    assert_eq!(all[..4], [whole(0), whole(1), whole(2), (3, 0, 0)]);
    assert_eq!(page(16, 1 << 20).await, [(16, 0, 0), (17, 0, 0), (18, 0, 0), (19, 0, 0)]);
    assert!(page(20, 1).await.is_empty());
    race.end().await;
}
