//! Quantities with units. A quantity without its unit is refused, because `memory: 512` has meant bytes, MiB and
//! MB in one platform or another.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is no quantity: what was found, and what to write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{found}` is not {expected}")]
pub struct InvalidQuantity {
    found: String,
    expected: &'static str,
}

const CPU_EXPECTED: &str = "a CPU quantity: write cores such as `2` or `0.5`, or thousandths such as `500m`";
const BYTES_EXPECTED: &str = "a size: write a number with a unit, such as `512Mi`, `2Gi` or `10GB`";
const DURATION_EXPECTED: &str =
    "a duration: write a number with a unit, such as `500ms`, `10s`, `5m` or `1h`";

/// Thousandths of a CPU core.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, example = "500m")]
pub struct MilliCpu(pub u64);

/// A size in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, example = "256Mi")]
pub struct Bytes(pub u64);

/// A duration in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, utoipa::ToSchema)]
#[schema(value_type = String, example = "10s")]
pub struct DurationMs(pub u64);

impl DurationMs {
    /// The same as the standard library's type.
    pub const fn to_std(self) -> std::time::Duration {
        std::time::Duration::from_millis(self.0)
    }
}

const BYTE_UNITS: [(&str, u64); 12] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

const DURATION_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Splits `12.5Gi` into thousandths of the number and the unit; at most three decimals, no sign.
fn split_number(text: &str) -> Option<(u64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.len() > 3 || number.ends_with('.') {
        return None;
    }
    let thousandths = format!("{fraction:0<3}").parse::<u64>().ok()?;
    let milli = whole.parse::<u64>().ok()?.checked_mul(1_000)?.checked_add(thousandths)?;
    Some((milli, unit.trim()))
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let (milli, unit) = split_number(text)?;
    if unit.is_empty() && milli == 0 {
        return Some(0);
    }
    let (_, factor) = units.iter().find(|(name, _)| *name == unit)?;
    u64::try_from(u128::from(milli) * u128::from(*factor) / 1_000).ok()
}

impl FromStr for MilliCpu {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = match split_number(text.trim()) {
            Some((milli, "")) => Some(milli),
            Some((milli, "m")) if milli % 1_000 == 0 => Some(milli / 1_000),
            _ => None,
        };
        parsed.map(Self).ok_or_else(|| InvalidQuantity { found: text.into(), expected: CPU_EXPECTED })
    }
}

impl FromStr for Bytes {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        scaled(text.trim(), &BYTE_UNITS)
            .map(Self)
            .ok_or_else(|| InvalidQuantity { found: text.into(), expected: BYTES_EXPECTED })
    }
}

impl FromStr for DurationMs {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        scaled(text.trim(), &DURATION_UNITS)
            .map(Self)
            .ok_or_else(|| InvalidQuantity { found: text.into(), expected: DURATION_EXPECTED })
    }
}

impl fmt::Display for MilliCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1_000) {
            f.pad(&(self.0 / 1_000).to_string())
        } else {
            f.pad(&format!("{}m", self.0))
        }
    }
}

impl fmt::Display for Bytes {
    /// Exact: the largest unit that divides the value, so that text and value convert both ways without loss.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |units: &[(&str, u64)]| {
            units
                .iter()
                .rev()
                .find(|(_, size)| self.0 != 0 && self.0.is_multiple_of(*size))
                .map(|(unit, size)| format!("{}{unit}", self.0 / size))
        };
        let text = exact(&BYTE_UNITS[..4]).or_else(|| exact(&BYTE_UNITS[8..]));
        match (text, self.0) {
            (Some(text), _) => f.pad(&text),
            (None, 0) => f.pad("0"),
            // Thousandths of a kB are bytes.
            (None, bytes) => f.pad(&format!("{}.{:03}kB", bytes / 1_000, bytes % 1_000)),
        }
    }
}

impl fmt::Display for DurationMs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, size) = DURATION_UNITS
            .iter()
            .rev()
            .find(|(_, size)| self.0.is_multiple_of(*size) && self.0 >= *size)
            .unwrap_or(&("ms", 1));
        f.pad(&format!("{}{unit}", self.0 / size))
    }
}

macro_rules! as_text {
    ($name:ident, $expected:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $name;
                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expected)
                    }
                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$name, E> {
                        text.parse().map_err(E::custom)
                    }
                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                    fn visit_i64<E: de::Error>(self, number: i64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                    fn visit_f64<E: de::Error>(self, number: f64) -> Result<$name, E> {
                        number.to_string().parse().map_err(E::custom)
                    }
                }
                deserializer.deserialize_any(Visitor)
            }
        }
    };
}

as_text!(MilliCpu, CPU_EXPECTED);
as_text!(Bytes, BYTES_EXPECTED);
as_text!(DurationMs, DURATION_EXPECTED);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_read_and_their_absence_is_refused() {
        assert_eq!("500m".parse(), Ok(MilliCpu(500)));
        assert_eq!("1.5".parse(), Ok(MilliCpu(1_500)));
        assert_eq!("256Mi".parse(), Ok(Bytes(256 << 20)));
        assert_eq!("1.5GB".parse(), Ok(Bytes(1_500_000_000)));
        assert_eq!("0".parse(), Ok(Bytes(0)));
        assert_eq!("5m".parse(), Ok(DurationMs(300_000)));
        for bad in ["512", "-1Gi", "1 G i", "Gi", "1.Gi", "99999999999Ti", "1gi"] {
            let error = bad.parse::<Bytes>().unwrap_err().to_string();
            assert!(error.contains("write a number with a unit"), "{error}");
        }
        for bad in ["0.5m", "1k", "-1", "", "1e3"] {
            assert!(bad.parse::<MilliCpu>().is_err(), "{bad}");
        }
    }

    #[test]
    fn text_and_value_convert_both_ways_without_loss() {
        for bytes in [0, 1, 999, 1_000, 1_024, 1_025, 1_500_000, 3 << 30, u64::MAX / 2_000] {
            assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)), "{bytes}");
        }
        for milli in [0, 1, 500, 1_000, 1_001] {
            assert_eq!(MilliCpu(milli).to_string().parse(), Ok(MilliCpu(milli)));
        }
        for ms in [0, 1, 999, 1_000, 60_000, 61_000, 86_400_000] {
            assert_eq!(DurationMs(ms).to_string().parse(), Ok(DurationMs(ms)));
        }
    }
}
