//! The share of the processor that a run is granted: a little more than it asked for, relatively less for larger
//! requests.
//!
//! Owns the curve. Never: the limits of a container, which the shell sets.

use std::str::FromStr;

/// Most points of a curve.
const POINTS_MAX: usize = 16;

/// The curve from requested to granted thousandths of a core: piecewise linear through its points, and proportional
/// before the first and beyond the last point.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Headroom {
    points: Vec<(u32, u32)>,
}

impl Default for Headroom {
    /// The default curve: 2 cores become 2.2, 5 become 5.3.
    fn default() -> Self {
        Self { points: vec![(2000, 2200), (5000, 5300)] }
    }
}

impl Headroom {
    /// Thousandths of a core granted to a run that asked for `asked_millis`; never less. 0 means no wish and stays 0.
    pub fn granted_millis(&self, asked_millis: u32) -> u32 {
        let asked = u64::from(asked_millis);
        let points = || self.points.iter().map(|(at, grant)| (u64::from(*at), u64::from(*grant)));
        let below = points().take_while(|(at, _)| *at <= asked).last();
        let above = points().find(|(at, _)| *at >= asked);
        let granted = match (below, above) {
            (Some((at, grant)), Some((next, next_grant))) if next > at => {
                let (rise, run) = (next_grant.saturating_sub(grant), next - at);
                grant + (rise * (asked - at) + run / 2) / run
            }
            (Some((at, grant)), _) | (None, Some((at, grant))) => (grant * asked + at / 2) / at.max(1),
            (None, None) => asked,
        };
        u32::try_from(granted.max(asked)).unwrap_or(u32::MAX)
    }
}

impl FromStr for Headroom {
    type Err = String;

    /// Parses `2:2.2,5:5.3`: cores requested and cores granted. An empty text grants what is requested.
    fn from_str(text: &str) -> Result<Self, String> {
        let points: Vec<(u32, u32)> =
            text.split(',').filter(|point| !point.trim().is_empty()).map(point).collect::<Result<_, _>>()?;
        if points.len() > POINTS_MAX {
            return Err(format!("a head-room curve has at most {POINTS_MAX} points, this one has {}", points.len()));
        }
        let rises = |pair: &[(u32, u32)]| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1;
        if !points.windows(2).all(rises) {
            return Err(format!("the points of '{text}' do not rise: give them as in 2:2.2,5:5.3"));
        }
        Ok(Self { points })
    }
}

fn point(text: &str) -> Result<(u32, u32), String> {
    let wrong = || format!("'{text}' is no point of a head-room curve: give cores asked and granted as in 2:2.2");
    let (asked, granted) = text.split_once(':').ok_or_else(wrong)?;
    let (asked, granted) = (millis(asked).ok_or_else(wrong)?, millis(granted).ok_or_else(wrong)?);
    if granted < asked {
        return Err(format!("'{text}' grants less than was asked"));
    }
    Ok((asked, granted))
}

/// A positive number of cores, in thousandths.
fn millis(cores: &str) -> Option<u32> {
    let millis = cores.trim().parse::<f64>().ok()? * 1000.0;
    (0.5..1e9).contains(&millis).then_some(millis.round() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cores_become_two_point_two_and_five_become_five_point_three() {
        let curve = Headroom::default();
        assert_eq!(curve.granted_millis(2000), 2200);
        assert_eq!(curve.granted_millis(5000), 5300);
    }

    #[test]
    fn between_the_points_it_is_a_straight_line() {
        let curve = Headroom::default();
        assert_eq!(curve.granted_millis(3000), 3233);
        assert_eq!(curve.granted_millis(3500), 3750);
        assert_eq!(curve.granted_millis(4000), 4267);
    }

    #[test]
    fn beyond_the_points_the_nearest_ones_proportion_holds() {
        let curve = Headroom::default();
        assert_eq!(curve.granted_millis(1000), 1100);
        assert_eq!(curve.granted_millis(500), 550);
        assert_eq!(curve.granted_millis(10_000), 10_600);
        assert_eq!(curve.granted_millis(u32::MAX), u32::MAX);
    }

    #[test]
    fn no_wish_is_no_limit() {
        assert_eq!(Headroom::default().granted_millis(0), 0);
    }

    #[test]
    fn a_curve_is_written_as_pairs() {
        assert_eq!("2:2.2, 5:5.3".parse(), Ok(Headroom::default()));
        assert_eq!("".parse::<Headroom>().map(|curve| curve.granted_millis(1234)), Ok(1234));
        let error = |text: &str| text.parse::<Headroom>().expect_err("it must not parse");
        assert_eq!(error("5:5.3,2:2.2"), "the points of '5:5.3,2:2.2' do not rise: give them as in 2:2.2,5:5.3");
        assert_eq!(error("2:1"), "'2:1' grants less than was asked");
        assert_eq!(error("two"), "'two' is no point of a head-room curve: give cores asked and granted as in 2:2.2");
        assert!(error("0:1").starts_with("'0:1' is no point"));
        assert!(error("1:NaN").starts_with("'1:NaN' is no point"));
    }
}
