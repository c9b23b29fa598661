//! Models that must not be served, and a machine that cannot serve any model.

use std::{
    fs,
    path::{Path, PathBuf},
};

use proto_msgs::Arch;
use serde_json::Value;

use crate::support::{Runner, data_folder, model, program, refusal};

fn refusal_of(bytes: &[u8]) -> (Option<i32>, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model");
    fs::write(&file, bytes).unwrap();
    refusal(&file, &[], &[])
}

#[test]
fn an_unknown_operator_is_named() {
    let (status, code, text) = refusal(&model("face_landmark_with_attention.tflite"), &[], &[]);
    assert_eq!((status, code.as_str()), (Some(11), "MODEL_UNSUPPORTED"));
    assert!(text.contains("Landmarks2TransformMatrix"), "{text}");

    // For ONNX: one operator gets an unknown name.
    let mut bytes = fs::read(model("nmp.onnx")).unwrap();
    let name = b"\x22\x07Sigmoid";
    let at = bytes.windows(name.len()).position(|window| window == name).expect("the network ends in sigmoids");
    bytes[at + 2..at + 9].copy_from_slice(b"Wonders");
    let (status, code, text) = refusal_of(&bytes);
    assert_eq!((status, code.as_str()), (Some(11), "MODEL_UNSUPPORTED"), "{text}");
    assert!(text.contains("Wonders"), "{text}");
}

#[test]
fn a_file_that_is_no_model_is_refused() {
    for bytes in [&b""[..], b"hello", &[0; 1000], b"PK\x03\x04 not a model"] {
        let (status, code, text) = refusal_of(bytes);
        assert_eq!((status, code.as_str()), (Some(11), "MODEL_UNSUPPORTED"), "{text}");
    }
    let (status, code, _) = refusal(&model("magika.onnx"), &["--format", "tflite"], &[]);
    assert_eq!((status, code.as_str()), (Some(10), "MODEL_INVALID"));
    let (status, code, _) = refusal(Path::new("/nonexistent"), &[], &[]);
    assert_eq!((status, code.as_str()), (Some(10), "MODEL_INVALID"));
}

#[test]
fn a_cut_model_is_refused_wherever_it_is_cut() {
    for name in ["okay_nabu.tflite", "nmp.onnx"] {
        let bytes = fs::read(model(name)).unwrap();
        for part in 1..8 {
            let (status, code, text) = refusal_of(&bytes[..bytes.len() * part / 8]);
            assert_eq!((status, code.as_str()), (Some(10), "MODEL_INVALID"), "{part}/8 of {name}: {text}");
        }
    }
}

/// The libraries that docker/fetch-runtimes brings compute on the processor.
#[test]
fn a_gpu_that_is_demanded_and_cannot_be_used_is_not_replaced_by_the_processor() {
    for name in ["nmp.onnx", "okay_nabu.tflite"] {
        let (status, code, text) = refusal(&model(name), &["--gpu-required"], &[]);
        assert_eq!((status, code.as_str()), (Some(13), "ENGINE_UNAVAILABLE"), "{name}: {text}");
        assert!(text.contains("cannot compute on a GPU") && text.contains("without --gpu-memory"), "{text}");
        let wish = Runner::serve(&model(name), &["--gpu"]);
        assert_eq!(wish.connect().get("/v2/models/model").status, 200, "{name}: a wish only");
    }
}

#[test]
fn without_its_library_the_runner_names_the_command_that_fetches_it() {
    let (face, magika) = (model("face_detection_short_range.tflite"), model("magika.onnx"));
    let empty = tempfile::tempdir().unwrap();
    for (model, library) in [(&face, "libLiteRt.so"), (&magika, "libonnxruntime.so")] {
        let nowhere = [("MESH_RUNTIME_DIR", empty.path()), ("XDG_DATA_HOME", empty.path())];
        let (status, code, text) = refusal(model, &[], &nowhere);
        assert_eq!((status, code.as_str()), (Some(13), "ENGINE_UNAVAILABLE"));
        assert!(text.contains(library) && text.contains("docker/fetch-runtimes"), "{text}");

        for other in [&b"no library"[..], &another_library()] {
            let wrong = tempfile::tempdir().unwrap();
            fs::write(wrong.path().join(library), other).unwrap();
            let (status, code, text) = refusal(model, &[], &[("MESH_RUNTIME_DIR", wrong.path())]);
            assert_eq!((status, code.as_str()), (Some(13), "ENGINE_UNAVAILABLE"));
            assert!(text.contains(library) && text.contains("docker/fetch-runtimes"), "{text}");
        }
    }
}

#[test]
fn who_asks_hears_which_libraries_can_be_used_before_any_model_comes() {
    let ask = |variables: &[(&str, &Path)]| {
        let output = program().args(["runtimes", "--json"]).envs(variables.iter().copied()).output().unwrap();
        let said: Value = serde_json::from_slice(&output.stdout).expect("one document");
        (output.status.code(), said[0].clone(), said[1].clone())
    };
    let _fetched = model("magika.onnx");
    let (status, litert, onnx) = ask(&[]);
    assert_eq!(status, Some(0), "{litert} {onnx}");
    assert_eq!([&litert["format"], &onnx["format"]], ["tflite", "onnx"]);

    let wrong = tempfile::tempdir().unwrap();
    fs::write(wrong.path().join("libonnxruntime.so"), "no library").unwrap();
    let (status, litert, onnx) = ask(&[("MESH_RUNTIME_DIR", wrong.path())]);
    assert_eq!(status, Some(13));
    assert!(litert["library"].is_string(), "it is in the usual place: {litert}");
    assert!(litert["remark"].as_str().unwrap().contains("MESH_RUNTIME_DIR"), "{litert}");
    let failure = onnx["failure"].as_str().unwrap();
    assert!(failure.contains("libonnxruntime.so") && failure.contains("docker/fetch-runtimes"), "{failure}");
}

/// A library as large as these starts threads of its own and takes itself apart at the end of the process. If that
/// crashes, the worker believes that the model did it.
#[test]
fn one_runtime_in_the_place_of_the_other_is_no_fault_of_the_model() {
    let magika = model("magika.onnx");
    let wrong = tempfile::tempdir().unwrap();
    fs::copy(library("libLiteRt.so"), wrong.path().join("libonnxruntime.so")).unwrap();
    for _ in 0..5 {
        let (status, code, text) = refusal(&magika, &[], &[("MESH_RUNTIME_DIR", wrong.path())]);
        assert_eq!((status, code.as_str()), (Some(13), "ENGINE_UNAVAILABLE"), "{text}");
    }
}

/// The file of a fetched library.
fn library(name: &str) -> PathBuf {
    let chosen = std::env::var_os("MESH_RUNTIME_DIR").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let folder = chosen.unwrap_or_else(|| data_folder().join("mesh/runtimes"));
    let mut places = [folder.join(name), folder.join(Arch::HERE.name()).join(name)].into_iter();
    places.find(|place| place.is_file()).expect("fetched with the models")
}

/// A real library that can be opened, but is none of the runtimes: one of the compiler's.
fn another_library() -> Vec<u8> {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let path =
        maps.lines().find_map(|line| line.split_whitespace().last().filter(|path| path.contains("/libgcc_s.so")));
    fs::read(path.expect("Rust programs are linked with it")).unwrap()
}
