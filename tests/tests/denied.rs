//! What may come in from outside: the lists of `deny.toml`, as far as they need nothing from the network. Advisories
//! are left to `cargo deny check`.

use std::{collections::BTreeMap, fs, process::Command};

use mesh_tests::cache::repository;
use serde_json::Value;

fn deny_toml() -> String {
    fs::read_to_string(repository().join("deny.toml")).expect("deny.toml is there")
}

/// The text between `[section]` and the next one, without comments.
fn section(name: &str) -> String {
    let text = deny_toml();
    let lines = text.lines().skip_while(|line| *line != format!("[{name}]")).skip(1);
    let lines = lines.take_while(|line| !line.starts_with('[')).filter(|line| !line.trim_start().starts_with('#'));
    lines.map(|line| format!("{line}\n")).collect()
}

/// The strings in quotes.
fn quoted(text: &str) -> Vec<&str> {
    text.split('"').skip(1).step_by(2).collect()
}

/// The packages that are built for this machine, as cargo describes them.
fn packages() -> Vec<Value> {
    let host = Command::new("rustc").arg("-vV").output().expect("cargo has brought it").stdout;
    let host = String::from_utf8_lossy(&host).into_owned();
    let host = host.lines().find_map(|line| line.strip_prefix("host: ")).expect("it names its host");
    let mut cargo = Command::new("cargo");
    cargo.args(["metadata", "--format-version", "1", "--offline", "--locked", "--filter-platform", host]);
    let output = cargo.current_dir(repository()).output().expect("cargo is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    metadata["packages"].as_array().expect("a list").clone()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

#[track_caller]
fn assert_none(rule: &str, findings: impl IntoIterator<Item = String>) {
    let findings: Vec<String> = findings.into_iter().collect();
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

/// Whether an SPDX expression can be met with these licences. `OR` binds weaker than `AND`; `/` is an old `OR`.
fn is_met(expression: &str, allowed: &[&str]) -> bool {
    let mut depth = 0_i32;
    let mut words: Vec<String> = vec![String::new()];
    // Words in brackets stay one word.
    for letter in expression.replace('/', " OR ").chars() {
        depth += i32::from(letter == '(') - i32::from(letter == ')');
        match letter {
            ' ' if depth == 0 => words.push(String::new()),
            letter => words.last_mut().expect("there is one").push(letter),
        }
    }
    words.retain(|word| !word.is_empty());
    let all = |words: &[String]| {
        words.split(|word| word == "AND").all(|part| match part {
            [one] if one.starts_with('(') => is_met(&one[1..one.len() - 1], allowed),
            other => allowed.contains(&other.join(" ").as_str()),
        })
    };
    words.split(|word| word == "OR").any(all)
}

#[test]
fn licences_are_read_as_spdx_means_them() {
    let allowed = ["MIT", "ISC", "Apache-2.0 WITH LLVM-exception"];
    for good in ["MIT", "GPL-3.0 OR MIT", "GPL-2.0 / MIT", "MIT/GPL-2.0", "ISC AND MIT", "(GPL-2.0 OR MIT) AND ISC"] {
        assert!(is_met(good, &allowed), "{good}");
    }
    assert!(is_met("Apache-2.0 WITH LLVM-exception OR GPL-3.0", &allowed));
    for bad in ["GPL-3.0", "MIT AND GPL-3.0", "(GPL-2.0 OR Apache-2.0) AND MIT", "Apache-2.0", ""] {
        assert!(!is_met(bad, &allowed), "{bad}");
    }
}

#[test]
fn every_licence_is_allowed() {
    let list = section("licenses");
    let allowed = quoted(&list);
    assert!(allowed.contains(&"MIT"), "the list is read: {allowed:?}");
    let packages = packages();
    let others = packages.iter().filter(|package| !is_met(text(package, "license"), &allowed));
    assert_none("not allowed in deny.toml", others.map(|package| format!("{}: {}", package["id"], package["license"])));
}

/// Whether a version is in a range like `>=3` or `<0.13`; an empty range holds every version.
fn is_in(version: &str, range: &str) -> bool {
    let numbers = |text: &str| -> Vec<u64> {
        let numbers = text.split(['.', '-', '+']).map_while(|part| part.parse().ok());
        numbers.chain(std::iter::repeat(0)).take(3).collect()
    };
    match (range.strip_prefix(">="), range.strip_prefix('<')) {
        (Some(least), _) => numbers(version) >= numbers(least),
        (_, Some(end)) => numbers(version) < numbers(end),
        _ => range.is_empty() || panic!("a range that this test cannot read: {range}"),
    }
}

#[test]
fn what_is_banned_does_not_come_in() {
    let bans = section("bans");
    let lines: Vec<&str> = bans.lines().filter(|line| line.contains("crate = ")).collect();
    assert!(lines.len() >= 5, "the list is read: {bans}");
    let packages = packages();
    let mut users: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in &packages {
        for dependency in package["dependencies"].as_array().expect("a list") {
            users.entry(text(dependency, "name")).or_default().push(text(package, "name"));
        }
    }
    let findings = lines.iter().flat_map(|line| {
        let words = quoted(line.split("reason").next().expect("a first part"));
        let (spec, wrappers) = words.split_first().expect("the crate's name");
        let (name, range) = spec.split_once(':').unwrap_or((spec, ""));
        let is_hit = |package: &&Value| text(package, "name") == name && is_in(text(package, "version"), range);
        let here = packages.iter().filter(is_hit).map(|package| package["id"].to_string());
        let strangers = users.get(name).into_iter().flatten().filter(|user| !wrappers.contains(user));
        let strangers = strangers.map(|user| format!("{user} uses {name}"));
        if wrappers.is_empty() { here.collect::<Vec<_>>() } else { strangers.collect() }
    });
    assert_none("banned in deny.toml", findings);
}

#[test]
fn everything_comes_from_the_registry_and_names_its_version() {
    let sources = section("sources");
    for rule in ["unknown-registry = \"deny\"", "unknown-git = \"deny\""] {
        assert!(sources.contains(rule), "this test holds it: {rule}");
    }
    let lock = fs::read_to_string(repository().join("Cargo.lock")).expect("Cargo.lock is there");
    let sources = lock.lines().filter_map(|line| line.strip_prefix("source = "));
    let known = "\"registry+https://github.com/rust-lang/crates.io-index\"";
    assert_none("another source", sources.filter(|source| *source != known).map(str::to_owned));

    assert!(section("bans").contains("wildcards = \"deny\""), "this test holds it");
    let packages = packages();
    let ours = packages.iter().filter(|package| package["source"].is_null());
    let any = ours
        .flat_map(|package| package["dependencies"].as_array().into_iter().flatten().map(move |dep| (package, dep)));
    let any = any.filter(|(_, dep)| text(dep, "req") == "*" && dep["path"].is_null());
    assert_none("any version", any.map(|(package, dep)| format!("{} of {}", dep["name"], package["name"])));
}
