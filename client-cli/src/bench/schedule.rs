//! Due times of an open loop's requests. Owns rates, seeded random numbers (so that a run can be repeated) and files of
//! times. Never waits: a schedule is a list of times from the beginning of a level.

/// Most lines of a schedule file: an hour at 250 per second.
const LINES_MAX: usize = 1_000_000;

/// Latest time in a schedule file, in ms: a day.
const MS_MAX: f64 = 24.0 * 3600.0 * 1000.0;

/// One request of a schedule.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Arrival {
    /// Due time, from the beginning of the level.
    pub(crate) at_us: u64,
    /// Items in the request.
    pub(crate) items: u32,
}

/// How requests follow each other at a rate.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Distribution {
    /// The same time between any two
    #[default]
    Constant,
    /// As independent users send: exponentially distributed times between two
    Poisson,
}

/// Requests at a rate, without end.
pub(crate) fn at_rate(
    rate: f64,
    distribution: Distribution,
    items: u32,
    seed: u64,
) -> impl Iterator<Item = Arrival> + Send {
    let gap_us = 1e6 / rate;
    let mut chance = Chance(seed);
    let mut at_us = 0.0;
    (0_u64..).map(move |number| {
        let arrival = Arrival { at_us: at_us as u64, items };
        // A constant rate is multiplied, not added up: a million small rounding errors would be a drift.
        at_us = match distribution {
            Distribution::Constant => (number + 1) as f64 * gap_us,
            Distribution::Poisson => at_us - chance.above_0().ln() * gap_us,
        };
        arrival
    })
}

/// Parses a schedule: per line a time in ms from the beginning and optionally a number of items; `#` begins a comment.
///
/// # Errors
/// If a line is invalid; the text names the line and the error.
pub(crate) fn parse(text: &str, items: u32, items_max: u32) -> Result<Vec<Arrival>, String> {
    let mut arrivals: Vec<Arrival> = Vec::new();
    // Spreadsheets begin a file with a mark of its encoding.
    for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
        let line = line.split_once('#').map_or(line, |(line, _)| line);
        let mut words = line.split([' ', '\t', ',']).filter(|word| !word.is_empty());
        let Some(time) = words.next() else { continue };
        let at_ms: f64 = time.parse().map_err(|_| format!("line {number}: '{time}' is not a time in ms"))?;
        if !(0.0..=MS_MAX).contains(&at_ms) {
            return Err(format!("line {number}: {time} ms is out of range: use 0 to {MS_MAX}"));
        }
        let items = match words.next() {
            None => items,
            Some(word) => match word.parse() {
                Ok(items) if (1..=items_max).contains(&items) => items,
                _ => return Err(format!("line {number}: '{word}' is not a number of items from 1 to {items_max}")),
            },
        };
        if let Some(more) = words.next() {
            return Err(format!("line {number}: '{more}' is one word too many: write TIME_MS [ITEMS]"));
        }
        let at_us = (at_ms * 1e3).round() as u64;
        if arrivals.last().is_some_and(|last| last.at_us > at_us) {
            return Err(format!("line {number}: {time} ms is before the line above: sort the times"));
        }
        arrivals.push(Arrival { at_us, items });
        if arrivals.len() > LINES_MAX {
            return Err(format!("more than {LINES_MAX} times: cut the schedule"));
        }
    }
    if arrivals.is_empty() { Err("no time in it: write one per line, in ms".to_owned()) } else { Ok(arrivals) }
}

/// SplitMix64: short, passes the usual tests, and gives the same numbers on every machine.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A uniform number, above 0 and up to 1, so that its logarithm is finite.
    fn above_0(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(rate: f64, distribution: Distribution, seed: u64, count: usize) -> Vec<u64> {
        at_rate(rate, distribution, 1, seed).take(count).map(|arrival| arrival.at_us).collect()
    }

    #[test]
    fn a_constant_rate_does_not_drift() {
        assert_eq!(times(200.0, Distribution::Constant, 1, 4), [0, 5_000, 10_000, 15_000]);
        let last = at_rate(3.0, Distribution::Constant, 1, 1).nth(3_000_000).unwrap();
        assert_eq!(last.at_us, 1_000_000_000_000, "a million seconds, to the microsecond");
    }

    #[test]
    fn independent_users_come_at_the_rate_but_not_evenly() {
        let count = 100_000;
        let times = times(1000.0, Distribution::Poisson, 7, count + 1);
        let gaps: Vec<f64> = times.windows(2).map(|pair| (pair[1] - pair[0]) as f64).collect();
        let mean = gaps.iter().sum::<f64>() / count as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count as f64;
        assert!((mean / 1000.0 - 1.0).abs() < 0.02, "mean gap {mean} µs");
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.02, "an exponential distribution varies by its mean");
    }

    #[test]
    fn a_seed_repeats_its_run() {
        let run = |seed| times(50.0, Distribution::Poisson, seed, 100);
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn a_file_of_times_is_read() {
        let read = parse("\u{feff}# warm-up\n0\n10.5 4\n\n10.5,2 # two at once\n", 1, 64).unwrap();
        let arrival = |at_us, items| Arrival { at_us, items };
        assert_eq!(read, [arrival(0, 1), arrival(10_500, 4), arrival(10_500, 2)]);
    }

    #[test]
    fn a_wrong_line_is_named() {
        for (text, named) in [
            ("", "no time in it"),
            ("0\nsoon", "line 2: 'soon' is not a time in ms"),
            ("-1", "line 1: -1 ms is out of range"),
            ("NaN", "line 1: NaN ms is out of range"),
            ("5\n4", "line 2: 4 ms is before the line above"),
            ("5 0", "'0' is not a number of items from 1 to 64"),
            ("5 65", "'65' is not a number of items"),
            ("5 1 x", "'x' is one word too many"),
        ] {
            let error = parse(text, 1, 64).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
