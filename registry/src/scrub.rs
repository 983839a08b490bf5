//! Re-hashes what is stored.

use anyplace_model::Bytes;
use serde::Deserialize;

/// Re-hashing of what is stored.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubConfig {
    /// Most bytes that are read in a second.
    pub rate: Bytes,
}

impl Default for ScrubConfig {
    fn default() -> Self {
        ScrubConfig { rate: Bytes(32 << 20) }
    }
}
