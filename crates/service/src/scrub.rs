//! Settings of whoever reads again, in the background, all that is kept.

use anyplace_model::{Bytes, DurationMs};
use serde::Deserialize;

/// How often everything that a role keeps is read again, and how fast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubConfig {
    /// How often everything is read; 0 for never.
    pub every: DurationMs,
    /// Most bytes that are read in a second; never 0.
    #[serde(deserialize_with = "rate")]
    pub rate: Bytes,
}

impl Default for ScrubConfig {
    fn default() -> Self {
        Self { every: DurationMs(30 * 24 * 3_600_000), rate: Bytes(32 << 20) }
    }
}

fn rate<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Bytes, D::Error> {
    match Bytes::deserialize(from)? {
        Bytes(0) => {
            Err(serde::de::Error::custom("scrub.rate is 0; to never scrub, set scrub.every = \"0s\""))
        }
        rate => Ok(rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_of_nothing_is_refused_with_the_fix() {
        let error = toml::from_str::<ScrubConfig>("rate = \"0\"").unwrap_err().to_string();
        assert!(error.contains("scrub.rate is 0") && error.contains("scrub.every = \"0s\""), "{error}");
        assert_eq!(toml::from_str::<ScrubConfig>("").unwrap(), ScrubConfig::default());
    }
}
