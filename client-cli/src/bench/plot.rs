//! Latency over load as a picture. Owns axes and lines. Never: the meaning of the numbers.

use std::fmt::Write;

/// Size and margins of the picture, in pixels.
const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 60.0;

/// Ratio of highest to lowest latency above which the axis is logarithmic: one of them would lie on a linear axis.
const LINEAR_FACTOR_MAX: f64 = 30.0;

/// Colours that are readable on white and for most colour-blind people.
const COLORS: [&str; 3] = ["#0072b2", "#e69f00", "#d55e00"];

/// One line of the picture.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) name: &'static str,
    /// Load and latency in ms, sorted by load.
    pub(crate) points: Vec<(f64, f64)>,
}

/// The data of one picture.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    pub(crate) title: String,
    /// The label of the horizontal axis, with its unit.
    pub(crate) load: &'static str,
    /// At most three lines.
    pub(crate) lines: Vec<Line>,
    pub(crate) threshold_ms: Option<f64>,
}

/// The mapping from values to pixels.
#[derive(Clone, Copy, Debug)]
struct Axis {
    least: f64,
    most: f64,
    is_log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let place = |value: f64| if self.is_log { value.max(self.least).log10() } else { value };
        let span = place(self.most) - place(self.least);
        let part = if span > 0.0 { (place(value) - place(self.least)) / span } else { 0.5 };
        self.from + (self.to - self.from) * part
    }

    /// Round values for the axis, at most about ten.
    fn ticks(&self) -> Vec<f64> {
        if self.is_log {
            let powers = self.least.log10().floor() as i32..=self.most.log10().ceil() as i32;
            let steps = powers.flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)));
            return steps.filter(|tick| (self.least..=self.most).contains(tick)).collect();
        }
        let step = round_step(self.most - self.least);
        let first = (self.least / step).ceil() as i64;
        (first..first + 16).map(|tick| tick as f64 * step).take_while(|tick| *tick <= self.most * 1.000_001).collect()
    }
}

