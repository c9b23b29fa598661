//! Times, sizes and cores as people write and read them.

use std::time::Duration;

/// `500ms`, `1.5s`, `2m`, `1h`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let advice = || format!("'{text}' is no time: write 500ms, 1.5s, 2m or 1h");
    let digits = text.find(|character: char| !character.is_ascii_digit() && character != '.').ok_or_else(advice)?;
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(advice()),
    };
    let number: f64 = number.parse().map_err(|_| advice())?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| advice())
}

/// `1GiB`, `512MiB`, `1.5G` (1024 each), `2GB` (1000 each), `4096`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let advice = || format!("'{text}' is no size: write 512MiB, 1.5GiB, 2GB or a number of bytes");
    let digits = text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let bytes = match unit.trim() {
        "" | "B" => 1.0,
        "K" | "KiB" | "Ki" => 1024.0,
        "M" | "MiB" | "Mi" => 1024_f64.powi(2),
        "G" | "GiB" | "Gi" => 1024_f64.powi(3),
        "T" | "TiB" | "Ti" => 1024_f64.powi(4),
        "KB" | "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => return Err(advice()),
    };
    let number: f64 = number.parse().map_err(|_| advice())?;
    let total = number * bytes;
    // Above this a size is a slip of the finger.
    if total > 1e18 { Err(advice()) } else { Ok(total as u64) }
}

/// Cores in thousandths: `2`, `0.5`, `500m`.
pub(crate) fn parse_cpu(text: &str) -> Result<u32, String> {
    let advice = || format!("'{text}' is no number of cores: write 2, 0.5 or 500m");
    let millis = match text.strip_suffix('m') {
        Some(millis) => millis.parse::<f64>().map_err(|_| advice())?,
        None => text.parse::<f64>().map_err(|_| advice())? * 1000.0,
    };
    if (1.0..=1e7).contains(&millis) { Ok(millis.round() as u32) } else { Err(advice()) }
}

/// Thousandths: `5%`, `0.5%`, `0.05`.
pub(crate) fn parse_permille(text: &str) -> Result<u16, String> {
    let advice = || format!("'{text}' is no part of a whole: write 5%, 0.5% or 0.05, at most 100%");
    let (number, thousandths) = match text.strip_suffix('%') {
        Some(percent) => (percent, 10.0),
        None => (text, 1000.0),
    };
    let permille = number.trim().parse::<f64>().map_err(|_| advice())? * thousandths;
    if (0.0..=1000.0).contains(&permille) { Ok(permille.round() as u16) } else { Err(advice()) }
}

/// `5%`, `0.5%`.
pub(crate) fn percent(permille: u32) -> String {
    if permille.is_multiple_of(10) {
        format!("{}%", permille / 10)
    } else {
        format!("{}.{}%", permille / 10, permille % 10)
    }
}

/// `1.5 GiB`, `12.0 MiB`, `7 B`.
pub(crate) fn size(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would be shown as 1024.0.
    while value >= 1023.95 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", units[unit])
}

/// `850 µs`, `4.2 ms`, `12 ms`, `4.56 s`, `3m07s`, `2h05m`, `3d04h`.
pub(crate) fn time(duration: Duration) -> String {
    let (seconds, micros) = (duration.as_secs(), duration.as_micros());
    match seconds {
        0 if micros < 1000 => format!("{micros} µs"),
        0 if micros < 9_950 => format!("{:.1} ms", micros as f64 / 1e3),
        0 if micros < 999_500 => format!("{:.0} ms", micros as f64 / 1e3),
        0..60 => format!("{:.2} s", duration.as_secs_f64()),
        60..3600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60),
        _ => format!("{}d{:02}h", seconds / 86400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for wrong in ["", "5", "ms", "-1s", "1 s", "1y", "1.2.3s", "99999999999999999999d"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
        let written = [850, 4_200, 9_960, 12_300, 999_960, 4_560_000, 187_000_000, 7_500_000_000, 273_600_000_000];
        let read = ["850 µs", "4.2 ms", "10 ms", "12 ms", "1.00 s", "4.56 s", "3m07s", "2h05m", "3d04h"];
        assert_eq!(written.map(|micros| time(Duration::from_micros(micros))), read);
    }

    #[test]
    fn sizes_are_read_and_written() {
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert_eq!(parse_size("2MB"), Ok(2_000_000));
        assert_eq!(parse_size("17"), Ok(17));
        for wrong in ["", "GiB", "1XB", "-1", "9999999999TiB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert_eq!([7, 1536, 1 << 20, (1 << 30) - 1].map(size), ["7 B", "1.5 KiB", "1.0 MiB", "1.0 GiB"]);
    }

    #[test]
    fn parts_are_read() {
        assert_eq!([parse_permille("5%"), parse_permille("0.5%"), parse_permille("0.05")], [Ok(50), Ok(5), Ok(50)]);
        assert_eq!([50, 5, 1000].map(percent), ["5%", "0.5%", "100%"]);
        for wrong in ["", "%", "-1%", "101%", "5", "NaN"] {
            assert!(parse_permille(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn cores_are_read() {
        assert_eq!([parse_cpu("2"), parse_cpu("0.5"), parse_cpu("250m")], [Ok(2000), Ok(500), Ok(250)]);
        for wrong in ["", "0", "-1", "x", "1e9", "NaN"] {
            assert!(parse_cpu(wrong).is_err(), "{wrong}");
        }
    }
}
