//! A reqwest client with one deadline and bounded load, and a circuit breaker that cannot stick.
