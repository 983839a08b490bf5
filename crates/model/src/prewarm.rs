//! Wishes that machines have an image before anything asks for it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{InvalidSpec, LocationId, validate};

/// The priority of an image that something waits for; wishes have less.
pub const PRIORITY_AWAITED: u8 = u8::MAX;
/// The highest priority that a wish or a job may have.
pub const PRIORITY_MAX: u8 = 100;
/// The priority of a wish or a job that says none.
pub const DEFAULT_PRIORITY: u8 = 50;

/// An image that machines should have warm. What asks for it starts without a pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Prewarm {
    /// Image reference; the wish's name too.
    pub image: String,
    /// Only in these locations; in all of them when empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locations: Vec<LocationId>,
    /// On so many machines of each location; on all of them without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machines: Option<u32>,
    /// 0 to 100; an image of higher priority is fetched first.
    #[serde(default = "default_priority")]
    pub priority: u8,
}

pub(crate) const fn default_priority() -> u8 {
    DEFAULT_PRIORITY
}

impl Prewarm {
    /// Whether the wish is for this location too.
    pub fn covers(&self, location: &LocationId) -> bool {
        self.locations.is_empty() || self.locations.contains(location)
    }

    /// Checks what types alone don't.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn validate(&self) -> Result<(), InvalidSpec> {
        validate::image(&self.image)?;
        if self.machines == Some(0) {
            return Err(InvalidSpec::new(
                "machines",
                "0 machines would have it",
                "write 1 or more, leave it out for all, or delete the wish with `anyplace prewarm rm`",
            ));
        }
        if self.priority > PRIORITY_MAX {
            return Err(InvalidSpec::new(
                "priority",
                format!("{} is more than {PRIORITY_MAX}", self.priority),
                format!("write 0 to {PRIORITY_MAX}"),
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_says_what_is_wrong_with_it() {
        let parse = |text: &str| serde_json::from_str::<Prewarm>(text).unwrap();
        let wish = parse(r#"{"image":"app:v1"}"#);
        assert_eq!((wish.priority, wish.machines), (50, None));
        wish.validate().unwrap();
        assert!(wish.covers(&"ams".parse().unwrap()));
        for (text, field) in [
            (r#"{"image":""}"#, "image"),
            (r#"{"image":"a b"}"#, "image"),
            (r#"{"image":"a","machines":0}"#, "machines"),
            (r#"{"image":"a","priority":101}"#, "priority"),
        ] {
            assert_eq!(parse(text).validate().unwrap_err().field, field, "{text}");
        }
        assert!(!parse(r#"{"image":"a","locations":["nrt"]}"#).covers(&"ams".parse().unwrap()));
    }
}
