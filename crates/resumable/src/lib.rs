//! Long computations that can stop anywhere and go on from there.
