//! sqlx transactions that end when they are dropped, and say how they ended.
