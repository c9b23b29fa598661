//! Inputs of requests: the items in turn, joined if a request has several. Owns the turns. Never: forms of inputs.

use std::collections::BTreeMap;

use mesh_sdk::{Input, SubmitError};
use parking_lot::Mutex;

/// Most different joins per number of items. They are made once, so that a request costs only its sending; more of them
/// would show nothing new.
const TURNS_MAX: u64 = 16;

/// Most joins kept in all, for schedules with varying numbers of items.
const KEPT_MAX: usize = 256;

/// Bytes of kept joins after which no more are kept.
const KEPT_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// The inputs of requests.
#[derive(Debug)]
pub(crate) struct Payloads {
    items: Vec<Vec<Input>>,
    kept: Mutex<Kept>,
    kept_bytes_max: u64,
}

#[derive(Debug, Default)]
struct Kept {
    /// Joined inputs, by number of items and first item.
    joined: BTreeMap<(u32, usize), Vec<Input>>,
    bytes: u64,
}

impl Payloads {
    /// Takes the inputs of each item, at least one.
    pub(crate) fn new(items: Vec<Vec<Input>>) -> Self {
        Self { items, kept: Mutex::default(), kept_bytes_max: KEPT_BYTES_MAX }
    }

    /// The inputs of the request with this number.
    ///
    /// # Errors
    /// If the items cannot be joined: they differ in shape, or a file cannot be read.
    pub(crate) fn of(&self, number: u64, items: u32) -> Result<Vec<Input>, SubmitError> {
        let first = self.first(number, items);
        if items == 1 {
            return Ok(self.items[first].clone());
        }
        if let Some(inputs) = self.kept(first, items) {
            return Ok(inputs);
        }
        // Without the lock: joining may take long, and two that join the same lose no more than the time.
        let inputs = self.join(first, items)?;
        let mut kept = self.kept.lock();
        if !self.is_full(&kept) && !kept.joined.contains_key(&(items, first)) {
            kept.bytes += inputs.iter().filter_map(|input| input.size_bytes().ok()).sum::<u64>();
            kept.joined.insert((items, first), inputs.clone());
        }
        Ok(inputs)
    }

    /// The kept join of these items, or another one of as many if no more can be kept: a join for each request under
    /// way would take far more memory.
    fn kept(&self, first: usize, items: u32) -> Option<Vec<Input>> {
        let kept = self.kept.lock();
        let another = || kept.joined.range((items, 0)..=(items, usize::MAX)).next().filter(|_| self.is_full(&kept));
        kept.joined.get(&(items, first)).or_else(|| another().map(|(_, inputs)| inputs)).cloned()
    }

    fn is_full(&self, kept: &Kept) -> bool {
        kept.joined.len() >= KEPT_MAX || kept.bytes >= self.kept_bytes_max
    }

    fn join(&self, first: usize, items: u32) -> Result<Vec<Input>, SubmitError> {
        let sets: Vec<&[Input]> =
            (first..first + items as usize).map(|item| &self.items[item % self.items.len()][..]).collect();
        // Each input of the model by its position; items of one model have the same number of inputs.
        let places = sets.iter().map(|set| set.len()).min().unwrap_or(0);
        (0..places).map(|place| Input::join(sets.iter().map(|set| set[place].clone()).collect())).collect()
    }

    /// The index of the request's first item.
    fn first(&self, number: u64, items: u32) -> usize {
        let all = self.items.len() as u64;
        let turn = if items == 1 { number } else { number % TURNS_MAX };
        (turn.wrapping_mul(u64::from(items)) % all) as usize
    }
}

#[cfg(test)]
mod tests {
    use proto_msgs::DType;

    use super::*;

    fn payloads(items: u8) -> Payloads {
        Payloads::new((0..items).map(|item| vec![Input::tensor(DType::U8, [1, 2], vec![item; 2])]).collect())
    }

    #[test]
    fn items_are_sent_in_turn() {
        let payloads = payloads(3);
        let firsts: Vec<usize> = (0..5).map(|number| payloads.first(number, 1)).collect();
        assert_eq!(firsts, [0, 1, 2, 0, 1]);
        let firsts: Vec<usize> = (0..4).map(|number| payloads.first(number, 2)).collect();
        assert_eq!(firsts, [0, 2, 1, 0]);
        assert!(payloads.first(u64::MAX, 1024) < 3);
    }

    #[test]
    fn a_request_of_several_items_has_them_one_behind_the_other() {
        let payloads = payloads(3);
        let inputs = payloads.of(0, 4).unwrap();
        assert_eq!(inputs.iter().map(Input::to_string).collect::<Vec<_>>(), ["UINT8 [4, 2]"]);
        assert_eq!(payloads.of(3, 4).unwrap()[0].to_string(), "UINT8 [4, 2]");
        assert_eq!(payloads.kept.lock().joined.len(), 1, "request 3 begins with item 0, too");
    }

    #[test]
    fn large_requests_share_what_is_kept_instead_of_taking_more_memory_each() {
        // Two items are four bytes: after the second join there is no more room.
        let payloads = Payloads { kept_bytes_max: 8, ..payloads(16) };
        for number in 0..8 {
            assert_eq!(payloads.of(number, 2).unwrap()[0].to_string(), "UINT8 [2, 2]");
        }
        assert_eq!(payloads.kept.lock().bytes, 8);
        assert!((0..8).all(|number| payloads.kept(payloads.first(number, 2), 2).is_some()));
        assert_eq!(payloads.of(1, 4).unwrap()[0].to_string(), "UINT8 [4, 2]", "of another length none is kept");
        assert_eq!(payloads.kept.lock().joined.len(), 2);
    }

    #[test]
    fn items_that_differ_cannot_share_a_request() {
        let items = [[1, 2], [2, 1]].map(|shape| vec![Input::tensor(DType::U8, shape, vec![0; 2])]);
        let error = Payloads::new(items.into()).of(0, 2).unwrap_err();
        assert!(error.to_string().contains("cannot share a task"), "{error}");
    }
}
