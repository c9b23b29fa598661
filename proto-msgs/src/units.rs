//! Owns times and sizes as people write them, alike in every program: `500ms`, `1.5s`, `2m`, `10GiB`, `512MiB`.
//!
//! Never guesses: a number without a unit is refused, since one person means bytes by it and another megabytes.

use std::time::Duration;

/// A longer time is a typing error, and would overflow sums later.
const DURATION_MAX: Duration = Duration::from_secs(365 * 24 * 3600);

/// Above this a float no longer counts single bytes.
const SIZE_BYTES_MAX: f64 = (1_u64 << 53) as f64;

/// Reads a time: `500ms`, `1.5s`, `2m`, `1h`, `3d`.
///
/// # Errors
/// If the text is not a time, or is longer than a year.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time up to a year: write 500ms, 1.5s, 2m or 1h");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let seconds_each = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(wrong()),
    };
    let duration = Duration::try_from_secs_f64(number * seconds_each).map_err(|_| wrong())?;
    if duration > DURATION_MAX { Err(wrong()) } else { Ok(duration) }
}

/// Reads a size in bytes: `512MiB`, `1.5G` (powers of 1024), `2GB` (powers of 1000), `4096B`.
///
/// # Errors
/// If the text is not a size, or is larger than 2⁵³ bytes.
pub fn size_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size: write 512MiB, 1.5GiB, 2GB or, for single bytes, 4096B");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let bytes_each = match unit {
        "B" => 1.0,
        "K" | "Ki" | "KiB" => 1024.0,
        "M" | "Mi" | "MiB" => 1024_f64.powi(2),
        "G" | "Gi" | "GiB" => 1024_f64.powi(3),
        "T" | "Ti" | "TiB" => 1024_f64.powi(4),
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => return Err(wrong()),
    };
    let bytes = number * bytes_each;
    if bytes > SIZE_BYTES_MAX { Err(wrong()) } else { Ok(bytes as u64) }
}

/// A size as a person reads it: `1.5 GiB`, `12.0 MiB`, `7 B`.
pub fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    // 1023.95 would be shown as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Number and unit, which may have a space between them.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let (number, unit) = text.split_at(unit_at);
    Some((number.parse().ok()?, unit.trim_start()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_carry_a_unit() {
        let read = ["500ms", "1.5s", "2m", "1 h", "3d"].map(|text| duration(text).unwrap().as_millis());
        assert_eq!(read, [500, 1_500, 120_000, 3_600_000, 259_200_000]);
        for wrong in ["", "5", "s", "-1s", "1y", "1.2.3s", "366d", "99999999999999999999d"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_tell_powers_of_two_from_powers_of_ten_and_carry_a_unit() {
        let read = ["1GiB", "1.5G", "2MB", "0.5 MiB", "17B"].map(|text| size_bytes(text).unwrap());
        assert_eq!(read, [1 << 30, 3 << 29, 2_000_000, 512 << 10, 17]);
        for wrong in ["", "4096", "GiB", "1XB", "-1B", "99999999TiB"] {
            assert!(size_bytes(wrong).is_err(), "{wrong}");
        }
        assert_eq!([7, 1536, 1 << 20, (1 << 30) - 1].map(show_bytes), ["7 B", "1.5 KiB", "1.0 MiB", "1.0 GiB"]);
    }
}
