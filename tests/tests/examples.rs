//! The examples of the SDK, run against a mesh as their heads tell. `./test` builds them with everything else.

use std::process::Command;

use mesh_tests::{Answer, Mesh, PATIENCE, Submission, onnx, process::binary, wait_until};

/// Runs an example to its end.
fn run(mesh: &Mesh, name: &str, arguments: &[&str]) -> Answer {
    let program = binary(&format!("examples/{name}"));
    assert!(program.exists(), "{} is missing: cargo build --release --examples", program.display());
    let mut command = Command::new(program);
    command.args(arguments).env("MESH_BROKER", mesh.endpoint()).env("HOME", mesh.folder());
    Submission::start(command).wait().succeeded()
}

/// A file of raw little-endian numbers.
fn raw(mesh: &Mesh, name: &str, numbers: &[f32]) -> String {
    mesh.file(name, &numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<_>>())
}

#[test]
fn hello_mesh_prints_the_answer() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("add_one.onnx", &onnx::add_one_to(&[4]));
    let input = raw(&mesh, "four.bin", &[0.0, 1.5, -3.0, 41.0]);

    let said = run(&mesh, "hello_mesh", &[&model, &input]).stdout;

    assert!(said.starts_with("done on w1 in "), "{said}");
    assert!(said.contains("y FP32 [4]\n  [1.0, 2.5, -2.0, 42.0]"), "{said}");
}

#[test]
fn many_items_counts_each_item_once() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("add_one.onnx", &onnx::add_one_to(&[1]));
    let items: Vec<String> = (0..7_u8).map(|item| raw(&mesh, &format!("{item}.bin"), &[f32::from(item)])).collect();
    let arguments: Vec<&str> = [&model].into_iter().chain(&items).map(String::as_str).collect();

    let said = run(&mesh, "many_items", &arguments).stdout;

    assert!(said.starts_with("w1: 7 items\n0 failed, "), "{said}");
    wait_until("the broker to know all ends", PATIENCE, || mesh.metric("tasks_done_total") == Some(7.0));
}

#[test]
fn pipeline_gives_every_item_what_both_stages_make_of_it() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = mesh.file("add_one.onnx", &onnx::add_one_to(&[0, 2]));
    let items: Vec<String> =
        (0..10_u8).map(|item| raw(&mesh, &format!("{item}.bin"), &[f32::from(item), 0.0])).collect();
    let mut arguments = vec![model.as_str(), &model, "1,2"];
    arguments.extend(items.iter().map(String::as_str));

    let said = run(&mesh, "pipeline", &arguments);

    let lines: Vec<&str> = said.stdout.lines().collect();
    let expected: Vec<String> = items.iter().map(|path| format!("{path}: y FP32 [1, 2]")).collect();
    assert_eq!(lines, expected);
    assert!(said.stderr.contains("of stage 1"), "the second model ran, too: {}", said.stderr);
}
