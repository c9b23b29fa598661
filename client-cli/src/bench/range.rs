//! From `A[:B[:STEP]]` to the levels of a sweep; also percentages. Owns which ranges are sensible. Never runs anything.

/// Most levels in one sweep: a thousand take more than four hours with default windows.
const LEVELS_MAX: usize = 1000;

/// Most requests under way in a closed loop, the same as for one `submit`.
pub(crate) const CONCURRENCY_MAX: u32 = 1024;

/// Most requests per second, far beyond what one process can send.
const RATE_MAX: f64 = 100_000.0;

/// Fewest requests per second: one in 1000 s. With fewer no window would contain one.
const RATE_MIN: f64 = 0.001;

/// The levels of a sweep, numbers of requests under way or rates, in the order of measuring.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Levels<T>(pub(crate) Vec<T>);

/// Start, limit and resolution of a search for the highest rate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct SearchRange {
    /// The first rate tried.
    pub(crate) start: f64,
    /// The highest rate tried.
    pub(crate) bound: f64,
    /// The search ends when the answer is known to this precision.
    pub(crate) resolution: f64,
}

/// Parses `4`, `1:16`, `1:16:5`, `1:64:x2`.
pub(crate) fn parse_concurrency(text: &str) -> Result<Levels<u32>, String> {
    let advice = |why: String| {
        format!("{why}: write A, A:B, A:B:STEP or A:B:xFACTOR, whole numbers from 1 to {CONCURRENCY_MAX}")
    };
    let levels = levels(text).map_err(advice)?;
    let whole = levels.iter().map(|level| {
        let is_whole = level.fract() == 0.0 && (1.0..=f64::from(CONCURRENCY_MAX)).contains(level);
        if is_whole { Ok(*level as u32) } else { Err(advice(format!("{level} requests at a time is not a level"))) }
    });
    Ok(Levels(whole.collect::<Result<_, _>>()?))
}

/// Parses `200`, `100:500`, `100:500:50`, `10:1000:x2`, in requests per second.
pub(crate) fn parse_rates(text: &str) -> Result<Levels<f64>, String> {
    let advice = |why: String| {
        format!("{why}: write A, A:B, A:B:STEP or A:B:xFACTOR, requests per second from {RATE_MIN} to {RATE_MAX}")
    };
    let levels = levels(text).map_err(advice)?;
    match levels.iter().find(|rate| !is_rate(**rate)) {
        Some(wrong) => Err(advice(format!("{wrong} requests per second is not a rate"))),
        None => Ok(Levels(levels)),
    }
}

/// Parses `START:BOUND` or `START:BOUND:RESOLUTION`, in requests per second. Default resolution: bound/50.
pub(crate) fn parse_search(text: &str) -> Result<SearchRange, String> {
    let advice = |why: &str| {
        format!("{why}: write START:BOUND or START:BOUND:RESOLUTION in requests per second, as in 10:1000:5")
    };
    let parts: Vec<f64> = text.split(':').map(number).collect::<Result<_, _>>().map_err(|why| advice(&why))?;
    let (start, bound, resolution) = match parts[..] {
        [start, bound] => (start, bound, bound / 50.0),
        [start, bound, resolution] => (start, bound, resolution),
        _ => return Err(advice(&format!("'{text}' is not a range to search in"))),
    };
    if !is_rate(start) || !is_rate(bound) || bound < start {
        return Err(advice("the search needs two rates above 0, the lower one first"));
    }
    // A millionth of the bound is finer than any clock here, and keeps the search short.
    if resolution < bound * 1e-6 || resolution > bound {
        return Err(advice("the resolution must be above 0 and at most the bound"));
    }
    Ok(SearchRange { start, bound, resolution })
}

/// Parses `5%` or `0.1%` into a part of 1.
pub(crate) fn parse_percent(text: &str) -> Result<f64, String> {
    let advice = || format!("'{text}' is not a percentage: write 5% or 0.1%");
    let percent: f64 = text.strip_suffix('%').ok_or_else(advice)?.trim().parse().map_err(|_| advice())?;
    if (0.0..=100.0).contains(&percent) { Ok(percent / 100.0) } else { Err(advice()) }
}

