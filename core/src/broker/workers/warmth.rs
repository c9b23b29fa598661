//! With which demands a worker's loaded runners of a model are used: a runner serves only tasks that agree in them.
//!
//! Owns these marks. The worker says by itself which models are loaded.

use proto_msgs::Demands;

/// Different demands remembered per model and worker, the latest first. A model hardly ever runs with more at a time.
const MARKS_MAX: usize = 4;

/// The demands of the last tasks that ended well, as marks; 0 for none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Warmth {
    marks: [u32; MARKS_MAX],
}

impl Warmth {
    /// A task with these demands has run.
    pub(super) fn ran(&mut self, demands: &Demands) {
        let mark = mark(demands);
        let place = self.marks.iter().position(|known| *known == mark).unwrap_or(MARKS_MAX - 1);
        self.marks[..=place].rotate_right(1);
        self.marks[0] = mark;
    }

    /// Whether a loaded runner may serve a task with these demands. As long as nothing is known, it may.
    pub(super) fn suits(self, demands: &Demands) -> bool {
        self.marks[0] == 0 || self.marks.contains(&mark(demands))
    }
}

/// A number for the demands in which two tasks must agree to share a runner (FNV-1a); never 0.
fn mark(demands: &Demands) -> u32 {
    let Demands { cpu_millis, memory_bytes, gpu_memory_bytes, arch: _ } = demands;
    let parts = [u64::from(*cpu_millis), *memory_bytes, *gpu_memory_bytes];
    let step = |hash: u32, byte: u8| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    parts.iter().flat_map(|part| part.to_be_bytes()).fold(0x811c_9dc5, step).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runner_serves_the_demands_with_which_it_ran_and_no_others() {
        let [one, two] = [1000, 2000].map(|cpu_millis| Demands { cpu_millis, ..Demands::default() });
        let mut warmth = Warmth::default();
        assert!(warmth.suits(&one) && warmth.suits(&two), "nobody knows");
        warmth.ran(&one);
        assert!(warmth.suits(&one) && !warmth.suits(&two));
        warmth.ran(&two);
        assert!(warmth.suits(&one) && warmth.suits(&two));
        for cpu_millis in 3000..3004 {
            warmth.ran(&Demands { cpu_millis, ..Demands::default() });
        }
        assert!(!warmth.suits(&one));
    }
}
