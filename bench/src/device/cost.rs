//! Owns the cost of a batch, and its form in a model file: metadata of an ONNX file that computes `y = x + 1`, so that
//! a real runtime gives the same answers, only sooner.

use std::{fmt, time::Duration};

use anyhow::{Context, Result, bail};

/// Key of the model's metadata.
const KEY: &str = "mesh-device";

/// `ModelProto.metadata_props`, length-delimited.
const METADATA_TAG: u8 = 14 << 3 | 2;

/// The cost of a model on a device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Cost {
    /// Microseconds of each batch.
    pub base_us: u64,
    /// Microseconds of each row in it.
    pub row_us: u64,
    /// Rows that fit into a batch.
    pub rows_max: u64,
    /// The worker's device; models on one device wait for each other.
    pub device: String,
}

impl Cost {
    /// A cost per batch and per row, with at most 64 rows, on the first device.
    pub fn new(base_us: u64, row_us: u64) -> Self {
        Self { base_us, row_us, rows_max: 64, device: "0".to_owned() }
    }

    /// The same cost on another device.
    pub fn on(mut self, device: &str) -> Self {
        device.clone_into(&mut self.device);
        self
    }

    /// Time of one batch.
    pub fn batch(&self, rows: u64) -> Duration {
        Duration::from_micros(self.base_us + self.row_us * rows)
    }

    /// Time of `rows` rows in as few batches as possible.
    pub fn all(&self, rows: u64) -> Duration {
        let (full, rest) = (rows / self.rows_max, rows % self.rows_max);
        let rest = if rest == 0 { Duration::ZERO } else { self.batch(rest) };
        self.batch(self.rows_max) * full as u32 + rest
    }

    /// Rows per second of a device that is always busy with batches of this size.
    pub fn rows_per_s(&self, rows: u64) -> f64 {
        let rows = rows.clamp(1, self.rows_max);
        rows as f64 / self.batch(rows).as_secs_f64()
    }

    /// A model file with these costs: `model` (`x + 1`, an ONNX model without metadata) plus metadata.
    pub fn write_into(&self, mut model: Vec<u8>) -> Vec<u8> {
        let text = self.to_string();
        let entry_bytes = KEY.len() + text.len() + 4;
        assert!(entry_bytes < 128, "a short text: its length is one byte");
        model.extend([METADATA_TAG, entry_bytes as u8, 1 << 3 | 2, KEY.len() as u8]);
        model.extend(KEY.as_bytes());
        model.extend([2 << 3 | 2, text.len() as u8]);
        model.extend(text.as_bytes());
        model
    }

    /// Reads the costs from a model file.
    ///
    /// # Errors
    /// If the file states none.
    pub fn read_from(model: &[u8]) -> Result<Self> {
        let at = model.windows(KEY.len()).rposition(|window| window == KEY.as_bytes());
        let after = at.and_then(|at| model.get(at + KEY.len() + 1..)).context("the model states no cost")?;
        let (length, text) = after.split_first().context("the model's cost is cut off")?;
        let text = text.get(..usize::from(*length)).context("the model's cost is cut off")?;
        std::str::from_utf8(text)?.parse()
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { base_us, row_us, rows_max, device } = self;
        write!(f, "base_us={base_us} row_us={row_us} rows_max={rows_max} device={device}")
    }
}

impl std::str::FromStr for Cost {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut cost = Self::new(0, 0);
        for field in text.split_whitespace() {
            match field.split_once('=').context("a cost is NAME=VALUE")? {
                ("base_us", value) => cost.base_us = value.parse()?,
                ("row_us", value) => cost.row_us = value.parse()?,
                ("rows_max", value) => cost.rows_max = value.parse::<u64>()?.max(1),
                ("device", value) => value.clone_into(&mut cost.device),
                (name, _) => bail!("there is no cost '{name}'"),
            }
        }
        Ok(cost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_file_says_what_it_costs() {
        let cost = Cost::new(5000, 200).on("decode");
        let model = cost.write_into(b"\x08\x08 a model".to_vec());
        assert_eq!(Cost::read_from(&model).unwrap(), cost);
        assert!(Cost::read_from(b"\x08\x08 a model").is_err());
        assert!(Cost::read_from(&model[..model.len() - 1]).is_err());
    }

    #[test]
    fn ideal_times_are_those_of_full_batches() {
        let cost = Cost::new(5000, 5000);
        assert_eq!(cost.all(0), Duration::ZERO);
        assert_eq!(cost.all(8), Duration::from_millis(45));
        assert_eq!(cost.all(64), Duration::from_millis(325));
        assert_eq!(cost.all(65), Duration::from_millis(335));
        let quick = Cost::new(5000, 200);
        assert_eq!(quick.rows_per_s(64).round(), 3596.0);
        assert_eq!(quick.rows_per_s(1000), quick.rows_per_s(64));
    }
}
