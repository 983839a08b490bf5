//! The anyplace command.
fn main() {}
