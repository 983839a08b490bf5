//! The daily window in which a location takes off-peak work, in the location's own time zone.

use std::{fmt, str::FromStr};

use jiff::{Timestamp, civil::Time, tz::TimeZone};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Why a text is no window.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not an off-peak window: write two different local times, such as `22:00-06:00` or `22:00:30-06:00`"
)]
pub struct InvalidWindow(String);

/// A daily window: from `start` (included) to `end` (excluded), past midnight where `end` is the smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffPeakWindow {
    start: Time,
    end: Time,
}

impl OffPeakWindow {
    /// A window between two different local times.
    ///
    /// # Errors
    /// The times are equal: an empty window and a whole day look the same.
    pub fn new(start: Time, end: Time) -> Result<Self, InvalidWindow> {
        if start == end { Err(InvalidWindow(format!("{start}-{end}"))) } else { Ok(Self { start, end }) }
    }

    /// Whether `now` is inside the window in `zone`.
    pub fn contains(&self, now: Timestamp, zone: &TimeZone) -> bool {
        let time = now.to_zoned(zone.clone()).time();
        if self.start < self.end {
            self.start <= time && time < self.end
        } else {
            time >= self.start || time < self.end
        }
    }

    /// Seconds from `now` until the window opens; 0 inside it. A change to or from daylight saving time in
    /// between moves the opening by as much, so this is a prediction.
    pub fn opens_in_s(&self, now: Timestamp, zone: &TimeZone) -> u64 {
        if self.contains(now, zone) {
            return 0;
        }
        let since_midnight = |time: Time| {
            i64::from(time.hour()) * 3_600 + i64::from(time.minute()) * 60 + i64::from(time.second())
        };
        let time = now.to_zoned(zone.clone()).time();
        u64::try_from((since_midnight(self.start) - since_midnight(time)).rem_euclid(86_400)).unwrap_or(0)
    }
}

impl utoipa::PartialSchema for OffPeakWindow {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        utoipa::openapi::ObjectBuilder::new()
            .schema_type(utoipa::openapi::schema::Type::String)
            .description(Some("Daily window in local time, such as `22:00-06:00`"))
            .examples(["22:00-06:00"])
            .into()
    }
}

impl utoipa::ToSchema for OffPeakWindow {}

impl FromStr for OffPeakWindow {
    type Err = InvalidWindow;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidWindow(text.into());
        let (start, end) = text.split_once('-').ok_or_else(invalid)?;
        let time = |part: &str| part.trim().parse::<Time>().map_err(|_| invalid());
        Self::new(time(start)?, time(end)?).map_err(|_| invalid())
    }
}

impl fmt::Display for OffPeakWindow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.start, self.end)
    }
}

impl Serialize for OffPeakWindow {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for OffPeakWindow {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: &str) -> Timestamp {
        format!("2026-11-24T{time}Z").parse().unwrap()
    }

    #[test]
    fn a_window_may_cross_midnight() {
        let window: OffPeakWindow = "22:00-06:00".parse().unwrap();
        let inside = |time| window.contains(at(time), &TimeZone::UTC);
        assert!(inside("22:00:00") && inside("23:59:59") && inside("00:00:00") && inside("05:59:59"));
        assert!(!inside("06:00:00") && !inside("21:59:59"));
        assert_eq!(window.opens_in_s(at("21:59:50"), &TimeZone::UTC), 10);
        assert_eq!(window.opens_in_s(at("03:00:00"), &TimeZone::UTC), 0);
    }

    #[test]
    fn a_window_is_in_the_time_of_the_location() {
        let window: OffPeakWindow = "01:00-05:00".parse().unwrap();
        let tokyo = TimeZone::fixed(jiff::tz::offset(9));
        assert!(window.contains(at("17:00:00"), &tokyo));
        assert!(!window.contains(at("02:00:00"), &tokyo));
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for bad in ["", "22:00", "22:00-25:00", "22:00-22:00", "night"] {
            assert!(bad.parse::<OffPeakWindow>().unwrap_err().to_string().contains("`22:00-06:00`"));
        }
    }
}
