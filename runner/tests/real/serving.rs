//! Real models behind a real socket.

use std::{fs, os::unix::net::UnixListener, path::Path, process::Stdio};

use crate::support::{Connection, Input, Runner, data_folder, file_ends, floats, model, program, until};
use serde_json::json;

#[test]
fn the_model_says_what_goes_in_and_out() {
    let runner = Runner::serve(&model("okay_nabu.tflite"), &["--name", "hey"]);
    let mut connection = runner.connect();
    let metadata = connection.get("/v2/models/hey");
    assert_eq!(metadata.status, 200);
    assert_eq!(metadata.json["platform"], "tflite_litert");
    let input = &metadata.json["inputs"][0];
    assert_eq!((&input["datatype"], &input["shape"]), (&json!("INT8"), &json!([1, 3, 40])));
    assert_eq!(input["parameters"]["zero_point"], -128);

    assert_eq!(connection.get("/v2/health/live").status, 200);
    assert_eq!(connection.get("/v2/health/ready").status, 200, "who has metadata knows that it is loaded");
    assert_eq!(connection.get("/v2/models/hey/versions/1/ready").status, 200);
    assert_eq!(connection.get("/v2").json["name"], "mesh-runner");
    assert_eq!(connection.get("/v2/models/model").status, 404);
    assert_eq!(connection.get("/").status, 404);
}

#[test]
fn this_file_is_recognised_as_rust() {
    let runner = Runner::serve(&model("magika.onnx"), &[]);
    let config: serde_json::Value = serde_json::from_slice(&fs::read(model("magika_config.json")).unwrap()).unwrap();
    let data = file_ends(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/serving.rs"));
    let input = Input { name: "bytes", datatype: "INT32", shape: &[1, 2048], data };
    let answer = runner.connect().infer(&[input], json!({}));
    let scores = answer.floats("target_label");
    let best = (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap();
    assert_eq!(config["target_labels_space"][best], "rust");
    assert!(scores[best] > 0.9, "{}", scores[best]);
}

/// What a library writes there, it writes to tell its makers who runs it.
#[test]
fn no_library_leaves_anything_in_the_home_folder() {
    let home = tempfile::tempdir().unwrap();
    let outputs = tempfile::tempdir().unwrap();
    let input = outputs.path().join("input.bin");
    fs::write(&input, notes(1)).unwrap();
    for name in ["nmp.onnx", "nmp.tflite"] {
        let mut command = program();
        command.arg("run").arg(model(name)).arg(&input).arg("--output").arg(outputs.path());
        command.env("XDG_DATA_HOME", data_folder()).env("HOME", home.path());
        command.env_remove("XDG_CACHE_HOME").env_remove("XDG_CONFIG_HOME").env_remove("ORT_DISABLE_TELEMETRY");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let left: Vec<_> = fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.is_empty(), "{name} leaves {left:?}");
    }
}

/// Two seconds of sound per row, each row with another pitch.
fn notes(rows: i64) -> Vec<u8> {
    let row = |row: i64| (0..43844).map(move |at| (at as f32 * (0.1254 + 0.07 * row as f32)).sin() * 0.4);
    floats((0..rows).flat_map(row))
}

#[test]
fn both_formats_of_a_network_hear_the_same_notes_whatever_the_batch() {
    let tflite = Runner::serve(&model("nmp.tflite"), &[]);
    let onnx = Runner::serve(&model("nmp.onnx"), &[]);
    let (mut tflite, mut onnx) = (tflite.connect(), onnx.connect());
    let hear = |connection: &mut Connection, rows| {
        let name = "serving_default_input_2:0";
        let input = Input { name, datatype: "FP32", shape: &[rows, 43844, 1], data: notes(rows) };
        let answer = connection.infer(&[input], json!({}));
        assert_eq!(answer.json["outputs"][0]["shape"], json!([rows, 172, 88]));
        answer.floats("StatefulPartitionedCall:1")
    };
    // Larger, smaller and the same again: the runtime must follow each time.
    for rows in [1, 2, 1, 1] {
        let (in_tflite, in_onnx) = (hear(&mut tflite, rows), hear(&mut onnx, rows));
        assert_eq!(in_tflite.len(), in_onnx.len());
        let loudest = in_onnx.iter().copied().fold(0.0, f32::max);
        assert!(loudest > 0.3, "a note is heard: {loudest}");
        let difference = in_tflite.iter().zip(&in_onnx).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference < 1e-3, "the same note is heard: {difference}");
    }
}

/// Three frames of a sound. The wake word network reacts to them if it has heard the 26 pieces before.
fn frames(step: i32) -> Vec<u8> {
    let feature = |at: i32| ((at % 40) * 18 + (step * 3 + at / 40) * 33) % 20 - 117;
    (0..120).map(|at| feature(at) as i8 as u8).collect()
}

