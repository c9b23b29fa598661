//! Standard output for results, standard error for everything else. Owns that no work is lost if the reader leaves
//! (`| head`, a closed terminal), and that others can see whether it reads at all. Never: the text.

use std::{
    io::{self, Write},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde_json::Value;

use crate::exit::{self, Failed};

/// Whether standard output still has a reader. A command that prints only one result need not care.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reader {
    There,
    Gone,
}

/// Beginnings of the writes under way, on standard output and standard error.
static WRITES: [Mutex<Option<Instant>>; 2] = [Mutex::new(None), Mutex::new(None)];

/// Whether a write has waited for its reader for so long.
pub(crate) fn is_unread_for(time: Duration) -> bool {
    let since = |write: &Mutex<Option<Instant>>| *write.lock();
    WRITES.iter().filter_map(since).any(|since| since.elapsed() >= time)
}

/// An output whose writes are watched. It is locked, so it has one write at a time.
struct Watched<W> {
    out: W,
    write: &'static Mutex<Option<Instant>>,
}

impl<W: Write> Watched<W> {
    fn watch<T>(&mut self, write: impl FnOnce(&mut W) -> io::Result<T>) -> io::Result<T> {
        let note = |since| *self.write.lock() = since;
        note(Some(Instant::now()));
        let written = write(&mut self.out);
        note(None);
        written
    }
}

impl<W: Write> Write for Watched<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.watch(|out| out.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.watch(W::flush)
    }
}

/// Prints whole lines on standard error. Without a reader `eprintln!` would panic and end a task.
pub(crate) fn say(text: &str) {
    let mut err = Watched { out: io::stderr().lock(), write: &WRITES[1] };
    let _nobody_reads_it = err.write_all(text.as_bytes());
}

pub(crate) fn print(text: &str) -> Result<u8, Failed> {
    write(|out| out.write_all(text.as_bytes())).map(|_| exit::OK)
}

pub(crate) fn print_json(document: &Value) -> Result<u8, Failed> {
    print(&format!("{document:#}\n"))
}

/// Writes to standard output. A reader who has left is not an error.
pub(crate) fn write(what: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Reader, Failed> {
    let mut out = io::BufWriter::new(Watched { out: io::stdout().lock(), write: &WRITES[0] });
    match what(&mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Failed::new(exit::INTERNAL, "OUTPUT", format!("cannot write to standard output: {error}"))),
    }
}
