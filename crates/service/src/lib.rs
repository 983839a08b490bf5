//! What every daemon does alike: loads its configuration, logs, serves HTTP with bearer tokens and problem+json
//! errors, publishes watch streams, retries, and shuts down in order.
//!
//! This crate must not know what is scheduled, routed or stored.

mod auth;
mod config;
mod feed;
mod files;
mod http;
mod retry;
mod runtime;
mod scrub;

pub use auth::{TokenHash, bearer, generate_token, load_or_create_token, read_token};
pub use config::{ConfigError, load_config};
pub use feed::Feed;
pub use files::write_atomically;
pub use http::{Failure, Json, Query, healthz, not_found, serve, text_stream};
pub use retry::Backoff;
pub use runtime::{init_logging, install_crypto_provider, shutdown_signal, unix_epoch};
pub use scrub::ScrubConfig;
