//! The pool of 0.2, which counts a place when it begins to fill it.

#[path = "../case.rs"]
mod case;

use case::{Maker, PLACES};
use deadpool::{Manager, Pool};

struct Slow(Maker);

#[async_trait::async_trait]
impl Manager<(), ()> for Slow {
    async fn create(&self) -> Result<(), ()> {
        self.0.make().await;
        Ok(())
    }

    async fn recycle(&self, (): ()) -> Result<(), ()> {
        Ok(())
    }
}

fn main() {
    case::explore(|| Pool::new(Slow(Maker::default()), PLACES), async |pool| pool.get().await.is_ok());
}
