//! What the program does when nobody reads what it says.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::process::{Command, ExitStatus, Stdio};

/// The end of `mesh-client ARGUMENTS` in a terminal that is gone.
fn unheard(arguments: &[&str]) -> ExitStatus {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-client"));
    command.args(arguments).stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
    command.status().unwrap()
}

#[test]
fn the_exit_code_is_the_same_whether_anybody_reads_the_words_or_not() {
    assert_eq!(unheard(&["inspect", "/nowhere/model.onnx"]).code(), Some(3));
    // Port 1 is nobody's.
    let absent = ["--broker", "tcp://127.0.0.1:1", "--timeout", "100ms", "--state-dir"];
    let state = tempfile::tempdir().unwrap();
    let arguments = [&absent[..], &[state.path().to_str().unwrap(), "status"]].concat();
    assert_eq!(unheard(&arguments).code(), Some(6));
}
