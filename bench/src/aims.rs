//! Owns the aims of figures, one list for all reports: which figure has one, whether it meets it, and what keeps it
//! from it. Never: a threshold that makes anything fail, since machines differ and people read the figures.

use std::fmt;

use serde_json::Value;

/// What stands in the place of a figure that others have not told.
pub(crate) const NOTHING_KNOWN: &str = "nothing to compare with";

/// The bound that a figure should keep.
#[derive(Clone, Copy, Debug)]
enum Bound {
    Least(f64),
    Most(f64),
    /// At most N times the figure of another column in the same row.
    MostOf(f64, &'static str),
}

/// An aim for some rows of a report.
#[derive(Debug)]
pub(crate) struct Aim {
    report: &'static str,
    column: &'static str,
    /// Columns, each with its possible values. A row has this aim if all of them match.
    rows: &'static [(&'static str, &'static [&'static str])],
    bound: Bound,
    /// What keeps a figure from the aim, if it misses it.
    because: &'static str,
}

const ONE_CONNECTION: (&str, &[&str]) = ("connections", &["1"]);
const ONE_THREAD: &str = "over one connection libzmq moves the echo's messages in large batches, while the broker's one thread \
                          decides task after task";
const MANY: (&str, &[&str]) = ("connections", &["64", "256"]);
const SYSTEM_CALLS: &str = "each message is a system call, and each task a decision of the broker's one thread";
const ON: (&str, &[&str]) = ("scheduling", &["on"]);
const GPU_LIKE: (&str, &[&str]) = ("device", &["5 ms + 0.2 ms an item"]);
const BULK_OVERHEAD: &str =
    "the ideal leaves out the 5 ms of each batch: batches of 64 alone take 1.016 of it, smaller ones more";

