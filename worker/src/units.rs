//! Durations and sizes as people write them on a command line: `500ms`, `1s`, `2m`, `10GiB`, `512MiB`.
//!
//! Never guesses: a number without a unit is refused where the unit would matter.

use std::time::Duration;

/// A text that is no duration or no size.
#[derive(Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum UnitError {
    #[error("'{0}' is no duration: write 500ms, 1s, 2m or 1h")]
    Duration(String),
    #[error("'{0}' is no size: write 512MiB, 10GiB, 1GB or a number of bytes with B")]
    Size(String),
}

/// Reads a duration.
pub(crate) fn duration(text: &str) -> Result<Duration, UnitError> {
    let wrong = || UnitError::Duration(text.to_owned());
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let micros_each = match unit {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        "m" | "min" => 60e6,
        "h" => 3600e6,
        _ => return Err(wrong()),
    };
    // Longer than a year is a slip of the finger, and would overflow sums further on.
    const MICROS_MAX: f64 = 365.0 * 86_400e6;
    let micros = number * micros_each;
    if micros > MICROS_MAX { Err(wrong()) } else { Ok(Duration::from_micros(micros as u64)) }
}

/// Reads a size in bytes.
pub(crate) fn size_bytes(text: &str) -> Result<u64, UnitError> {
    let wrong = || UnitError::Size(text.to_owned());
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let bytes_each: u64 = match unit {
        "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1000 * 1000,
        "GB" => 1000 * 1000 * 1000,
        "TB" => 1000 * 1000 * 1000 * 1000,
        "KiB" | "K" => 1 << 10,
        "MiB" | "M" => 1 << 20,
        "GiB" | "G" => 1 << 30,
        "TiB" | "T" => 1 << 40,
        _ => return Err(wrong()),
    };
    let bytes = number * bytes_each as f64;
    // Beyond 2^53 a float no longer counts single bytes.
    if bytes > (1_u64 << 53) as f64 { Err(wrong()) } else { Ok(bytes as u64) }
}

/// A size as a person reads it.
pub(crate) fn show_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

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
    fn durations_carry_a_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["1", "s", "", "-1s", "1 fortnight", "99999999999h", "1..2s"] {
            assert_eq!(duration(wrong), Err(UnitError::Duration(wrong.to_owned())));
        }
    }

    #[test]
    fn sizes_tell_powers_of_two_from_powers_of_ten() {
        assert_eq!(size_bytes("10GiB"), Ok(10 << 30));
        assert_eq!(size_bytes("1GB"), Ok(1_000_000_000));
        assert_eq!(size_bytes("0.5 MiB"), Ok(512 << 10));
        assert!(size_bytes("12").is_err());
        assert!(size_bytes("99999999TiB").is_err());
        assert_eq!(show_bytes(1536), "1.5 KiB");
        assert_eq!(show_bytes(12), "12 B");
    }
}
