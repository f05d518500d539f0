//! Applications, workers and task groups that end in order, by the deadline, and say how.
