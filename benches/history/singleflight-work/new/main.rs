//! The group of 0.6, whose keys have a type of their own.

#[path = "../case.rs"]
mod case;

use async_singleflight::UnaryGroup;
use futures_util::future::BoxFuture;

impl case::Flight for UnaryGroup<u8, u32> {
    fn work<'a>(&'a self, job: BoxFuture<'a, u32>) -> BoxFuture<'a, u32> {
        Box::pin(UnaryGroup::work(self, &0, job))
    }
}

fn main() {
    case::explore(UnaryGroup::<u8, u32>::new);
}
