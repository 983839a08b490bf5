//! Places on the globe.

/// Mean radius of the earth in kilometres.
const EARTH_RADIUS_KM: f64 = 6_371.0;

/// Great-circle distance between two places in degrees north and east (haversine), in kilometres.
pub fn distance_km(from: (f64, f64), to: (f64, f64)) -> f64 {
    let (from_north, to_north) = (from.0.to_radians(), to.0.to_radians());
    let north = ((to_north - from_north) / 2.0).sin();
    let east = ((to.1 - from.1).to_radians() / 2.0).sin();
    let chord = north * north + from_north.cos() * to_north.cos() * east * east;
    2.0 * EARTH_RADIUS_KM * chord.clamp(0.0, 1.0).sqrt().asin()
}

/// There and back through fibre that is half as long again as the great circle.
const MS_PER_KM: f64 = 1.5 / 100.0;
/// What the ends add.
const ENDS_MS: f64 = 0.5;

/// The round trip between two locations in milliseconds, where nobody has measured it.
pub fn estimated_latency_ms(distance_km: f64) -> f64 {
    ENDS_MS + distance_km * MS_PER_KM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_those_of_the_globe() {
        let (ams, nrt) = ((52.31, 4.76), (35.76, 140.39));
        assert!((distance_km(ams, nrt) - 9_340.0).abs() < 60.0, "{}", distance_km(ams, nrt));
        assert!(distance_km(ams, ams) < 0.001);
        assert!((distance_km((0.0, 179.5), (0.0, -179.5)) - 111.2).abs() < 0.5, "across the date line");
    }
}
