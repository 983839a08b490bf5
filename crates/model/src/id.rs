//! Identifiers. All are DNS labels, so that they can be host names, path segments and metric labels unescaped;
//! each kind is its own type, so that swapped arguments don't compile.

use std::{borrow::Borrow, fmt, str::FromStr};

use serde::{Deserialize, Serialize, de};

/// The longest DNS label (RFC 1035, 2.3.4).
const MAX_LABEL_BYTES: usize = 63;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{found}` is not a valid {kind}: use 1 to 63 lower-case letters, digits and `-`, beginning and ending with a letter or digit"
)]
pub struct InvalidId {
    kind: &'static str,
    found: String,
}

fn is_label(text: &str) -> bool {
    let bytes = text.as_bytes();
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=MAX_LABEL_BYTES).contains(&bytes.len())
        && bytes.iter().all(|byte| alphanumeric(byte) || *byte == b'-')
        && bytes.first().is_some_and(alphanumeric)
        && bytes.last().is_some_and(alphanumeric)
}

macro_rules! identifier {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, utoipa::ToSchema)]
        #[serde(transparent)]
        #[schema(value_type = String, pattern = "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$", example = "example-1")]
        pub struct $name(String);

        impl $name {
            /// Accepts a DNS label.
            ///
            /// # Errors
            /// The text is no DNS label.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
                let text = text.into();
                if is_label(&text) { Ok(Self(text)) } else { Err(InvalidId { kind: $kind, found: text }) }
            }

            /// The identifier as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Self::new(text)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::new(String::deserialize(deserializer)?).map_err(de::Error::custom)
            }
        }
    };
}

identifier!(
    /// A deployment, unique in the platform.
    DeploymentName,
    "deployment name"
);
identifier!(
    /// A batch job, unique in the platform.
    JobName,
    "job name"
);
identifier!(
    /// A location: one site with machines, a location scheduler and a registry.
    LocationId,
    "location name"
);
identifier!(
    /// A machine, unique in its location.
    MachineId,
    "machine name"
);
identifier!(
    /// One running copy of a deployment, or one attempt of a job; never used twice.
    InstanceId,
    "instance name"
);
identifier!(
    /// A team: owns deployments and jobs, and has the quota.
    Team,
    "team name"
);

impl Default for Team {
    fn default() -> Self {
        Self("default".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_accepted_and_others_are_refused_with_the_rule() {
        for good in ["a", "hello", "a-1", &"x".repeat(63)] {
            assert!(DeploymentName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a_b", "a.b", "ä", &"x".repeat(64)] {
            let error = DeploymentName::new(bad).unwrap_err().to_string();
            assert!(error.contains("not a valid deployment name: use 1 to 63"), "{error}");
        }
    }
}
