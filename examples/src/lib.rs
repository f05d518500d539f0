//! What the programs of this package share.
//!
//! They need more than the crates do: their dependencies are in no build of a crate by itself, nor in the demo's.

pub mod bank;
pub mod crawler;
pub mod scope;
pub mod ticks;

// The examples of the front page and of the book compile. Here, because no package could hold the pages.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../README.md")]
    struct Readme;
    #[doc = include_str!("../../docs/src/dropping.md")]
    struct Dropping;
    #[doc = include_str!("../../docs/src/kubernetes.md")]
    struct Kubernetes;
    #[doc = include_str!("../../docs/src/migrating.md")]
    struct Migrating;
    #[doc = include_str!("../../docs/src/recipes.md")]
    struct Recipes;
    #[doc = include_str!("../../docs/src/testing.md")]
    struct Testing;
}
