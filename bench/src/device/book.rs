//! The timetable of a device: five numbers in a file that all its runners share. A runner books its time behind all
//! earlier bookings, as work is queued on a GPU. So a runner that wakes late, or is killed, takes no time from the
//! others, and the device's time is exact even on a busy machine.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    time::{ClockId, clock_gettime},
};

/// Positions of the numbers in the file, in words of eight bytes.
const FREE_AT_NS: u64 = 0;
const SLOWNESS_PERMILLE: u64 = 1;
const BUSY_NS: u64 = 2;
const BATCHES: u64 = 3;
const ROWS: u64 = 4;

/// The timetable file of a device.
#[derive(Debug)]
pub struct Book {
    file: File,
}

/// Work that a device has done since its file was made.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Usage {
    /// Time booked.
    pub busy: Duration,
    /// Batches.
    pub batches: u64,
    /// Rows in all batches.
    pub rows: u64,
}

impl Usage {
    /// The usage since an earlier look.
    pub fn since(self, earlier: Self) -> Self {
        let busy = self.busy.saturating_sub(earlier.busy);
        Self { busy, batches: self.batches - earlier.batches, rows: self.rows - earlier.rows }
    }

    /// Average number of rows per batch.
    pub fn rows_per_batch(self) -> f64 {
        self.rows as f64 / self.batches.max(1) as f64
    }
}

impl Book {
    /// Opens the file, or makes a new one.
    ///
    /// # Errors
    /// If the file can be neither opened nor made.
    pub fn open(path: &Path) -> Result<Self> {
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        Ok(Self { file: opened.with_context(|| format!("cannot open the device's file {}", path.display()))? })
    }

    /// Books `cost` for a batch that arrives now. Returns the time from now until the batch is done.
    ///
    /// # Errors
    /// If the file cannot be locked or written.
    pub fn book(&self, cost: Duration, rows: u64) -> Result<Duration> {
        let arrived = now();
        let locked = Flock::lock(self.file.try_clone()?, FlockArg::LockExclusive);
        let locked = locked.map_err(|(_, error)| error).context("cannot lock the device's file")?;
        let slowness = match self.word(SLOWNESS_PERMILLE)? {
            0 => 1000,
            permille => permille,
        };
        let cost_ns = (cost.as_nanos() as u64).saturating_mul(slowness) / 1000;
        let arrived_ns = arrived.as_nanos() as u64;
        let done_ns = arrived_ns.max(self.word(FREE_AT_NS)?) + cost_ns;
        self.set(FREE_AT_NS, done_ns)?;
        self.set(BUSY_NS, self.word(BUSY_NS)? + cost_ns)?;
        self.set(BATCHES, self.word(BATCHES)? + 1)?;
        self.set(ROWS, self.word(ROWS)? + rows)?;
        drop(locked);
        Ok(Duration::from_nanos(done_ns).saturating_sub(now()))
    }

    /// Makes every later batch take this many thousandths of its cost.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn slow_down(&self, permille: u64) -> Result<()> {
        Ok(self.set(SLOWNESS_PERMILLE, permille)?)
    }

    /// The work done so far.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn usage(&self) -> Result<Usage> {
        let busy = Duration::from_nanos(self.word(BUSY_NS)?);
        Ok(Usage { busy, batches: self.word(BATCHES)?, rows: self.word(ROWS)? })
    }

    /// One number; 0 in a file that nobody has written to.
    fn word(&self, place: u64) -> io::Result<u64> {
        let mut bytes = [0; 8];
        match self.file.read_exact_at(&mut bytes, place * 8) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(0),
            read => read.map(|()| u64::from_le_bytes(bytes)),
        }
    }

    fn set(&self, place: u64, value: u64) -> io::Result<()> {
        self.file.write_all_at(&value.to_le_bytes(), place * 8)
    }
}

/// A clock that all processes of this machine share.
fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_comes_second_is_done_after_the_first_and_slowness_costs_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("device");
        let (one, other) = (Book::open(&path).unwrap(), Book::open(&path).unwrap());
        let first = one.book(10 * SECOND, 8).unwrap();
        let second = other.book(10 * SECOND, 1).unwrap();
        assert!(first > 9 * SECOND && first <= 10 * SECOND, "{first:?}");
        assert!(second > 19 * SECOND && second <= 20 * SECOND, "{second:?}");
        one.slow_down(3000).unwrap();
        assert!(other.book(SECOND, 1).unwrap() > 22 * SECOND);
        assert_eq!(one.usage().unwrap(), Usage { busy: 23 * SECOND, batches: 3, rows: 10 });
    }
}
