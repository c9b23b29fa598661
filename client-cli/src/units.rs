//! Times, sizes, cores and percentages for people. Units that other programs of the mesh read are in `proto_msgs`.

use std::time::Duration;

pub(crate) use proto_msgs::units::{duration, show_bytes, size_bytes};

/// Parses cores into thousandths: `2`, `0.5`, `500m`.
pub(crate) fn parse_cpu(text: &str) -> Result<u32, String> {
    let advice = || format!("'{text}' is not a number of cores: write 2, 0.5 or 500m");
    let millis = match text.strip_suffix('m') {
        Some(millis) => millis.parse::<f64>().map_err(|_| advice())?,
        None => text.parse::<f64>().map_err(|_| advice())? * 1000.0,
    };
    if (1.0..=1e7).contains(&millis) { Ok(millis.round() as u32) } else { Err(advice()) }
}

/// Parses a part of a whole into thousandths: `5%`, `0.5%`, `0.05`.
pub(crate) fn parse_permille(text: &str) -> Result<u16, String> {
    let advice = || format!("'{text}' is not a part of a whole: write 5%, 0.5% or 0.05, at most 100%");
    let (number, thousandths) = match text.strip_suffix('%') {
        Some(percent) => (percent, 10.0),
        None => (text, 1000.0),
    };
    let permille = number.trim().parse::<f64>().map_err(|_| advice())? * thousandths;
    if !(0.0..=1000.0).contains(&permille) {
        return Err(advice());
    }
    whole_permille(permille / 1000.0).ok_or_else(|| format!("'{text}' is too fine: the smallest step is 0.1%"))
}

/// A part of 1 in thousandths, as the broker takes it; `None` if it is no whole number of them.
pub(crate) fn whole_permille(part: f64) -> Option<u16> {
    let permille = part * 1000.0;
    // What people write is off by some last bits of an `f64`.
    ((permille - permille.round()).abs() < 1e-6).then_some(permille.round() as u16)
}

/// Thousandths as a percentage: `5%`, `0.5%`.
pub(crate) fn percent(permille: u32) -> String {
    if permille.is_multiple_of(10) {
        format!("{}%", permille / 10)
    } else {
        format!("{}.{}%", permille / 10, permille % 10)
    }
}

/// A time for people: `850 µs`, `4.2 ms`, `12 ms`, `4.56 s`, `3m07s`, `2h05m`, `3d04h`.
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
    fn times_are_written() {
        let written = [850, 4_200, 9_960, 12_300, 999_960, 4_560_000, 187_000_000, 7_500_000_000, 273_600_000_000];
        let read = ["850 µs", "4.2 ms", "10 ms", "12 ms", "1.00 s", "4.56 s", "3m07s", "2h05m", "3d04h"];
        assert_eq!(written.map(|micros| time(Duration::from_micros(micros))), read);
    }

    #[test]
    fn parts_are_read() {
        assert_eq!([parse_permille("5%"), parse_permille("0.5%"), parse_permille("0.05")], [Ok(50), Ok(5), Ok(50)]);
        assert_eq!([50, 5, 1000].map(percent), ["5%", "0.5%", "100%"]);
        for wrong in ["", "%", "-1%", "101%", "5", "NaN"] {
            assert!(parse_permille(wrong).unwrap_err().contains("write 5%"), "{wrong}");
        }
        for fine in ["0.01%", "2.55%", "0.0001", "99.99%"] {
            assert!(parse_permille(fine).unwrap_err().ends_with("the smallest step is 0.1%"), "{fine}");
        }
        // Every step that there is has its name.
        assert!((0..=1000).all(|permille| parse_permille(&percent(permille.into())) == Ok(permille)));
    }

    #[test]
    fn cores_are_read() {
        assert_eq!([parse_cpu("2"), parse_cpu("0.5"), parse_cpu("250m")], [Ok(2000), Ok(500), Ok(250)]);
        for wrong in ["", "0", "-1", "x", "1e9", "NaN"] {
            assert!(parse_cpu(wrong).is_err(), "{wrong}");
        }
    }
}
