//! Style rules that a program can check: edges between crates, purity of the core, budgets, leftovers, documents that
//! are true. A rule that has to be explained twice in review belongs here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use mesh_tests::cache::repository;
use serde_json::Value;

/// Allowed dependencies between the workspace's packages. `ARCHITECTURE.md` draws them.
const EDGES: &[(&str, &[&str])] = &[
    ("proto-msgs", &[]),
    ("mesh-samples", &["proto-msgs"]),
    ("mesh-core", &["proto-msgs"]),
    ("mesh-transport", &["proto-msgs"]),
    ("mesh-models", &["proto-msgs"]),
    ("mesh-runner", &["mesh-models", "proto-msgs"]),
    ("mesh-broker", &["mesh-core", "mesh-transport", "proto-msgs"]),
    ("mesh-worker", &["mesh-core", "mesh-transport", "proto-msgs"]),
    ("mesh-sdk", &["mesh-core", "mesh-models", "mesh-transport", "proto-msgs"]),
    ("mesh-client-cli", &["mesh-models", "mesh-sdk", "mesh-transport", "proto-msgs"]),
    ("mesh-tests", &["proto-msgs"]),
    ("mesh-bench", &["mesh-core", "mesh-samples", "mesh-sdk", "mesh-tests", "mesh-transport", "proto-msgs"]),
];

/// External crates that only these packages may use. `deny.toml` has more of them.
const KEEPERS: &[(&str, &[&str])] = &[
    ("redis", &["mesh-broker"]),
    ("redb", &["mesh-broker"]),
    ("bollard", &["mesh-worker"]),
    ("clap", &["mesh-bench", "mesh-broker", "mesh-client-cli", "mesh-runner", "mesh-worker"]),
    ("anyhow", &["mesh-bench", "mesh-client-cli", "mesh-runner", "mesh-worker"]),
    ("bincode", &["proto-msgs"]),
    ("ort", &["mesh-runner"]),
];

/// Packages without waiting: no async runtime for any purpose.
const WITHOUT_TOKIO: &[&str] = &["proto-msgs", "mesh-core", "mesh-models", "mesh-tests"];

/// Names that could make the same events give other actions.
const IMPURE: &[&str] = &[
    "std::time::Instant",
    "Instant::now",
    "SystemTime",
    "std::net",
    "std::fs",
    "std::io",
    "std::env",
    "std::thread",
    "std::process",
    "std::sync",
    "rand::",
    "HashMap",
    "HashSet",
    "println!",
];

const FILE_LINES_MAX: usize = 500;
const FUNCTION_LINES_MAX: usize = 60;

/// The rooms of the worker's sources, from the bottom up: each names only those before it.
const WORKER_ROOMS: &[&str] = &["state", "data", "engine", "runners", "tools", "batch", "desk", "start"];

/// Files and functions over budget, with their present lines. They may shrink, never grow. Once one is within the
/// budget, its line here is deleted.
const OVER_BUDGET: &[(&str, usize)] = &[("runner/src/engine/litert/reshape.rs::rewrite", 65)];

/// Text files that git tracks or would track, by path from the root.
fn text_files() -> BTreeMap<String, String> {
    let listed = run(Command::new("git").args(["ls-files", "--cached", "--others", "--exclude-standard"]));
    listed
        .lines()
        .filter_map(|path| Some((path.to_owned(), fs::read_to_string(repository().join(path)).ok()?)))
        .collect()
}

fn rust_files() -> BTreeMap<String, String> {
    // zeromq-src keeps the form of the crate that it replaces.
    text_files().into_iter().filter(|(path, _)| path.ends_with(".rs") && !path.contains("zeromq-src")).collect()
}

