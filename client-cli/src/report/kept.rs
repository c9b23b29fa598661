//! The items' parts of the document until all items have ended. Owns that they do not fill the memory, whatever the
//! number of items and the size of outputs. Never: their fields.

use std::{
    io::{self, Read, Seek, SeekFrom, Write},
    ops::Range,
};

use serde_json::Value;
use tempfile::SpooledTempFile;

/// Beyond this, parts go to an unnamed file in the folder for temporary files: an item's part has up to 16,384
/// numbers per output, some 200 KiB.
const MEMORY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The items' parts of the document, in memory or in a temporary file.
#[derive(Debug)]
pub(crate) struct Kept {
    parts: SpooledTempFile,
    end: u64,
    /// Byte ranges by item index.
    places: Vec<Range<u64>>,
}

impl Kept {
    /// An empty store for `items` items.
    pub(crate) fn new(items: usize) -> Self {
        Self::within(MEMORY_BYTES_MAX, items)
    }

    fn within(memory_bytes_max: usize, items: usize) -> Self {
        Self { parts: SpooledTempFile::new(memory_bytes_max), end: 0, places: vec![0..0; items] }
    }

    /// Stores an item's part.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn keep(&mut self, index: usize, part: &Value) -> io::Result<()> {
        let text = serde_json::to_vec(part)?;
        self.parts.seek(SeekFrom::Start(self.end))?;
        self.parts.write_all(&text).map_err(|error| {
            let text = format!("cannot keep the results of all items in {}: {error}", std::env::temp_dir().display());
            io::Error::new(error.kind(), text)
        })?;
        let end = self.end + text.len() as u64;
        self.places[index] = self.end..end;
        self.end = end;
        Ok(())
    }

    /// Whether the item with this index has a part.
    pub(crate) fn has(&self, index: usize) -> bool {
        !self.places[index].is_empty()
    }

    /// Writes an item's part as it was stored.
    ///
    /// # Errors
    /// If the file cannot be read, or `out` cannot be written.
    pub(crate) fn write(&mut self, index: usize, out: &mut impl Write) -> io::Result<()> {
        let place = self.places[index].clone();
        self.parts.seek(SeekFrom::Start(place.start))?;
        io::copy(&mut (&mut self.parts).take(place.end - place.start), out).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn parts_come_back_by_place_whatever_the_order_and_wherever_they_are() {
        for (memory_bytes_max, in_file) in [(1000, false), (10, true)] {
            let mut kept = Kept::within(memory_bytes_max, 3);
            for index in [2, 0] {
                kept.keep(index, &json!({ "item": index, "text": "x".repeat(10 * index) })).unwrap();
            }
            assert_eq!(kept.parts.is_rolled(), in_file);
            let mut text = |index| {
                let mut out = Vec::new();
                kept.write(index, &mut out).unwrap();
                serde_json::from_slice::<Value>(&out).unwrap()
            };
            assert_eq!((&text(0)["item"], &text(2)["text"]), (&json!(0), &json!("x".repeat(20))));
            assert!(kept.has(2) && !kept.has(1));
        }
    }
}
