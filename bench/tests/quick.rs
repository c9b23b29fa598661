//! Every bench works: the right answers come back, the right bytes arrive, the baselines run. Says nothing about speed.

use std::process::Command;

#[test]
fn every_bench_runs_to_its_table() {
    let output = Command::new(env!("CARGO_BIN_EXE_mesh-bench")).args(["all", "--quick"]).output();
    let output = output.expect("the bench was built with this test");
    let (said, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "mesh-bench ended with {}:\n{log}", output.status);
    for table in ["# Grants", "# Transfer", "# Submit", "# Idle", "# The Metric Table"] {
        assert!(said.contains(table), "'{table}' is missing in:\n{said}");
    }
    assert_eq!(said.matches("`; at commit ").count(), 5, "each says what was measured:\n{said}");
    assert!(said.contains("ratio to the best verified ≥ 1: m") && said.contains("- Aims: "), "aims are told:\n{said}");
}

#[test]
fn every_experiment_with_schedules_runs_to_its_table() {
    let output = Command::new(env!("CARGO_BIN_EXE_mesh-bench")).args(["schedule", "--quick"]).output();
    let output = output.expect("the bench was built with this test");
    let (said, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "mesh-bench ended with {}:\n{log}", output.status);
    let tables =
        ["# Realtime", "# Mixed:", "# Mixed, small", "# Closed", "# Two clients", "# One job", "# Two balanced"];
    let more =
        ["# A promise", "# A worker becomes slow", "# Real models", "# Placement policies", "# What one decision"];
    for table in tables.iter().chain(&more) {
        assert!(said.contains(table), "'{table}' is missing in:\n{said}");
    }
    assert_eq!(
        said.matches("`; at commit ").count(),
        tables.len() + more.len(),
        "each says what was measured:\n{said}"
    );
    assert!(said.contains("worst max/min ≤ 1.15: m"), "aims are told:\n{said}");
    assert!(said.contains("max s ≤ Triton's max s: nothing to compare with"), "and what has none to judge by:\n{said}");
}
