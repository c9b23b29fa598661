//! Items that share a task: same inputs, same types, same shapes. Owns how they are joined and taken apart again.
//! Never: the mesh.

use mesh_sdk::{Input, SubmitError};

/// Largest joined inputs of one task: they stay in memory while the task lives.
pub(crate) const SHARED_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// An item with its inputs, ready to be sent.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// The item's index among all items.
    pub(crate) index: usize,
    pub(crate) name: String,
    pub(crate) inputs: Vec<Input>,
}

/// The items of one task, at least one.
#[derive(Clone, Debug)]
pub(crate) struct Bunch {
    /// Index and name of each item.
    pub(crate) items: Vec<(usize, String)>,
    /// The inputs of all items, stacked.
    pub(crate) inputs: Vec<Input>,
}

impl Bunch {
    pub(crate) fn count(&self) -> u32 {
        u32::try_from(self.items.len()).unwrap_or(u32::MAX)
    }

    /// Length of the inputs in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.inputs.iter().map(|input| input.size_bytes().unwrap_or(0)).sum()
    }

    /// The bunch's display name.
    pub(crate) fn name(&self) -> String {
        match &self.items[..] {
            [] => String::new(),
            [(_, only)] => only.clone(),
            [(_, first), others @ ..] => format!("{first} (+{} more)", others.len()),
        }
    }

    /// One bunch per item. Nothing is copied.
    pub(crate) fn apart(&self) -> Result<Vec<Self>, SubmitError> {
        let count = self.count();
        let one = |(item, place): (&(usize, String), u32)| {
            let inputs = self.inputs.iter().map(|input| input.part(place, count)).collect::<Result<_, _>>()?;
            Ok(Self { items: vec![item.clone()], inputs })
        };
        self.items.iter().zip(0..).map(one).collect()
    }
}

/// Groups the items that can share a task, in their order. Reads the files of those that do.
pub(crate) fn bunches(items: Vec<Loaded>) -> Vec<Bunch> {
    let mut groups: Vec<(u64, Vec<Loaded>)> = Vec::new();
    for item in items {
        // If a file's size cannot be read, sending it will report the error.
        let bytes = item.inputs.iter().map(|input| input.size_bytes().unwrap_or(u64::MAX)).fold(0, u64::saturating_add);
        let fits = |(used, group): &&mut (u64, Vec<Loaded>)| {
            used.saturating_add(bytes) <= SHARED_BYTES_MAX && group.first().is_some_and(|first| shares(first, &item))
        };
        match groups.iter_mut().find(fits) {
            Some((used, group)) => {
                *used += bytes;
                group.push(item);
            }
            None => groups.push((bytes, vec![item])),
        }
    }
    groups.into_iter().flat_map(|(_, group)| together(group)).collect()
}

fn shares(one: &Loaded, other: &Loaded) -> bool {
    let inputs = one.inputs.iter().zip(&other.inputs);
    !one.inputs.is_empty() && one.inputs.len() == other.inputs.len() && inputs.into_iter().all(|(a, b)| a.joins(b))
}

/// One bunch for the group. If a file cannot be read now, one bunch per item, so that only that item fails.
fn together(group: Vec<Loaded>) -> Vec<Bunch> {
    let inputs = group.first().map_or(0, |first| first.inputs.len());
    let joined: Result<Vec<Input>, SubmitError> =
        (0..inputs).map(|place| Input::join(group.iter().map(|item| item.inputs[place].clone()).collect())).collect();
    match joined {
        Ok(inputs) => {
            let items = group.into_iter().map(|item| (item.index, item.name)).collect();
            vec![Bunch { items, inputs }]
        }
        Err(_) => {
            let alone = |item: Loaded| Bunch { items: vec![(item.index, item.name)], inputs: item.inputs };
            group.into_iter().map(alone).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh_sdk::DType;

    use super::*;

    fn item(index: usize, shape: &[u64], value: u8) -> Loaded {
        let bytes = vec![value; shape.iter().product::<u64>() as usize];
        Loaded { index, name: format!("i{index}"), inputs: vec![Input::tensor(DType::U8, shape, bytes)] }
    }

    fn places(bunches: &[Bunch]) -> Vec<Vec<usize>> {
        bunches.iter().map(|bunch| bunch.items.iter().map(|(index, _)| *index).collect()).collect()
    }

    #[test]
    fn items_of_one_shape_share_a_task_and_others_have_their_own() {
        let bunches = bunches(vec![item(0, &[1, 2], 0), item(1, &[1, 3], 1), item(2, &[1, 2], 2), item(3, &[], 3)]);
        assert_eq!(places(&bunches), [vec![0, 2], vec![1], vec![3]]);
        assert_eq!(bunches[0].inputs[0].to_string(), "UINT8 [2, 2]");
        assert_eq!((bunches[0].name(), bunches[1].name()), ("i0 (+1 more)".to_owned(), "i1".to_owned()));
    }

    #[test]
    fn a_task_taken_apart_gives_each_item_what_it_brought() {
        let bunches = bunches(vec![item(7, &[1, 2], 1), item(9, &[1, 2], 2)]);
        let apart = bunches[0].apart().unwrap();
        assert_eq!(places(&apart), [[7], [9]]);
        assert!(apart[1].inputs[0].joins(&item(0, &[1, 2], 0).inputs[0]));
        assert_eq!(apart[1].inputs[0].size_bytes().unwrap(), 2);
    }

    #[test]
    fn large_items_do_not_pile_up_in_one_task() {
        let large = [SHARED_BYTES_MAX / 2];
        let bunches = bunches(vec![item(0, &large, 0), item(1, &large, 1), item(2, &large, 2)]);
        assert_eq!(places(&bunches), [vec![0, 1], vec![2]]);
    }

    #[test]
    fn a_file_that_vanished_does_not_take_its_neighbours_along() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.bin");
        std::fs::write(&path, [1, 2]).unwrap();
        let gone = Input::file(dir.path().join("gone.bin")).shaped(DType::U8, [1, 2]);
        let there = Input::file(&path).shaped(DType::U8, [1, 2]);
        let of = |index, input| Loaded { index, name: String::new(), inputs: vec![input] };
        assert_eq!(
            places(&bunches(vec![of(0, there.clone()), of(1, gone.clone()), of(2, there.clone())])),
            [vec![0, 2], vec![1]]
        );
        assert_eq!(places(&together(vec![of(0, there.clone()), of(1, gone), of(2, there)])), [[0], [1], [2]]);
    }
}
