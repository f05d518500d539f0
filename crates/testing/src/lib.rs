//! Drops a future at every await point, deterministically, and checks what is left behind.