fn run(command: &mut Command) -> String {
    let output = command.current_dir(repository()).output().expect("the tool is there");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Every dependency of every package: package, dependency, whether only its tests use it.
fn dependencies() -> Vec<(String, String, bool)> {
    let text = run(Command::new("cargo").args(["metadata", "--no-deps", "--format-version", "1", "--offline"]));
    let metadata: Value = serde_json::from_str(&text).expect("cargo writes JSON");
    let string = |value: &Value| value.as_str().expect("a string").to_owned();
    let of_package = |package: &Value| {
        let name = string(&package["name"]);
        let dependencies = package["dependencies"].as_array().expect("a list").clone();
        dependencies.into_iter().map(move |dep| (name.clone(), string(&dep["name"]), dep["kind"] == "dev"))
    };
    metadata["packages"].as_array().expect("a list").iter().flat_map(of_package).collect()
}

/// Fails with all findings at once.
#[track_caller]
fn assert_none(rule: &str, findings: impl IntoIterator<Item = String>) {
    let findings: Vec<String> = findings.into_iter().collect();
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

#[test]
fn crates_know_only_what_they_may() {
    let edges: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    let members: BTreeSet<&str> = edges.keys().copied().collect();
    let all = dependencies();
    let packages: BTreeSet<&str> = all.iter().map(|(package, ..)| package.as_str()).collect();
    assert_none(
        "a package that the table of edges does not name",
        packages.difference(&members).map(|name| (*name).to_owned()),
    );
    let forbidden = all.iter().filter(|(package, dep, tests_only)| {
        members.contains(dep.as_str()) && !tests_only && !edges[package.as_str()].contains(&dep.as_str())
    });
    assert_none("an edge that is not drawn", forbidden.map(|(package, dep, _)| format!("{package} -> {dep}")));
}

#[test]
fn crates_from_outside_stay_where_they_belong() {
    let all = dependencies();
    let outside = all.iter().filter(|(package, dep, tests_only)| {
        let keepers = KEEPERS.iter().find(|(name, _)| name == dep);
        !tests_only && keepers.is_some_and(|(_, keepers)| !keepers.contains(&package.as_str()))
    });
    assert_none("kept by others", outside.map(|(package, dep, _)| format!("{package} -> {dep}")));
    let of_each = KEEPERS.iter().flat_map(|(dep, keepers)| keepers.iter().map(move |keeper| (*keeper, *dep)));
    let idle = of_each.filter(|(keeper, dep)| !all.iter().any(|(package, used, _)| package == keeper && used == dep));
    assert_none("a keeper of what it does not use", idle.map(|(keeper, dep)| format!("{keeper} -> {dep}")));
    let waiting = all.iter().filter(|(package, dep, _)| dep == "tokio" && WITHOUT_TOKIO.contains(&package.as_str()));
    assert_none("nothing waits in", waiting.map(|(package, ..)| package.clone()));
}

#[test]
fn one_file_of_the_worker_knows_containers() {
    let naming: Vec<String> = rust_files()
        .into_iter()
        .filter(|(path, text)| {
            let is_code = path.starts_with("worker/src/") && !path.ends_with("/tests.rs");
            is_code && code_lines(text).any(|line| line.contains("bollard::"))
        })
        .map(|(path, _)| path)
        .collect();
    assert!(naming.len() == 1, "exactly one file names bollard, not {naming:?}");
}

#[test]
fn the_worker_s_rooms_know_only_what_is_below_them() {
    let mut findings = Vec::new();
    for (path, text) in rust_files() {
        let Some(inside) = path.strip_prefix("worker/src/").filter(|inside| !inside.contains("tests")) else {
            continue;
        };
        let room = inside.split(['/', '.']).next();
        let Some(at) = WORKER_ROOMS.iter().position(|known| Some(*known) == room) else { continue };
        let code: String = text.split("#[cfg(test)]").take(1).collect();
        for statement in code.split("use crate::").skip(1).filter_map(|rest| rest.split(';').next()) {
            let words: BTreeSet<&str> = statement.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            let above = WORKER_ROOMS[at + 1..].iter().filter(|above| words.contains(**above));
            findings.extend(above.map(|above| format!("{path} names {above}")));
        }
    }
    assert_none("a room of the worker names one above it", findings);
}

#[test]
fn the_core_is_pure() {
    let findings =
        rust_files().into_iter().filter(|(path, _)| path.starts_with("core/src/")).flat_map(|(path, text)| {
            let impure = |line: &str| IMPURE.iter().find(|word| line.contains(**word)).copied();
            code_lines(&text).filter_map(|line| Some(format!("{path}: {}", impure(line)?))).collect::<Vec<_>>()
        });
    assert_none("the machines are told time and do nothing themselves", findings);
}

/// The lines that are not comments.
fn code_lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.trim_start().starts_with("//"))
}

#[test]
fn files_and_functions_can_be_read_at_one_go() {
    let allowed: BTreeMap<&str, usize> = OVER_BUDGET.iter().copied().collect();
    let mut sizes = BTreeMap::new();
    for (path, text) in rust_files() {
        sizes.extend(function_sizes(&path, &text).into_iter().map(|(name, lines)| (name, (lines, FUNCTION_LINES_MAX))));
        sizes.insert(path, (text.lines().count(), FILE_LINES_MAX));
    }
    let findings = sizes.iter().filter_map(|(what, (lines, budget))| match allowed.get(what.as_str()) {
        None => (lines > budget).then(|| format!("{what}: {lines} lines, the budget is {budget}")),
        Some(_) if lines <= budget => Some(format!("{what} is within the budget now: delete it from the list")),
        Some(ratchet) if lines > ratchet => Some(format!("{what} grew from {ratchet} to {lines} lines")),
        Some(_) => None,
    });
    let gone = allowed.keys().filter(|what| !sizes.contains_key(**what)).map(|what| format!("{what} is gone"));
    assert_none("over budget", findings.chain(gone));
}

