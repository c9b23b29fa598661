//! Chooses the next level's load. Owns the order of levels, and that a sweep stops at a broken promise. Never measures.

use std::{collections::VecDeque, fmt};

use super::{range::SearchRange, search::Search, verdict::Verdict};

/// The load of one level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Load {
    /// A fixed number of requests under way: each answer is followed by the next request.
    Closed {
        /// Number of requests under way.
        concurrency: u32,
    },
    /// A fixed rate of requests, independent of the answers.
    Open {
        /// Requests per second.
        rate: f64,
    },
    /// Requests at the times in a file.
    Replay,
}

impl Load {
    /// Requests that this one of the clients has under way in a closed loop, which gives them out in turn; 1 for loads
    /// that know no such number.
    pub(crate) fn slots(self, client: usize, clients: usize) -> f64 {
        match self {
            Self::Closed { concurrency } => {
                (concurrency as usize).saturating_sub(client).div_ceil(clients).max(1) as f64
            }
            Self::Open { .. } | Self::Replay => 1.0,
        }
    }
}

/// The load as people read it.
impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { concurrency } => write!(f, "{concurrency} at a time"),
            Self::Open { rate } => write!(f, "{}/s", (rate * 1e3).round() / 1e3),
            Self::Replay => f.write_str("schedule"),
        }
    }
}

/// The levels that remain to be measured.
#[derive(Clone, Debug)]
pub(crate) enum Sweep {
    /// Level after level, until one breaks the promise.
    Levels(VecDeque<Load>),
    /// A search: the results so far decide the next level.
    Search(Search),
}

impl Sweep {
    pub(crate) fn over(loads: impl IntoIterator<Item = Load>) -> Self {
        Self::Levels(loads.into_iter().collect())
    }

    pub(crate) fn search(range: SearchRange) -> Self {
        Self::Search(Search::new(range))
    }

    /// The next level.
    pub(crate) fn next(&self) -> Option<Load> {
        match self {
            Self::Levels(levels) => levels.front().copied(),
            Self::Search(search) => search.next().map(|rate| Load::Open { rate }),
        }
    }

    /// Takes the verdict on the level that [`Self::next`] returned; `None` without a promise. Returns the number of
    /// levels that are skipped because of it.
    pub(crate) fn judged(&mut self, load: Load, verdict: Option<Verdict>) -> usize {
        match self {
            Self::Levels(levels) => {
                levels.pop_front();
                if verdict == Some(Verdict::Broken) { levels.drain(..).count() } else { 0 }
            }
            Self::Search(search) => {
                if let Load::Open { rate } = load {
                    search.judged(rate, verdict.unwrap_or(Verdict::Empty));
                }
                0
            }
        }
    }

    /// The search, if the sweep is one.
    pub(crate) fn found(&self) -> Option<&Search> {
        match self {
            Self::Levels(_) => None,
            Self::Search(search) => Some(search),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(levels: &[u32]) -> Sweep {
        Sweep::over(levels.iter().map(|concurrency| Load::Closed { concurrency: *concurrency }))
    }

    #[test]
    fn a_sweep_stops_where_the_promise_is_broken() {
        let mut sweep = closed(&[1, 2, 4, 8]);
        for (concurrency, verdict, left_out) in [(1, Verdict::Held, 0), (2, Verdict::Empty, 0), (4, Verdict::Broken, 1)]
        {
            let load = sweep.next().unwrap();
            assert_eq!(load, Load::Closed { concurrency });
            assert_eq!(sweep.judged(load, Some(verdict)), left_out);
        }
        assert_eq!(sweep.next(), None);
    }

    #[test]
    fn without_a_promise_every_level_is_measured() {
        let mut sweep = closed(&[1, 2]);
        while let Some(load) = sweep.next() {
            assert_eq!(sweep.judged(load, None), 0);
        }
    }

    #[test]
    fn loads_are_told_in_words() {
        let told =
            [Load::Closed { concurrency: 4 }, Load::Open { rate: 12.5 }, Load::Replay].map(|load| load.to_string());
        assert_eq!(told, ["4 at a time", "12.5/s", "schedule"]);
    }
}
