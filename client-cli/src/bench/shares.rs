//! Whether traffic moved from one worker to another. Owns the comparison of a window's shares with earlier ones. Never:
//! the reason, which the broker knows.

use std::collections::BTreeMap;

use super::sample::WorkerNo;

/// Fewest answers in a window that say something about shares: with fewer, chance alone moves them by a sixth.
const ANSWERS_MIN: u64 = 30;

/// A move of traffic from one worker to another.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Moved {
    /// The worker that lost most.
    pub(crate) from: WorkerNo,
    /// The loser's share before and now, parts of 1.
    pub(crate) from_share: (f64, f64),
    /// The worker that gained most.
    pub(crate) to: WorkerNo,
    /// The winner's share before and now.
    pub(crate) to_share: (f64, f64),
}

/// Compares each window with the last one that was a change, so that slow moves are noticed, too.
#[derive(Clone, Debug)]
pub(crate) struct Shares {
    /// Smallest loss of a worker that counts as a move, a part of 1.
    moved_min: f64,
    before: Option<BTreeMap<WorkerNo, f64>>,
}

impl Shares {
    pub(crate) fn new(moved_min: f64) -> Self {
        Self { moved_min, before: None }
    }

    /// Compares a window's answers by worker with the earlier shares. Returns a move if there was one.
    pub(crate) fn window(&mut self, answers: &BTreeMap<WorkerNo, u64>) -> Option<Moved> {
        let all: u64 = answers.values().sum();
        if all < ANSWERS_MIN {
            return None;
        }
        let now: BTreeMap<WorkerNo, f64> =
            answers.iter().map(|(worker, count)| (*worker, *count as f64 / all as f64)).collect();
        let Some(before) = &self.before else {
            self.before = Some(now);
            return None;
        };
        let share = |shares: &BTreeMap<WorkerNo, f64>, worker| shares.get(&worker).copied().unwrap_or(0.0);
        let change = |worker: &WorkerNo| (share(before, *worker), share(&now, *worker));
        let gain = |worker: &WorkerNo| {
            let (before, now) = change(worker);
            now - before
        };
        let workers = || before.keys().chain(now.keys().filter(|worker| !before.contains_key(worker)));
        let from = *workers().min_by(|a, b| gain(a).total_cmp(&gain(b)))?;
        let to = *workers().max_by(|a, b| gain(a).total_cmp(&gain(b)))?;
        // Shares are quotients: a difference of half a millionth does not count.
        if -gain(&from) < self.moved_min - 5e-7 {
            return None;
        }
        let moved = Moved { from, from_share: change(&from), to, to_share: change(&to) };
        self.before = Some(now);
        Some(moved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkerNo = WorkerNo(0);
    const B: WorkerNo = WorkerNo(1);

    fn answers(a: u64, b: u64) -> BTreeMap<WorkerNo, u64> {
        [(A, a), (B, b)].into_iter().filter(|(_, count)| *count > 0).collect()
    }

    #[test]
    fn a_switch_away_from_a_worker_is_an_event() {
        let mut shares = Shares::new(0.2);
        assert_eq!(shares.window(&answers(50, 50)), None, "the first window is what others are compared with");
        assert_eq!(shares.window(&answers(45, 55)), None, "chance");
        let moved = shares.window(&answers(0, 100)).unwrap();
        assert_eq!((moved.from, moved.from_share), (A, (0.5, 0.0)));
        assert_eq!((moved.to, moved.to_share), (B, (0.5, 1.0)));
        assert_eq!(shares.window(&answers(0, 100)), None, "told once");
    }

    #[test]
    fn and_so_is_the_way_back() {
        let mut shares = Shares::new(0.2);
        shares.window(&answers(0, 100));
        let moved = shares.window(&answers(40, 60)).unwrap();
        assert_eq!((moved.from, moved.to), (B, A));
    }

    #[test]
    fn a_slow_move_is_seen_too() {
        let mut shares = Shares::new(0.2);
        let events: Vec<bool> =
            [50, 44, 38, 32, 28].map(|a| shares.window(&answers(a, 100 - a)).is_some()).into_iter().collect();
        assert_eq!(events, [false, false, false, false, true]);
    }

    #[test]
    fn a_window_with_few_answers_is_no_sign() {
        let mut shares = Shares::new(0.2);
        shares.window(&answers(50, 50));
        assert_eq!(shares.window(&answers(10, 0)), None);
        assert_eq!(shares.window(&BTreeMap::new()), None, "nor is an empty one");
        assert!(shares.window(&answers(100, 0)).is_some());
    }
}
