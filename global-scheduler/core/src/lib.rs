//! Decides how many copies of what run in which location (pure).
