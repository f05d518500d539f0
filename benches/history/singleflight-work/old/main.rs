//! The group of 0.5, whose keys are strings.

#[path = "../case.rs"]
mod case;

use async_singleflight::UnaryGroup;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

impl case::Flight for UnaryGroup<u32> {
    fn work<'a>(&'a self, job: BoxFuture<'a, u32>) -> BoxFuture<'a, u32> {
        UnaryGroup::work(self, "key", job).map(|(result, _)| result).boxed()
    }
}

fn main() {
    case::explore(UnaryGroup::<u32>::new);
}
