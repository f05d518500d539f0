//! The cost of BEGIN, UPDATE, COMMIT in a guard, as a ratio to the same in tuned sqlx. The variants take turns in
//! blocks, and the ratio is the median over the turns, so that other load on the machine affects all of them.

use std::time::{Duration, Instant};

use cancel_safe_tx_guard::{CommitMode, Reset, TxPool};
use futures_util::future::LocalBoxFuture;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, PgPool, Postgres};

use crate::measure::{Place, Table, far_away, order, quantile};

/// A limit that no transaction here approaches.
const LIMIT: Duration = Duration::from_secs(5);

struct Variant<'a> {
    name: &'static str,
    run: Box<dyn Fn() -> LocalBoxFuture<'a, ()> + 'a>,
    /// Seconds per transaction, block by block.
    blocks: Vec<f64>,
}

impl<'a> Variant<'a> {
    fn new<F: Future<Output = ()> + 'a>(name: &'static str, run: impl Fn() -> F + 'a) -> Self {
        Self { name, run: Box::new(move || Box::pin(run())), blocks: Vec::new() }
    }
}

async fn tuned(options: PgConnectOptions) -> PgPool {
    PgPoolOptions::new().max_connections(2).test_before_acquire(false).connect_with(options).await.unwrap()
}

async fn measure(
    options: PgConnectOptions,
    place: &Place,
    turns: usize,
    block: usize,
) -> Vec<(&'static str, f64, f64)> {
    let plain = tuned(options.clone()).await;
    let as_it_comes = PgPoolOptions::new().max_connections(2).connect_with(options.clone()).await.unwrap();
    let owned = TxPool::<Postgres>::builder().max_connections(2).connect_with(options.clone()).await.unwrap();
    let unasked = TxPool::<Postgres>::builder().max_connections(2).reset(Reset::None);
    let unasked = unasked.connect_with(options.clone()).await.unwrap();
    let below = tuned(options).await;
    let wrapped = TxPool::wrap(below.clone());
    let sql = |row: i64| AssertSqlSafe(place.update(row));
    let sqlx = async |pool: &PgPool, row: i64| {
        let mut tx = pool.begin().await.unwrap();
        sqlx::query(sql(row)).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    };
    let guarded = async |db: &TxPool<Postgres>, row: i64| {
        let mut tx = db.begin().await.unwrap();
        sqlx::query(sql(row)).execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
    };
    let mut variants = [
        Variant::new("sqlx, tuned", || sqlx(&plain, 1)),
        Variant::new("sqlx, as it comes", || sqlx(&as_it_comes, 2)),
        Variant::new("guard, verified commit", || guarded(&owned, 3)),
        Variant::new("guard with limits, verified commit", async || {
            let run = owned.tx().timeout(LIMIT).run(async |tx| {
                sqlx::query(sql(4)).execute(&mut **tx).await?;
                Ok::<_, sqlx::Error>(())
            });
            run.await.unwrap();
        }),
        Variant::new("guard, `Reset::None`, verified commit", || guarded(&unasked, 7)),
        Variant::new("guard, resolvable commit", async || {
            let mut tx = owned.begin().await.unwrap();
            tx.set_commit_mode(CommitMode::Resolvable);
            sqlx::query(sql(6)).execute(&mut *tx).await.unwrap();
            tx.commit().await.unwrap();
        }),
        Variant::new("guard on a wrapped pool, verified commit", || guarded(&wrapped, 5)),
    ];
    let count = variants.len();
    for turn in 0..turns + 1 {
        for index in order(turn, count) {
            let variant = &mut variants[index];
            let start = Instant::now();
            for _ in 0..block {
                (variant.run)().await;
            }
            // The first turn warms everything up.
            if turn > 0 {
                variant.blocks.push(start.elapsed().as_secs_f64() / block as f64);
            }
        }
    }
    let base = variants[0].blocks.clone();
    let result = variants
        .iter()
        .map(|variant| {
            let ratios: Vec<f64> = variant.blocks.iter().zip(&base).map(|(ours, theirs)| ours / theirs).collect();
            (variant.name, quantile(&ratios, 0.5), quantile(&variant.blocks, 0.5))
        })
        .collect();
    drop(variants);
    plain.close().await;
    as_it_comes.close().await;
    below.close().await;
    for db in [owned, unasked, wrapped] {
        assert!(db.close(LIMIT).await.is_clean());
    }
    result
}

pub(crate) async fn run(url: &str) {
    let place = Place::open(url, 10).await;
    let near = measure(place.options.clone(), &place, 31, 100).await;
    let far = measure(far_away(&place.options, Duration::from_micros(500)), &place, 15, 12).await;
    println!("BEGIN, UPDATE, COMMIT: medians of ratios to tuned sqlx, and of milliseconds");
    let mut table = Table::new(&["", "loopback", "", "round trip of 1 ms", ""]);
    for ((name, ratio, time), (_, far_ratio, far_time)) in near.into_iter().zip(far) {
        table.row([
            name.to_owned(),
            format!("{ratio:.2} ×"),
            format!("{:.3} ms", time * 1e3),
            format!("{far_ratio:.2} ×"),
            format!("{:.2} ms", far_time * 1e3),
        ]);
    }
    table.print();
    place.close().await;
}
