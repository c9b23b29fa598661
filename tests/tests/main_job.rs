//! The main job with real models and inputs: through broker, worker and both engines, against the runtimes from PyPI.
//!
//! `runner/reference/check` makes inputs and expected outputs. Tolerance for all models: 2e-5 of the largest expected
//! value plus 1e-6. Such small differences come from sums in another order, by another number of threads.

use std::{
    fs,
    path::{Path, PathBuf},
};

use mesh_tests::{
    Mesh, PATIENCE,
    cache::{cached, input, model},
    docker,
    npy::Array,
    wait_until,
};

/// Reference cases and their models.
const CASES: &[(&str, &str)] = &[
    // Vision models in half precision, dense and sparse; parametric activations; a segmentation.
    ("face", "face_detection_short_range.tflite"),
    ("face_cat", "face_detection_short_range.tflite"),
    ("face_sparse", "face_detection_full_range_sparse.tflite"),
    ("landmarks", "face_landmark.tflite"),
    ("iris", "iris_landmark.tflite"),
    ("selfie", "selfie_segmentation.tflite"),
    // 8-bit integers in and out, with internal state.
    ("wakeword", "okay_nabu.tflite"),
    // The same networks in both formats, with an open batch dimension and several outputs.
    ("notes_tflite", "nmp.tflite"),
    ("notes_onnx", "nmp.onnx"),
    ("embedding_tflite", "embedding_model.tflite"),
    ("embedding_onnx", "embedding_model.onnx"),
    ("melspectrogram_tflite", "melspectrogram.tflite"),
    ("melspectrogram_onnx", "melspectrogram.onnx"),
    // Several inputs, which the signature names in another order than the graph; a result that tells them apart.
    ("difference", "difference.tflite"),
    // An ONNX model with weights and activations of 8 bits.
    ("embedding_int8", "embedding_int8.onnx"),
    // 32-bit integers in; several inputs, one of them a single 64-bit integer; a branch.
    ("filetype", "magika.onnx"),
    ("speech", "silero_vad.onnx"),
];

fn arrays(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())).flatten();
    let mut files: Vec<PathBuf> = files.map(|entry| entry.path()).collect();
    files.sort();
    files
}

/// Submits a case's inputs and compares every output with the reference.
fn run_case(mesh: &Mesh, case: &str, model_name: &str) {
    let case_folder = cached(&format!("reference/{case}/expected")).parent().expect("it has one").to_owned();
    let inputs = arrays(&case_folder.join("inputs"));
    let path = |file: &Path| file.display().to_string();
    let given: Vec<String> = match &inputs[..] {
        [only] => vec![path(only)],
        several => {
            let name = |file: &Path| file.file_stem().expect("a name").to_string_lossy().into_owned();
            several.iter().map(|file| format!("{}={}", name(file), path(file))).collect()
        }
    };
    let output = mesh.folder().join(format!("out-{case}"));
    let (model, folder) = (path(&model(model_name)), path(&output));
    let mut arguments = vec!["submit", "--output", &folder, &model];
    arguments.extend(given.iter().map(String::as_str));

    mesh.client(&arguments).succeeded();

    for expected in arrays(&case_folder.join("expected")) {
        let file = output.join(expected.file_name().expect("a name"));
        compare(case, &Array::read(&file), &Array::read(&expected));
    }
}

fn compare(case: &str, got: &Array, expected: &Array) {
    assert_eq!((&got.shape, &got.dtype), (&expected.shape, &expected.dtype), "{case}");
    let (got, expected) = (got.numbers(), expected.numbers());
    let largest = expected.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    let error = got.iter().zip(&expected).fold(0.0_f64, |error, (got, expected)| error.max((got - expected).abs()));
    assert!(error <= 2e-5 * largest + 1e-6, "{case} differs from the reference by {error}, largest value {largest}");
}

fn run_all(engine: &str) {
    let mesh = Mesh::start();
    let _workers = [mesh.worker_with("w1", &["--engine", engine]), mesh.worker_with("w2", &["--engine", engine])];
    for (case, model) in CASES {
        run_case(&mesh, case, model);
    }
    let cases = Some(CASES.len() as f64);
    wait_until("the broker to know all ends", PATIENCE, || mesh.metric("tasks_done_total") == cases);
    assert_eq!(mesh.metric("attempts_retried_total"), Some(0.0));
}

#[test]
fn every_family_of_models_in_child_processes() {
    run_all("process");
}

#[test]
fn every_family_of_models_in_containers() {
    if docker::is_ready("every_family_of_models_in_containers") {
        run_all("docker");
    }
}

#[test]
fn a_photograph_is_found_to_show_a_face_and_a_cat_is_not() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = model("face_detection_short_range.tflite").display().to_string();
    let best_score = |picture: &str| {
        let (picture, output) = (input(picture).display().to_string(), mesh.folder().join(picture));
        let folder = output.display().to_string();
        mesh.client(&["submit", &model, &picture, "--normalize=-1..1", "--output", &folder]).succeeded();
        let outputs = arrays(&output).into_iter().filter(|file| file.extension().is_some_and(|kind| kind == "npy"));
        let scores = outputs.map(|file| Array::read(&file)).find(|array| array.shape.ends_with(&[896, 1]));
        let logit = scores.expect("896 scores").f32s().into_iter().fold(f32::MIN, f32::max);
        1.0 / (1.0 + (-logit).exp())
    };
    assert!(best_score("astronaut.png") > 0.9);
    assert!(best_score("chelsea.png") < 0.7);
}

#[test]
fn a_model_with_operators_of_its_makers_own_is_refused_by_name() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = model("face_landmark_with_attention.tflite").display().to_string();
    let input = mesh.file("picture.bin", &vec![0; 192 * 192 * 3 * 4]);
    mesh.client(&["submit", &model, &input]).failed_with(3, "Landmarks2TransformMatrix");
}
