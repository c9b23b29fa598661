//! Whether a promised latency was kept. Owns the one rule for windows, levels and searches. An empty measurement has no
//! verdict.

/// The promise of `--latency-threshold` and `--max-violation`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Promise {
    /// A request that takes longer violates the promise.
    pub(crate) latency_us: u64,
    /// The part of all requests that may violate it, of 1.
    pub(crate) violation_max: f64,
}

/// The result of measuring a promise.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// The promise was kept.
    Held,
    /// Too many requests took too long, or failed.
    Broken,
    /// Nothing was measured.
    Empty,
}

impl Promise {
    pub(crate) fn judge(&self, violation: Option<f64>) -> Verdict {
        match violation {
            None => Verdict::Empty,
            Some(violation) if violation <= self.violation_max => Verdict::Held,
            Some(_) => Verdict::Broken,
        }
    }
}

impl Verdict {
    /// The name as people and scripts see it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Broken => "broken",
            Self::Empty => "no verdict",
        }
    }
}

/// The ratio of `part` to `all`; `None` if `all` is 0.
pub(crate) fn share(part: u64, all: u64) -> Option<f64> {
    (all > 0).then(|| part as f64 / all as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_measured_is_no_verdict() {
        let promise = Promise { latency_us: 50_000, violation_max: 0.0 };
        assert_eq!(promise.judge(share(0, 0)), Verdict::Empty);
        assert_eq!(promise.judge(share(0, 10)), Verdict::Held);
        assert_eq!(promise.judge(share(1, 1000)), Verdict::Broken);
    }

    #[test]
    fn as_many_as_allowed_are_allowed() {
        let promise = Promise { latency_us: 50_000, violation_max: 0.05 };
        assert_eq!(promise.judge(share(5, 100)), Verdict::Held);
        assert_eq!(promise.judge(share(6, 100)), Verdict::Broken);
    }
}
