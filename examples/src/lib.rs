//! What the programs of this package share.
//!
//! They need more dependencies than the crates do, and no build of a single crate or of the demo includes those.

pub mod bank;
pub mod crawler;
pub mod scope;
pub mod ticks;

// The examples of the front page and of the book compile. They are tested here because no published package contains
// those pages.
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
