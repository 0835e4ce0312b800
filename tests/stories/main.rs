//! The stories: what users see, told on real parts.

fn main() {}
