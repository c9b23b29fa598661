//! The completion script in a real shell.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

use std::process::Command;

/// What bash offers at the end of this line.
fn offered(line: &str) -> Vec<String> {
    let script = "source <(\"$0\" completions bash) && COMP_WORDS=($1) && COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) \
        && complete_with=$(complete -p mesh-client | sed 's/.*-F \\([^ ]*\\).*/\\1/') \
        && $complete_with mesh-client \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD - 1]}\"; \
        printf '%s\\n' \"${COMPREPLY[@]}\"";
    let output = Command::new("bash").args(["-c", script, env!("CARGO_BIN_EXE_mesh-client"), line]).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.is_empty(), "{errors}");
    String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_their_flags() {
    assert_eq!(offered("mesh-client sub"), ["submit"]);
    assert_eq!(offered("mesh-client submit --la"), ["--lane", "--layout"]);
    assert_eq!(offered("mesh-client submit --layout n"), ["nhwc", "nchw"]);
    assert_eq!(offered("mesh-client submit --lane b"), ["batch"]);
    assert_eq!(offered("mesh-client bench --rat"), ["--rate"]);
}