fn is_rate(rate: f64) -> bool {
    (RATE_MIN..=RATE_MAX).contains(&rate)
}

fn number(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err(format!("'{text}' is not a number")),
    }
}

fn levels(text: &str) -> Result<Vec<f64>, String> {
    let parts: Vec<&str> = text.split(':').collect();
    let (first, last, step) = match parts[..] {
        [only] => return Ok(vec![number(only)?]),
        [first, last] => (first, last, "1"),
        [first, last, step] => (first, last, step),
        _ => return Err(format!("'{text}' has too many parts")),
    };
    let (first, last) = (number(first)?, number(last)?);
    if last < first {
        return Err(format!("the range {text} ends before it begins"));
    }
    let next: Box<dyn Fn(usize) -> f64> = match step.strip_prefix('x') {
        Some(factor) => {
            let factor = number(factor)?;
            if factor <= 1.0 || first == 0.0 {
                return Err(format!("the factor of {text} does not lead upwards"));
            }
            Box::new(move |index| round_to_sense(first * factor.powi(index as i32)))
        }
        None => {
            let step = number(step)?;
            if step == 0.0 {
                return Err(format!("the step of {text} is 0"));
            }
            Box::new(move |index| round_to_sense(first + step * index as f64))
        }
    };
    let levels: Vec<f64> = (0..=LEVELS_MAX).map(next).take_while(|level| *level <= last).collect();
    if levels.len() > LEVELS_MAX {
        return Err(format!("{text} has more than {LEVELS_MAX} levels"));
    }
    Ok(levels)
}

/// Rounds off what adding and multiplying leave after the sixth digit: 0.1 + 0.2 becomes 0.3.
fn round_to_sense(level: f64) -> f64 {
    (level * 1e6).round() / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_list_of_levels() {
        assert_eq!(parse_concurrency("4"), Ok(Levels(vec![4])));
        assert_eq!(parse_concurrency("1:4"), Ok(Levels(vec![1, 2, 3, 4])));
        assert_eq!(parse_concurrency("1:16:5"), Ok(Levels(vec![1, 6, 11, 16])));
        assert_eq!(parse_concurrency("1:20:x2"), Ok(Levels(vec![1, 2, 4, 8, 16])));
        assert_eq!(parse_rates("0.1:0.3:0.1"), Ok(Levels(vec![0.1, 0.2, 0.3])));
        assert_eq!(parse_rates("100:250:100"), Ok(Levels(vec![100.0, 200.0])));
    }

    #[test]
    fn nonsense_is_told_with_the_way_out() {
        for (text, named) in [
            ("", "'' is not a number"),
            ("0", "0 requests at a time is not a level"),
            ("1.5", "1.5 requests"),
            ("8:4", "ends before it begins"),
            ("1:4:0", "the step of 1:4:0 is 0"),
            ("1:4:x1", "does not lead upwards"),
            ("1:2:3:4", "too many parts"),
            ("1:9999", "more than 1000 levels"),
            ("-1", "'-1' is not a number"),
            ("4096", "from 1 to 1024"),
        ] {
            let error = parse_concurrency(text).unwrap_err();
            assert!(error.contains(named) && error.contains("write A, A:B"), "{text}: {error}");
        }
        for text in ["0", "inf", "nan", "1e9", "1:1e30:x10", "0:10:x2"] {
            assert!(parse_rates(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_search_knows_where_to_begin_and_when_to_stop() {
        let range = parse_search("10:1000").unwrap();
        assert_eq!((range.start, range.bound, range.resolution), (10.0, 1000.0, 20.0));
        assert_eq!(parse_search("10:1000:5").unwrap().resolution, 5.0);
        for wrong in ["10", "1000:10", "0:10", "10:1000:0", "10:1000:2000", "1:2:3:4", "a:b"] {
            assert!(parse_search(wrong).unwrap_err().contains("as in 10:1000:5"), "{wrong}");
        }
    }

    #[test]
    fn percentages_carry_their_sign() {
        assert_eq!(parse_percent("5%"), Ok(0.05));
        assert_eq!(parse_percent("0%"), Ok(0.0));
        for wrong in ["5", "", "%", "101%", "-1%", "nan%"] {
            assert!(parse_percent(wrong).is_err(), "{wrong}");
        }
    }
}
