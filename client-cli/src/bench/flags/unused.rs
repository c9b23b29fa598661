//! Refuses flags that would do nothing with the chosen load. Owns which flag needs what. Never: their values.

use super::{Bench, Distribution};

/// What the requests follow.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Pace {
    /// The answers: a closed loop.
    Answers,
    /// A rate: `--rate` or `--find-max-rate`.
    Rate,
    /// The times of `--schedule`.
    Schedule,
}

/// The first flag that is given and would do nothing, with the reason and a way out.
pub(super) fn find(flags: &Bench) -> Option<String> {
    let Bench { load, pacing, request, measuring, .. } = flags;
    let pace = match (&load.rate, &load.find_max_rate, &load.schedule) {
        (None, None, None) => Pace::Answers,
        (None, None, Some(_)) => Pace::Schedule,
        _ => Pace::Rate,
    };
    let has_promise = measuring.latency_threshold.is_some() || request.slo.is_some();
    let is_random = pacing.distribution == Some(Distribution::Poisson);
    let closed = "in a closed loop (--concurrency, the default), where an answer makes room for the next request";
    let replayed = "on --schedule, whose lines are all sent at their times and all counted";
    let (of_a_rate, why_no_rate) = (pace == Pace::Rate, if pace == Pace::Schedule { replayed } else { closed });
    let leave_or_rate = "leave it out, or use --rate or --find-max-rate";
    let open_only = "leave it out, or use --rate, --find-max-rate or --schedule";
    let not_replayed = pace != Pace::Schedule;
    let no_latency = "while nothing says when an answer is late";
    let rules = [
        ("--distribution", pacing.distribution.is_some(), of_a_rate, why_no_rate, leave_or_rate),
        ("--seed", pacing.seed.is_some(), of_a_rate, why_no_rate, leave_or_rate),
        (
            "--seed",
            pacing.seed.is_some(),
            is_random,
            "on constant times",
            "leave it out, or add --distribution poisson",
        ),
        ("--max-outstanding", pacing.max_outstanding.is_some(), pace != Pace::Answers, closed, open_only),
        ("--warmup", measuring.warmup.is_some(), not_replayed, replayed, leave_or_rate),
        ("--windows-max", measuring.windows_max.is_some(), not_replayed, replayed, leave_or_rate),
        ("--stability", measuring.stability.is_some(), not_replayed, replayed, leave_or_rate),
        ("--percentile", measuring.percentile.is_some(), not_replayed, replayed, leave_or_rate),
        (
            "--max-violation",
            request.max_violation.is_some(),
            has_promise,
            no_latency,
            "leave it out, or add --latency-threshold 50ms or --slo 50ms",
        ),
    ];
    let unused = rules.into_iter().find(|(_, is_given, is_used, ..)| *is_given && !is_used);
    unused.map(|(flag, _, _, why, way_out)| format!("{flag} has no effect {why}: {way_out}"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::plan;

    #[test]
    fn a_flag_that_would_do_nothing_is_refused_with_a_way_out() {
        for (line, named) in [
            ("--concurrency 4 --distribution poisson", ["--distribution has no effect in a closed loop", "use --rate"]),
            ("--distribution constant", ["--distribution has no effect in a closed loop", "use --rate"]),
            ("--schedule f --distribution poisson", ["--distribution has no effect on --schedule", "use --rate"]),
            ("--seed 7", ["--seed has no effect in a closed loop", "use --rate"]),
            ("--rate 5 --seed 7", ["--seed has no effect on constant times", "add --distribution poisson"]),
            ("--concurrency 4 --max-outstanding 9", ["--max-outstanding has no effect in a closed loop", "--schedule"]),
            ("--schedule f --warmup 1s", ["--warmup has no effect on --schedule", "use --rate"]),
            ("--schedule f --windows-max 4", ["--windows-max has no effect on --schedule", "use --rate"]),
            ("--schedule f --stability 5%", ["--stability has no effect on --schedule", "use --rate"]),
            ("--schedule f --percentile 99", ["--percentile has no effect on --schedule", "use --rate"]),
            (
                "--rate 5 --max-violation 1%",
                ["--max-violation has no effect while nothing", "--latency-threshold 50ms"],
            ),
        ] {
            let error = plan(line).unwrap_err();
            assert!(named.iter().all(|part| error.contains(part)), "{line}: {error}");
        }
    }

    #[test]
    fn a_flag_that_does_something_is_taken() {
        for line in [
            "--rate 5 --distribution poisson --seed 7 --max-outstanding 9 --warmup stable --percentile 99",
            "--rate 5 --distribution constant",
            "--find-max-rate 1:9 --distribution poisson --latency-threshold 50ms --max-violation 1%",
            "--concurrency 4 --windows-max 4 --stability 5% --moved 30% --slo 50ms --max-violation 1%",
        ] {
            assert!(plan(line).is_ok(), "{line}");
        }
    }
}
