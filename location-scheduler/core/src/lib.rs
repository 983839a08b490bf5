//! Decides which machine runs which instance (pure).
