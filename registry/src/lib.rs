//! An OCI distribution registry over object storage, with a pull-through cache.