#[test]
fn a_sequence_keeps_its_state_and_nobody_else_sees_it() {
    let runner = Runner::serve(&model("okay_nabu.tflite"), &[]);
    let mut connection = runner.connect();
    let mut hear = |step, parameters| {
        let name = "serving_default_input_audio:0";
        let input = Input { name, datatype: "INT8", shape: &[1, 3, 40], data: frames(step) };
        connection.infer(&[input], parameters).output("StatefulPartitionedCall:0")[0]
    };
    let mut stirs = |id: &str| {
        (0..28).map(|step| hear(step, json!({ "sequence_id": id, "sequence_start": step == 0 }))).last() > Some(0)
    };
    assert!(stirs("kitchen"), "it remembers what came before");
    assert!(stirs("hall"), "another sequence begins anew");
    assert_eq!(hear(28, json!({})), 0, "a request that stands alone has heard nothing before");
    assert_eq!(hear(28, json!({ "sequence_id": "hall" })), 0, "nor is a sequence left over behind it");
}

#[test]
fn json_and_binary_data_give_the_same_answer() {
    let runner = Runner::serve(&model("silero_vad.onnx"), &[]);
    let mut connection = runner.connect();
    let speech: Vec<f32> = (0..576).map(|at| (at as f32 * 0.05).sin() * 0.5).collect();
    let binary = connection.infer(
        &[
            Input { name: "sr", datatype: "INT64", shape: &[], data: 16000_i64.to_le_bytes().to_vec() },
            Input { name: "state", datatype: "FP32", shape: &[2, 1, 128], data: vec![0; 1024] },
            Input { name: "input", datatype: "FP32", shape: &[1, 576], data: floats(speech.iter().copied()) },
        ],
        json!({}),
    );
    let plain = connection.infer_json(&json!({
        "id": "seven",
        "inputs": [
            { "name": "input", "datatype": "FP32", "shape": [1, 576], "data": [speech] },
            { "name": "state", "datatype": "FP32", "shape": [2, 1, 128], "data": vec![0; 256] },
            { "name": "sr", "datatype": "INT64", "shape": [], "data": [16000] },
        ],
        "outputs": [{ "name": "output" }],
    }));
    assert_eq!(plain.status, 200, "{}", plain.json);
    assert_eq!(plain.json["id"], "seven");
    assert_eq!(plain.json["outputs"].as_array().unwrap().len(), 1, "only what was asked for");
    let spoken = plain.json["outputs"][0]["data"][0].as_f64().unwrap() as f32;
    assert_eq!(binary.floats("output"), [spoken]);
    assert_eq!(binary.floats("stateN").len(), 256);
}