#[rustfmt::skip]
const AIMS: &[Aim] = &[
    Aim { report: "broker", column: "ratio", rows: &[("workers", &["1000"]), ONE_CONNECTION], bound: Bound::Least(0.5),
        because: ONE_THREAD },
    Aim { report: "broker", column: "ratio", rows: &[("workers", &["10000"]), ONE_CONNECTION], bound: Bound::Least(0.25),
        because: ONE_THREAD },
    Aim { report: "broker", column: "ratio", rows: &[("workers", &["1000"]), MANY], bound: Bound::Least(0.5),
        because: SYSTEM_CALLS },
    Aim { report: "broker", column: "ratio", rows: &[("workers", &["10000"]), MANY], bound: Bound::Least(0.25),
        because: SYSTEM_CALLS },
    Aim { report: "transfer", column: "ratio to the best verified", rows: &[], bound: Bound::Least(1.0),
        because: "each byte is copied by kernel and libzmq on both sides, and hashed, on two cores" },
    Aim { report: "transfer", column: "client extra MiB", rows: &[], bound: Bound::Most(64.0), because: "chunks under way" },
    Aim { report: "transfer", column: "worker extra MiB", rows: &[], bound: Bound::Most(64.0), because: "chunks under way" },
    Aim { report: "submit", column: "p50 over direct", rows: &[("way", &["mesh, child process", "mesh, container"])],
        bound: Bound::Most(3.0), because: "each hand-over between client, broker, worker and runner is a wake-up" },
    Aim { report: "idle", column: "RSS MiB", rows: &[("program", &["mesh-worker"])], bound: Bound::Most(20.0),
        because: "the program itself is most of it" },
    Aim { report: "idle", column: "% of a core", rows: &[("program", &["mesh-worker"])], bound: Bound::Most(0.5),
        because: "each heartbeat looks at the machine" },
    Aim { report: "schedule-realtime", column: "of the ideal", rows: &[ON, GPU_LIKE], bound: Bound::Least(0.9),
        because: "a burst lasts a few batches: the device waits for the first tasks, and the last batches are not full" },
    Aim { report: "schedule-mixed", column: "p50 s", rows: &[ON], bound: Bound::MostOf(1.0, "Triton's p50 s"),
        because: "the batch of the bulk that runs already must end first" },
    Aim { report: "schedule-mixed", column: "max s", rows: &[ON], bound: Bound::MostOf(1.0, "Triton's max s"),
        because: "the batch of the bulk that runs already must end first" },
    Aim { report: "schedule-mixed", column: "p99 to idle p99", rows: &[ON], bound: Bound::Most(2.0),
        because: "the batch of the bulk that runs already must end first" },
    Aim { report: "schedule-mixed", column: "of the ideal", rows: &[ON], bound: Bound::Most(1.03), because: BULK_OVERHEAD },
    Aim { report: "schedule-mixed-small", column: "p99 to idle p99", rows: &[ON], bound: Bound::Most(2.0),
        because: "the batch of the bulk that runs already must end first" },
    Aim { report: "schedule-mixed-small", column: "of the ideal", rows: &[ON], bound: Bound::Most(1.03), because: BULK_OVERHEAD },
    Aim { report: "schedule-gpu", column: "of the ideal", rows: &[ON, ("clients", &["8", "64"])], bound: Bound::Least(0.9),
        because: "what all clients of a closed loop have outstanding fits one or two batches: the device waits while answers go \
                  out and the next requests come in, or has half batches; `of bare libzmq` says what is left to win" },
    Aim { report: "schedule-gpu", column: "to bulk", rows: &[ON, ("items each", &["1", "8", "16"])], bound: Bound::Least(0.9),
        because: "as above; and 8 clients with one item each make batches of 8, whose ideal is 0.34 of that of 64" },
    Aim { report: "schedule-fair", column: "Jain", rows: &[ON, ("clients", &["equal"])], bound: Bound::Least(0.99),
        because: "what was begun for one client before the other came is not taken back" },
    Aim { report: "schedule-fair", column: "Jain", rows: &[ON, ("under way", &["64 and 8", "250 and 8"])],
        bound: Bound::Least(0.99), because: "a client with eight under way lets its turn pass while its answers travel" },
    Aim { report: "schedule-skew", column: "worst max/min", rows: &[ON], bound: Bound::Most(1.15),
        because: "tasks of that size cannot be dealt out much more evenly (`least possible`), and one task at another worker is \
                  a large part of its share; a client that is not told a size makes them smaller" },
    Aim { report: "schedule-stages", column: "to one slot", rows: &[("way", &["pipelined"])], bound: Bound::Least(1.8),
        because: "the first batch has nobody behind it and the last one nobody before it: with few batches that counts" },
    Aim { report: "schedule-promise", column: "late %", rows: &[ON, ("asks for", &["service level", "deadline"])],
        bound: Bound::Most(5.0),
        because: "batches of the bulk are not cut where an item would take more than half as long again" },
    Aim { report: "schedule-models", column: "p99 to idle p99", rows: &[ON], bound: Bound::Most(2.0),
        because: "the batch of the bulk that runs already must end first, and the model shares two cores with its clients" },
    Aim { report: "schedule-decision", column: "mean without the slowest 1 % µs", rows: &[("workers", &["1000"])],
        bound: Bound::Most(20.0), because: "memory that is not in the processor's caches" },
    Aim { report: "schedule-decision", column: "plain mean µs", rows: &[("workers", &["1000"])], bound: Bound::Most(20.0),
        because: "memory that is not in the processor's caches; and in some decisions others had the processor" },
    Aim { report: "schedule-decision", column: "to 10 workers", rows: &[], bound: Bound::MostOf(0.1, "workers"),
        because: "it would grow as fast as the number of workers" },
];

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Least(least) => write!(f, "≥ {least}"),
            Self::Most(most) => write!(f, "≤ {most}"),
            Self::MostOf(1.0, column) => write!(f, "≤ {column}"),
            Self::MostOf(factor, column) => write!(f, "≤ {factor} × {column}"),
        }
    }
}

/// A figure beside its aim.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judged {
    pub(crate) aim: &'static Aim,
    /// Whether the figure meets the aim; `None` if the one that it is held against is not known.
    pub(crate) is_met: Option<bool>,
    figure: f64,
}

/// For example `of the ideal ≥ 0.9: met`, or `of the ideal ≥ 0.9: missed (0.706)`.
impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Aim { column, bound, .. } = self.aim;
        match self.is_met {
            Some(true) => write!(f, "{column} {bound}: met"),
            Some(false) => write!(f, "{column} {bound}: missed ({:.3})", self.figure),
            None => write!(f, "{column} {bound}: {NOTHING_KNOWN}"),
        }
    }
}

