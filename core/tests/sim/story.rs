//! What happened, for a person who looks into a failed run. Costs nothing while nobody listens: a failing seed is played
//! again with the story on.

use std::collections::VecDeque;

use super::mesh::Micros;

/// Lines a person is shown: enough to see the cause of most faults, little enough to be read.
const LINES_KEPT: usize = 48;

/// The last lines, and a hash over all of them.
#[derive(Debug, Default)]
pub(crate) struct Story {
    pub(crate) is_told: bool,
    lines: VecDeque<String>,
    hash: u64,
}

impl Story {
    pub(crate) fn told() -> Self {
        Self { is_told: true, ..Self::default() }
    }

    pub(crate) fn add(&mut self, now: Micros, line: &str) {
        let line = format!("{:>4}.{:06}  {line}", now / 1_000_000, now % 1_000_000);
        for byte in line.bytes() {
            // FNV-1a: short, and good enough to tell two runs apart.
            self.hash = (self.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if std::env::var_os("MESH_SIM_WHOLE_STORY").is_some() {
            println!("{line}");
        }
        self.lines.push_back(line);
        if self.lines.len() > LINES_KEPT {
            self.lines.pop_front();
        }
    }

    /// Equal for equal stories.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn last_lines(&self) -> String {
        self.lines.iter().map(|line| format!("    {line}\n")).collect()
    }
}

/// Adds a line to the story if it is told; the arguments are not even looked at if not.
macro_rules! tell {
    ($mesh:expr, $($line:tt)*) => {
        if $mesh.story.is_told {
            let line = format!($($line)*);
            $mesh.story.add($mesh.now, &line);
        }
    };
}
pub(crate) use tell;