/// A step of 1, 2 or 5 times a power of ten, so that five to ten steps make up the span.
fn round_step(span: f64) -> f64 {
    if span <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf((span / 10.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    steps.into_iter().find(|step| span / step <= 10.0).unwrap_or(10.0 * power)
}

/// The picture as an SVG document; without points it has only axes.
pub(crate) fn svg(picture: &Picture) -> String {
    let points = || picture.lines.iter().flat_map(|line| line.points.iter().copied());
    let loads = points().map(|(load, _)| load);
    let latencies = || points().map(|(_, ms)| ms).chain(picture.threshold_ms).filter(|ms| *ms > 0.0);
    let most = latencies().fold(0.0, f64::max);
    let most = if most > 0.0 { most } else { 1.0 };
    let least = latencies().fold(most, f64::min);
    let is_log = most > least * LINEAR_FACTOR_MAX;
    // Space above, and below if the axis does not begin at 0.
    let (least, most) = if is_log { (least / 1.5, most * 1.5) } else { (0.0, most * 1.08) };
    let y = Axis { least, most, is_log, from: HEIGHT - BOTTOM, to: TOP };
    let (first, last) = loads.fold((f64::MAX, 0.0), |(first, last), load| (load.min(first), load.max(last)));
    let (first, last) = if first > last { (0.0, 1.0) } else { (first, last) };
    let x = Axis { least: first, most: last, is_log: false, from: LEFT + 12.0, to: WIDTH - RIGHT - 12.0 };

    let mut out = String::new();
    head(&mut out, picture);
    axes(&mut out, picture, x, y);
    if let Some(ms) = picture.threshold_ms {
        let at = y.at(ms);
        let (to, over) = (WIDTH - RIGHT, at - 5.0);
        put(
            &mut out,
            format_args!(
                r##"<line x1="{LEFT}" y1="{at:.1}" x2="{to}" y2="{at:.1}" stroke="#c00" stroke-dasharray="6 4"/>"##
            ),
        );
        let label = text(&format!("threshold {}", number(ms)));
        put(
            &mut out,
            format_args!(r##"<text x="{to}" y="{over:.1}" text-anchor="end" fill="#c00">{label} ms</text>"##),
        );
    }
    for (index, line) in picture.lines.iter().enumerate() {
        draw(&mut out, line, COLORS[index % COLORS.len()], index, x, y);
    }
    out.push_str("</svg>\n");
    out
}

/// Appends to the document. Writing to memory does not fail.
fn put(out: &mut String, element: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(element);
    out.push('\n');
}

fn head(out: &mut String, picture: &Picture) {
    put(
        out,
        format_args!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13">"#
        ),
    );
    put(out, format_args!(r#"<rect width="100%" height="100%" fill="white"/>"#));
    let (title, middle) = (text(&picture.title), WIDTH / 2.0);
    put(out, format_args!(r#"<text x="{middle}" y="24" text-anchor="middle" font-size="16">{title}</text>"#));
}

fn axes(out: &mut String, picture: &Picture, x: Axis, y: Axis) {
    let (right, floor) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
    for tick in y.ticks() {
        let (at, below, left) = (y.at(tick), y.at(tick) + 4.0, LEFT - 8.0);
        put(out, format_args!(r##"<line x1="{LEFT}" y1="{at:.1}" x2="{right}" y2="{at:.1}" stroke="#ddd"/>"##));
        put(out, format_args!(r#"<text x="{left}" y="{below:.1}" text-anchor="end">{}</text>"#, number(tick)));
    }
    let ticks = if x.most > x.least { x.ticks() } else { vec![x.least] };
    for tick in ticks {
        let (at, end, below) = (x.at(tick), floor + 5.0, floor + 20.0);
        put(out, format_args!(r##"<line x1="{at:.1}" y1="{floor}" x2="{at:.1}" y2="{end}" stroke="#333"/>"##));
        put(out, format_args!(r#"<text x="{at:.1}" y="{below}" text-anchor="middle">{}</text>"#, number(tick)));
    }
    put(out, format_args!(r##"<path d="M{LEFT} {TOP}V{floor}H{right}" fill="none" stroke="#333"/>"##));
    let (middle, below, aside) = ((LEFT + right) / 2.0, HEIGHT - 14.0, (TOP + floor) / 2.0);
    put(out, format_args!(r#"<text x="{middle}" y="{below}" text-anchor="middle">{}</text>"#, text(picture.load)));
    put(
        out,
        format_args!(
            r#"<text x="20" y="{aside}" text-anchor="middle" transform="rotate(-90 20 {aside})">latency (ms)</text>"#
        ),
    );
}

fn draw(out: &mut String, line: &Line, color: &str, index: usize, x: Axis, y: Axis) {
    let places: Vec<(f64, f64)> = line.points.iter().map(|(load, ms)| (x.at(*load), y.at(*ms))).collect();
    let path: Vec<String> = places.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    put(out, format_args!(r#"<polyline points="{}" fill="none" stroke="{color}" stroke-width="2"/>"#, path.join(" ")));
    for (x, y) in places {
        put(out, format_args!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{color}"/>"#));
    }
    let (at, below) = (LEFT + 16.0 + 70.0 * index as f64, TOP - 8.0);
    let (end, behind) = (at + 18.0, at + 24.0);
    let above = below - 4.0;
    put(out, format_args!(r#"<path d="M{at} {above}H{end}" stroke="{color}" stroke-width="2"/>"#));
    put(out, format_args!(r#"<text x="{behind}" y="{below}">{}</text>"#, text(line.name)));
}

/// The number with at most three decimals.
fn number(value: f64) -> String {
    let rounded = (value * 1e3).round() / 1e3;
    format!("{rounded}")
}

/// The text with markup characters escaped.
fn text(text: &str) -> String {
    let printable = crate::table::printable(text);
    printable.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(points: &[(f64, f64)]) -> Picture {
        let line = |name, factor: f64| Line { name, points: points.iter().map(|(x, y)| (*x, y * factor)).collect() };
        let lines = vec![line("p50", 1.0), line("p90", 1.5), line("p99", 2.0)];
        Picture { title: "a<b>.onnx".into(), load: "requests per second", lines, threshold_ms: Some(50.0) }
    }

    #[test]
    fn three_lines_with_axes_units_and_the_threshold() {
        let svg = svg(&picture(&[(50.0, 10.0), (100.0, 12.0), (150.0, 20.0)]));
        assert_eq!(svg.matches("<polyline").count(), 3);
        assert_eq!(svg.matches("<circle").count(), 9);
        for part in ["requests per second", "latency (ms)", "threshold 50 ms", ">p50<", ">p99<", "a&lt;b&gt;.onnx"] {
            assert!(svg.contains(part), "{part} is missing");
        }
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn one_level_or_none_is_still_a_picture() {
        for points in [&[][..], &[(1.0, 5.0)], &[(1.0, 0.0)]] {
            let svg = svg(&Picture { threshold_ms: None, ..picture(points) });
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn a_higher_latency_is_drawn_higher_on_either_scale() {
        for most in [20.0, 20_000.0] {
            let axis = Axis { least: 1.0, most, is_log: most > 100.0, from: 400.0, to: 40.0 };
            let heights = [1.0, 2.0, most].map(|ms| axis.at(ms));
            assert!(heights[0] > heights[1] && heights[1] > heights[2], "{heights:?}");
            let ticks = axis.ticks();
            assert!((2..=16).contains(&ticks.len()) && ticks.is_sorted(), "{ticks:?}");
        }
    }

    #[test]
    fn ticks_are_round() {
        let axis = Axis { least: 0.0, most: 47.0, is_log: false, from: 0.0, to: 1.0 };
        assert_eq!(axis.ticks(), [0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 45.0]);
        assert_eq!([round_step(0.3), round_step(3.0), round_step(1000.0), round_step(0.0)], [0.05, 0.5, 100.0, 1.0]);
    }
}
