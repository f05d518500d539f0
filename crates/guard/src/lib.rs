//! Drop guards, cancel scopes with critical sections, and a reaper that finishes what its caller dropped.
