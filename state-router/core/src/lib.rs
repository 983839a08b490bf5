//! Chooses the backends of each bucket of a virtual IP (pure).
