//! Standard output for results, standard error for everything else. Owns that a reader who leaves (`| head`, a terminal that
//! is gone) costs nobody their work; never what is said.

use std::io::{self, Write};

use serde_json::Value;

use crate::{exit, report::Failed};

/// Says something to a person, in whole lines. Nobody may be there to read it: `eprintln!` would end a task for that.
pub(crate) fn say(text: &str) {
    let _nobody_reads_it = io::stderr().write_all(text.as_bytes());
}

pub(crate) fn print(text: &str) -> Result<u8, Failed> {
    print_bytes(text.as_bytes())
}

pub(crate) fn print_json(document: &Value) -> Result<u8, Failed> {
    let mut text =
        serde_json::to_vec_pretty(document).map_err(|error| Failed::new(exit::INTERNAL, "INTERNAL", error))?;
    text.push(b'\n');
    print_bytes(&text)
}

pub(crate) fn print_bytes(bytes: &[u8]) -> Result<u8, Failed> {
    print_by(|out| out.write_all(bytes))
}

pub(crate) fn print_by(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<u8, Failed> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    match write(&mut out).and_then(|()| out.flush()) {
        // `mesh-client … | head` is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failed::new(exit::INTERNAL, "OUTPUT", format!("cannot write to standard output: {error}")))
        }
        _ => Ok(exit::OK),
    }
}