impl Aim {
    /// The aim as text, such as `of the ideal ≥ 0.9`, and what keeps figures from it.
    pub(crate) fn in_words(&self) -> (String, &'static str) {
        (format!("{} {}", self.column, self.bound), self.because)
    }

    /// Whether the row's figure meets the aim; `None` if the row has no such number.
    fn judge(&'static self, columns: &[&str], row: &[Value]) -> Option<Judged> {
        let cell = |column: &str| columns.iter().position(|name| *name == column).and_then(|at| row.get(at));
        let says = |value: &Value, word: &str| {
            value.as_str() == Some(word) || value.as_u64().is_some_and(|it| it.to_string() == word)
        };
        let is_meant = self
            .rows
            .iter()
            .all(|(column, words)| cell(column).is_some_and(|value| words.iter().any(|word| says(value, word))));
        let figure = cell(self.column)?.as_f64().filter(|_| is_meant)?;
        let is_met = match self.bound {
            Bound::Least(least) => Some(figure >= least),
            Bound::Most(most) => Some(figure <= most),
            Bound::MostOf(factor, other) => cell(other)?.as_f64().map(|other| figure <= factor * other),
        };
        Some(Judged { aim: self, is_met, figure })
    }
}

/// The aims of a row of this report.
pub(crate) fn judge(report: &str, columns: &[&str], row: &[Value]) -> Vec<Judged> {
    AIMS.iter().filter(|aim| aim.report == report).filter_map(|aim| aim.judge(columns, row)).collect()
}

/// The columns that this report's aims name.
pub(crate) fn columns_named(report: &str) -> impl Iterator<Item = &'static str> {
    AIMS.iter().filter(move |aim| aim.report == report).flat_map(|aim| {
        let other = match aim.bound {
            Bound::MostOf(_, column) => Some(column),
            Bound::Least(_) | Bound::Most(_) => None,
        };
        aim.rows.iter().map(|(column, _)| *column).chain([aim.column]).chain(other)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(report: &str, columns: &[&str], row: &[Value]) -> Vec<String> {
        judge(report, columns, row).iter().map(Judged::to_string).collect()
    }

    #[test]
    fn a_figure_meets_its_aim_or_misses_it_by_so_much() {
        let columns = ["scheduling", "clients", "items each", "of the ideal", "to bulk"];
        let row = |ideal: f64, bulk: f64| [json!("on"), json!(8), json!(8), json!(ideal), json!(bulk)];
        assert_eq!(told("schedule-gpu", &columns, &row(0.9, 0.95)), ["of the ideal ≥ 0.9: met", "to bulk ≥ 0.9: met"]);
        let missed = told("schedule-gpu", &columns, &row(0.8996, 1.0));
        assert_eq!(missed, ["of the ideal ≥ 0.9: missed (0.900)", "to bulk ≥ 0.9: met"]);
    }

    #[test]
    fn a_row_that_is_only_compared_with_has_no_aim() {
        let columns = ["scheduling", "clients", "items each", "of the ideal", "to bulk"];
        let off = [json!("off"), json!(8), json!(8), json!(0.3), json!(1.0)];
        let bulk = [json!("on"), json!(4), json!(512), json!(0.3), json!(1.0)];
        assert!(told("schedule-gpu", &columns, &off).is_empty() && told("schedule-gpu", &columns, &bulk).is_empty());
    }

    #[test]
    fn a_figure_may_be_held_against_another_one_beside_it() {
        let columns = ["scheduling", "p50 s", "Triton's p50 s"];
        let row = |p50: Value, other: Value| told("schedule-mixed", &columns, &[json!("on"), p50, other]);
        assert_eq!(row(json!(0.48), json!(0.64)), ["p50 s ≤ Triton's p50 s: met"]);
        assert_eq!(row(json!(0.7), json!(0.64)), ["p50 s ≤ Triton's p50 s: missed (0.700)"]);
        assert_eq!(row(json!(0.7), Value::Null), ["p50 s ≤ Triton's p50 s: nothing to compare with"]);
    }
}
