//! The pool of 0.13, whose places are the permits of a semaphore.

#[path = "../case.rs"]
mod case;

use case::{Maker, PLACES};
use deadpool::managed::{Manager, Metrics, Pool, RecycleResult};

struct Slow(Maker);

impl Manager for Slow {
    type Type = ();
    type Error = ();

    async fn create(&self) -> Result<(), ()> {
        self.0.make().await;
        Ok(())
    }

    async fn recycle(&self, (): &mut (), _metrics: &Metrics) -> RecycleResult<()> {
        Ok(())
    }
}

fn main() {
    let pool = || Pool::<Slow>::builder(Slow(Maker::default())).max_size(PLACES).build().expect("it has no timeouts");
    case::explore(pool, async |pool| pool.get().await.is_ok());
}
