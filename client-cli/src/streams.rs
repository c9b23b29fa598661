//! Standard output for results, standard error for everything else. Owns that a reader who leaves (`| head`, a terminal that
//! is gone) costs nobody their work; never what is said.

use std::io::{self, Write};

use serde_json::Value;

use crate::{exit, report::Failed};

/// Whether anybody reads standard output. Who prints one result need not care.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reader {
    There,
    Gone,
}

/// Says something to a person, in whole lines. Nobody may be there to read it: `eprintln!` would end a task for that.
pub(crate) fn say(text: &str) {
    let _nobody_reads_it = io::stderr().write_all(text.as_bytes());
}

pub(crate) fn print(text: &str) -> Result<u8, Failed> {
    write(|out| out.write_all(text.as_bytes())).map(|_| exit::OK)
}

pub(crate) fn print_json(document: &Value) -> Result<u8, Failed> {
    print(&format!("{document:#}\n"))
}

/// Writes to standard output; a reader who has left is no failure.
pub(crate) fn write(what: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<Reader, Failed> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match what(&mut out).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::There),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Failed::new(exit::INTERNAL, "OUTPUT", format!("cannot write to standard output: {error}"))),
    }
}