/// Lines of each function, named `path::function`. Relies on rustfmt: a function ends at its start's indentation.
fn function_sizes(path: &str, text: &str) -> BTreeMap<String, usize> {
    let lines: Vec<&str> = text.lines().collect();
    let mut sizes = BTreeMap::new();
    for (start, line) in lines.iter().enumerate() {
        let words = line.split_once("fn ").filter(|(before, _)| {
            before.split_whitespace().all(|word| {
                word.starts_with("pub")
                    || ["const", "async", "unsafe", "extern", "\"C\"", "in", "super)"].contains(&word)
            })
        });
        let Some((before, after)) = words else { continue };
        let indentation = before.len() - before.trim_start().len();
        let closes = |line: &&str| {
            line.starts_with('}') || line.strip_prefix(&" ".repeat(indentation)).is_some_and(|l| l.starts_with('}'))
        };
        if line.ends_with('}') || line.ends_with(';') {
            continue;
        }
        let length = lines[start + 1..].iter().position(closes).map_or(1, |end| end + 2);
        let name: String = after.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        // Of several functions with one name, the longest counts.
        let size = sizes.entry(format!("{path}::{name}")).or_insert(0);
        *size = length.max(*size);
    }
    sizes
}

#[test]
fn every_file_says_what_it_is_for() {
    let silent =
        rust_files().into_iter().filter(|(path, text)| !text.starts_with("//!") && !path.ends_with("/tests.rs"));
    assert_none("a file opens with `//!`: what it owns, what it never does", silent.map(|(path, _)| path));
}

#[test]
fn nothing_is_left_lying_about() {
    // The words are put together here, so that this file does not contain them.
    let leftovers = [
        ["to", "do!("],
        ["unimplement", "ed!("],
        ["db", "g!("],
        ["FIX", "ME"],
        ["TO", "DO:"],
        ["XX", "X:"],
        ["HA", "CK:"],
    ];
    let places = [["/wo", "rk/"], ["/ro", "ot/"], ["/home", "/user"], ["shared/", "research"], ["shared/", "design"]];
    let words: Vec<String> = leftovers.iter().chain(&places).map(|pair| pair.concat()).collect();
    let findings = text_files().into_iter().filter(|(path, _)| path != "Cargo.lock").flat_map(|(path, text)| {
        let found = words.iter().filter(|word| text.contains(*word)).map(|word| format!("{path}: {word}"));
        found.collect::<Vec<_>>()
    });
    assert_none("leftovers of work, and paths of somebody's machine", findings);
}

#[test]
fn tests_wait_for_conditions_and_never_just_nap() {
    let nap = ["sl", "eep("].concat();
    // Only a test harness, a file `support.rs`, may sleep between two checks of a condition.
    let is_test = |path: &str| path.contains("/tests/") && !path.ends_with("/support.rs");
    let findings = rust_files()
        .into_iter()
        .filter(|(path, text)| is_test(path) && code_lines(text).any(|line| line.contains(&nap)));
    assert_none("wait for what must happen instead", findings.map(|(path, _)| path));
}

#[test]
fn manifests_take_lints_from_the_workspace() {
    let manifests = text_files()
        .into_iter()
        .filter(|(path, _)| path.ends_with("/Cargo.toml") && !path.contains("zeromq-src") && !path.contains("/fuzz/"));
    let without = manifests.filter(|(_, text)| !text.contains("[lints]\nworkspace = true"));
    assert_none("lints are the workspace's", without.map(|(path, _)| path));
}

#[test]
fn architecture_md_is_short_and_true() {
    let text = fs::read_to_string(repository().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    let lines = text.lines().count();
    assert!(lines < 200, "ARCHITECTURE.md has {lines} lines: an hour's reader gives it ten minutes");
    assert_none("ARCHITECTURE.md names what is not there", missing_paths(&text));
}

#[test]
fn readme_and_contributing_name_only_what_is_there() {
    for name in ["README.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(repository().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_none(&format!("{name} names what is not there"), missing_paths(&text));
    }
}

/// Paths in `backquotes` or (links) that begin with a folder of the repository and do not exist.
fn missing_paths(document: &str) -> Vec<String> {
    let folders: BTreeSet<String> =
        text_files().keys().filter_map(|path| Some(format!("{}/", path.split_once('/')?.0))).collect();
    let mentioned = document.split(['`', '(', ')', ' ', '\n', ',']).map(|word| word.trim_end_matches(['.', ':', ';']));
    let ours = mentioned.filter(|word| {
        let word = word.strip_prefix("./").unwrap_or(word);
        folders.iter().any(|folder| word.starts_with(folder.as_str())) && !word.contains(['*', '{', '<', '$', '…'])
    });
    let missing = ours.filter(|word| !repository().join(Path::new(word)).exists());
    missing.map(str::to_owned).collect()
}