#[test]
fn a_length_that_only_the_run_can_judge_is_refused_as_the_inputs_fault_and_another_one_runs() {
    for (file, name, said) in [
        ("melspectrogram.tflite", "serving_default_input:0", "failed to prepare"),
        ("melspectrogram.onnx", "input", "Invalid input shape: {10}"),
    ] {
        let runner = Runner::serve(&model(file), &[]);
        let mut connection = runner.connect();
        let mut heard = |samples: i64| {
            let data = floats((0..samples).map(|at| (at as f32 / 9.0).sin()));
            connection.infer(&[Input { name, datatype: "FP32", shape: &[1, samples], data }], json!({}))
        };
        assert_eq!(heard(1280).status, 200, "{file}");
        let refused = heard(10);
        let (status, code, text) = refused.error();
        assert_eq!((status, code), (400, "MODEL_INPUT_MISMATCH"), "{text}");
        assert!(text.contains("FP32 [1,10] where the file says FP32 [?,?]") && text.contains(said), "{text}");
        assert_eq!(heard(1280).status, 200, "{file} after it");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_the_connection_goes_on() {
    let runner = Runner::serve(&model("face_detection_short_range.tflite"), &["--body-limit", "1000000"]);
    let mut connection = runner.connect();
    let refused = |connection: &mut Connection, name, datatype, shape: &[i64], bytes| {
        let answer = connection.infer(&[Input { name, datatype, shape, data: vec![0; bytes] }], json!({}));
        let (status, code, text) = answer.error();
        (status, code.to_owned(), text.to_owned())
    };
    let mismatch = |text: &str| (400, "MODEL_INPUT_MISMATCH".to_owned(), text.to_owned());
    assert_eq!(
        refused(&mut connection, "input", "FP32", &[1, 64, 64, 3], 49152),
        mismatch("input 'input': expected FP32 [1,128,128,3], got FP32 [1,64,64,3]")
    );
    assert_eq!(
        refused(&mut connection, "input", "UINT8", &[1, 128, 128, 3], 49152),
        mismatch("input 'input': expected FP32 [1,128,128,3], got UINT8 [1,128,128,3]")
    );
    assert_eq!(
        refused(&mut connection, "input", "FP32", &[1, 128, 128, 3], 196_607),
        mismatch(
            "input 'input': expected FP32 [1,128,128,3], got FP32 [1,128,128,3] with 196607 bytes instead of 196608"
        )
    );
    assert_eq!(
        refused(&mut connection, "image", "FP32", &[1, 128, 128, 3], 196_608),
        mismatch("there is no input 'image': expected 'input'")
    );
    let none = connection.infer(&[], json!({}));
    assert_eq!(none.error().2, "input 'input' is missing: expected FP32 [1,128,128,3]");
    let odd = connection.infer_json(&json!({ "inputs": 7 }));
    assert_eq!((odd.error().0, odd.error().1), (400, "BAD_REQUEST"));

    let data = vec![0; 196_608];
    let good =
        connection.infer(&[Input { name: "input", datatype: "FP32", shape: &[1, 128, 128, 3], data }], json!({}));
    assert_eq!((good.status, good.floats("classificators").len()), (200, 896));

    let (status, code, _) = refused(&mut connection, "input", "FP32", &[1, 600, 600, 3], 1_000_000);
    assert_eq!((status, code.as_str()), (413, "TOO_LARGE"));
}

#[test]
fn an_output_that_the_runtime_cannot_give_is_an_error_and_never_zeros() {
    // One WHERE: the output has a row for each true element of the input.
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/where.tflite");
    let runner = Runner::serve(&file, &[]);
    let input = Input { name: "in", datatype: "BOOL", shape: &[8], data: vec![1, 0, 1, 1, 0, 0, 1, 0] };
    let answer = runner.connect().infer(&[input], json!({}));
    let (status, code, text) = answer.error();
    assert_eq!((status, code), (500, "MODEL_UNSUPPORTED"));
    assert!(text.contains("takes its shape during the run"), "{text}");
}

#[test]
fn a_truth_value_is_zero_or_one() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/real/where.tflite");
    let runner = Runner::serve(&file, &[]);
    let input = Input { name: "in", datatype: "BOOL", shape: &[8], data: vec![1, 0, 1, 2, 0, 0, 1, 0] };
    let answer = runner.connect().infer(&[input], json!({}));
    let (status, code, text) = answer.error();
    assert_eq!((status, code), (400, "MODEL_INPUT_MISMATCH"));
    assert!(text.contains("'in'") && text.ends_with("got 2"), "{text}");
}

#[test]
fn sigterm_ends_it_cleanly() {
    let mut runner = Runner::serve(&model("okay_nabu.tflite"), &[]);
    assert_eq!(runner.connect().get("/v2/models/model").status, 200);
    runner.signal(libc::SIGTERM);
    assert_eq!(runner.process.wait().unwrap().code(), Some(0));
    assert!(!runner.socket().exists());
}

#[test]
fn what_is_asked_when_it_is_told_to_end_is_answered_unless_it_is_told_twice() {
    let request = json!({ "inputs": [
        { "name": "input", "datatype": "FP32", "shape": [1, 576], "data": vec![0; 576] },
        { "name": "state", "datatype": "FP32", "shape": [2, 1, 128], "data": vec![0; 256] },
        { "name": "sr", "datatype": "INT64", "shape": [], "data": [16000] },
    ] });
    for times in [1, 2] {
        let mut runner = Runner::serve(&model("silero_vad.onnx"), &[]);
        let mut connection = runner.connect();
        let rest = connection.begin_json(&request);
        runner.signal(libc::SIGTERM);
        until("it takes no more connections", || (!runner.socket().exists()).then_some(()));
        if times == 1 {
            let answer = connection.finish(&rest);
            assert_eq!(answer.status, 200, "{}", answer.json);
        } else {
            runner.signal(libc::SIGTERM);
        }
        assert_eq!(runner.process.wait().unwrap().code(), Some(0), "told {times} times");
    }
}

#[test]
fn it_ends_by_itself_when_whoever_was_connected_has_gone() {
    let mut held = Runner::serve(&model("okay_nabu.tflite"), &["--while-connected"]);
    let mut left = Runner::serve(&model("okay_nabu.tflite"), &["--while-connected"]);
    let mut connection = held.connect();
    assert_eq!(left.connect().get("/v2/models/model").status, 200);
    let status = until("nobody is connected to it", || left.process.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(held.process.try_wait().unwrap().is_none(), "somebody is connected");
    assert_eq!(connection.get("/v2/models/model").status, 200);
}

#[test]
fn a_socket_left_behind_is_replaced_and_a_file_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("runner.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let mut command = program();
    command.args(["serve", "--model"]).arg(model("okay_nabu.tflite")).arg("--socket").arg(&socket);
    let process = command.stderr(Stdio::null()).spawn().unwrap();
    let runner = Runner { process, folder };
    assert_eq!(runner.connect().get("/v2/health/live").status, 200);

    let file = runner.folder.path().join("precious");
    fs::write(&file, "data").unwrap();
    let mut command = program();
    command.args(["serve", "--model"]).arg(model("okay_nabu.tflite")).arg("--socket").arg(&file);
    assert_eq!(command.stderr(Stdio::null()).status().unwrap().code(), Some(1));
    assert_eq!(fs::read_to_string(&file).unwrap(), "data");
}
