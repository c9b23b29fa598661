//! The README's commands: each of their flags exists in its program.

use std::{collections::BTreeSet, fs, process::Command};

use mesh_tests::{cache::repository, process::binary};

/// Words of a text that begin with two hyphens.
fn flags(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| c.is_whitespace() || "`,()[]=".contains(c));
    let flags = words.filter(|word| word.starts_with("--") && word.len() > 2);
    flags.map(|flag| flag.trim_end_matches(['.', ':', ';']).to_owned()).collect()
}

/// The output of `PROGRAM [COMMAND] --help`.
fn help(program: &str, command: Option<&str>) -> String {
    let output = Command::new(binary(program)).args(command).arg("--help").output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error} (cargo build --release)"));
    assert!(output.status.success(), "{program} {command:?} --help");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Commands in a document: its code blocks with continued lines joined, and its text between single backquotes.
fn commands(document: &str) -> Vec<String> {
    let joined = document.replace("\\\n", " ");
    let blocks = joined.lines().filter(|line| line.starts_with("    ")).map(|line| {
        let line = line.trim_start();
        // Two spaces and `#` begin a comment.
        line.split_once("  #").map_or(line, |(command, _)| command).to_owned()
    });
    let prose: String =
        joined.lines().filter(|line| !line.starts_with("    ")).map(|line| format!("{line}\n")).collect();
    blocks.chain(prose.split('`').skip(1).step_by(2).map(str::to_owned)).collect()
}

#[test]
fn every_flag_in_the_readme_is_one_that_its_program_takes() {
    let readme = fs::read_to_string(repository().join("README.md")).expect("README.md is there");
    let mut looked_at = 0;
    for command in commands(&readme) {
        let mut words = command.split_whitespace().skip_while(|word| !word.starts_with("mesh-"));
        let Some(program) = words.next().filter(|program| binary(program).is_file()) else { continue };
        let of_program = help(program, None);
        let is_command =
            |word: &&str| of_program.lines().any(|line| line.trim_start().starts_with(&format!("{word} ")));
        let named = words.take_while(|word| *word != "#").find(|word| !word.starts_with("--") && is_command(word));
        let (before, behind) = match named {
            Some(named) => command.split_once(&format!(" {named}")).expect("just found"),
            None => (command.as_str(), ""),
        };
        let of_command = named.map(|named| help(program, Some(named))).unwrap_or_default();
        for (shown, taken) in [(before, of_program), (behind, of_command)] {
            let taken = flags(&taken);
            let is_taken = |flag: &String| match flag.strip_suffix('…') {
                Some(beginning) => taken.iter().any(|taken| taken.starts_with(beginning)),
                None => taken.contains(flag),
            };
            let unknown: Vec<_> = flags(shown).into_iter().filter(|flag| !is_taken(flag)).collect();
            assert!(unknown.is_empty(), "{program} does not take {unknown:?}: {command}");
            looked_at += flags(shown).len();
        }
    }
    assert!(looked_at > 30, "only {looked_at} flags were found in the README");
}

/// Debian's own Rust passes for one that is there, and then fails somewhere in the build.
#[test]
fn a_cargo_that_is_too_old_is_told_which_version_is_needed() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cargo = folder.path().join("cargo");
    let check = |version: &str| {
        fs::write(&cargo, format!("#!/bin/sh\necho cargo {version} \\(of a test\\)\n")).expect("the folder is ours");
        fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).expect("the file is ours");
        let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").expect("there is one"));
        let script = ". .ci/common.sh; need_packages() { :; }; need_build_tools";
        let mut shell = Command::new("bash");
        let output = shell.args(["-c", script]).env("PATH", path).current_dir(repository()).output().expect("bash");
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    for old in ["1.63.0", "1.9.0", "1.94.1"] {
        let (is_good, said) = check(old);
        assert!(!is_good && said.contains(&format!("cargo {old} is too old")) && said.contains("Rust 1."), "{said}");
    }
    for good in ["1.95.0", "1.100.0", "2.0.0"] {
        assert!(check(good).0, "{good}");
    }
}
