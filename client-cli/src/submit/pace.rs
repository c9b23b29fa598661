//! How many items share a task and how many tasks are under way: enough that no slot waits for the client, and no more
//! than its memory holds. Owns the numbers. Never counts anything itself.

/// Slots assumed if the mesh's size is not known.
const SLOTS_DEFAULT: usize = 4;

/// Most items of one task by default: a task's bookkeeping then hardly counts, and a worker that dies takes few items
/// along.
const SPLIT_MAX: usize = 8;

/// Tasks per slot, if that makes tasks smaller: with fewer, some slots would be idle at the end.
const TASKS_PER_SLOT: usize = 10;

/// Items per slot: two batches of the largest initial size of workers. One runs, the other is ready.
const ITEMS_PER_SLOT: usize = 2 * 64;

/// Most tasks under way. More would only wait at the broker, and each would take a place in its queue.
const TASKS_MAX: usize = 256;

/// Input bytes of all tasks under way.
const UNDER_WAY_BYTES: u64 = 256 * 1024 * 1024;

/// Number of items that share a task, for a submit of `items` items and a mesh of `slots` slots.
pub(crate) fn split(items: usize, slots: Option<usize>) -> usize {
    let slots = slots.filter(|slots| *slots > 0).unwrap_or(SLOTS_DEFAULT);
    items.div_ceil(slots.saturating_mul(TASKS_PER_SLOT)).clamp(1, SPLIT_MAX)
}

/// Limits on the tasks under way at the same time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Pace {
    /// The number for large tasks: while one half runs, the inputs of the other half are sent.
    least: usize,
    /// The number for small tasks.
    most: usize,
}

impl Pace {
    /// A fixed number of tasks, set by the user.
    pub(crate) fn fixed(tasks: usize) -> Self {
        Self { least: tasks.max(1), most: tasks.max(1) }
    }

    /// The limits for a mesh with this number of slots, if known, and for tasks of this number of items.
    pub(crate) fn of_mesh(slots: Option<usize>, items_per_task: usize) -> Self {
        let slots = slots.filter(|slots| *slots > 0).unwrap_or(SLOTS_DEFAULT);
        let per_slot = ITEMS_PER_SLOT.div_ceil(items_per_task.max(1)).max(2);
        let most = slots.saturating_mul(per_slot).min(TASKS_MAX);
        Self { least: (2 * slots).min(most), most }
    }

    /// Tasks to have under way now. `largest_bytes` is the largest task's input length so far, 0 before the first.
    pub(crate) fn tasks(self, largest_bytes: u64) -> usize {
        match UNDER_WAY_BYTES.checked_div(largest_bytes) {
            None => self.least,
            Some(fitting) => usize::try_from(fitting).unwrap_or(usize::MAX).clamp(self.least, self.most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_submits_are_cut_smaller_so_that_every_slot_has_its_share() {
        assert_eq!([8, 100, 1000].map(|items| split(items, Some(4))), [1, 3, 8]);
        assert_eq!((split(1000, Some(1000)), split(1000, None), split(0, Some(1))), (1, 8, 1));
    }

    #[test]
    fn each_slot_has_two_full_batches_under_way() {
        let pace = Pace::of_mesh(Some(4), 8);
        assert_eq!((pace.tasks(0), pace.tasks(1)), (8, 64), "two for each slot until it is known what they weigh");
        assert_eq!(Pace::of_mesh(Some(1000), 8).tasks(1), TASKS_MAX);
        assert_eq!(Pace::of_mesh(Some(1), 1024).tasks(1), 2);
        assert_eq!(Pace::of_mesh(None, 8).tasks(0), 8);
        assert_eq!(Pace::fixed(3).tasks(1 << 40), 3);
    }

    #[test]
    fn heavy_tasks_are_fewer() {
        let pace = Pace::of_mesh(Some(4), 8);
        assert_eq!(pace.tasks(16 << 20), 16);
        assert_eq!(pace.tasks(1 << 30), 8, "never fewer than keep the slots busy");
    }
}
