//! The testbed's binary.

fn main() {}
