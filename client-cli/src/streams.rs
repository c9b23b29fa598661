//! Standard output for results, standard error for everything else. Owns that no work is lost if the reader leaves
//! (`| head`, a closed terminal). Never: the text.

use std::io::{self, Write};

use serde_json::Value;

use crate::{exit, report::Failed};

/// Whether standard output still has a reader. A command that prints only one result need not care.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reader {
    There,
    Gone,
}

/// Prints whole lines on standard error. Without a reader `eprintln!` would panic and end a task.
pub(crate) fn say(text: &str) {
    let _nobody_reads_it = io::stderr().write_all(text.as_bytes());
}

pub(crate) fn print(text: &str) -> Result<u8, Failed> {
    write(|out| out.write_all(text.as_bytes())).map(|_| exit::OK)
}

pub(crate) fn print_json(document: &Value) -> Result<u8, Failed> {
    print(&format!("{document:#}\n"))
}

/// Writes to standard output. A reader who has left is not an error.
pub(crate) fn write(what: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Reader, Failed> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match what(&mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Failed::new(exit::INTERNAL, "OUTPUT", format!("cannot write to standard output: {error}"))),
    }
}
