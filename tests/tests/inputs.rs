//! The forms of inputs: pictures in both layouts, archives of arrays, JSON. Each gives the same answer.

use std::{
    fs::{self, File},
    path::Path,
};

use mesh_tests::{
    Job, Mesh,
    cache::{cached, model},
    npy::Array,
    onnx,
};

/// A picture of 5 by 2 pixels: red is 20 + 10 x + 5 y, green 100 + 10 x + 7 y, blue 200 - 11 x + 9 y.
const PICTURE: &[u8] = b"\x89PNG\x0d\x0a\x1a\x0a\x00\x00\x00\x0dIHDR\x00\x00\x00\x05\x00\x00\x00\x02\x08\x02\x00\x00\x00\x1f\x08\x81\x0a\x00\x00\x00)\
    IDATx\xdac\x10I9!\x97\xb7W\xa3b\x93Q\xd3r\x9b\x9e9\x0c\x92\xd9\x17\x95K\x8f\xe9\xd6\xef6\xef\xdc\xe08y)\x00\xcf\x14\x0d\x9ekS\xfc/\x00\x00\x00\x00IEND\xaeB`\x82";

/// Output `y` of a submit with these inputs and flags.
fn answer(mesh: &Mesh, model: &str, more: &[&str]) -> Array {
    let folder = tempfile::tempdir_in(mesh.folder()).expect("the folder is ours").keep();
    let output = folder.display().to_string();
    mesh.client(&[&["submit", "--output", &output, model][..], more].concat()).succeeded();
    Array::read(&folder.join("y.npy"))
}

#[test]
fn a_picture_is_cut_turned_around_and_counted_as_its_flags_say() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    // 2 by 3 pixels (NCHW) or 3 by 2 (NHWC), each with 3 channels: the file does not say.
    let model = mesh.file("shifted.onnx", &onnx::add_one_to(&[1, 3, 2, 3]));
    let picture = mesh.file("picture.png", PICTURE);
    mesh.client(&["submit", &model, &picture]).failed_with(3, "say --layout nhwc or nchw");

    let flags = ["--layout", "nchw", "--resize", "crop", "--colors", "bgr", "--normalize", "raw"];
    let scale = ["--mean", "10,20,30", "--std", "2,4,5"];
    let cut = answer(&mesh, &model, &[&[picture.as_str()][..], &flags, &scale].concat());

    // The picture's middle, blue first.
    let plane = |pixel: fn(f64, f64) -> f64, mean: f64, deviation: f64| {
        let middle = [(1.0, 0.0), (2.0, 0.0), (3.0, 0.0), (1.0, 1.0), (2.0, 1.0), (3.0, 1.0)];
        middle.map(|(x, y)| (pixel(x, y) - mean) / deviation + 1.0)
    };
    let blue = plane(|x, y| 200.0 - 11.0 * x + 9.0 * y, 10.0, 2.0);
    let green = plane(|x, y| 100.0 + 10.0 * x + 7.0 * y, 20.0, 4.0);
    let red = plane(|x, y| 20.0 + 10.0 * x + 5.0 * y, 30.0, 5.0);
    let expected = [blue, green, red].concat();
    let got = cut.numbers();
    let differs = got.iter().zip(&expected).any(|(got, expected)| (got - expected).abs() > 1e-4);
    assert!(cut.shape == [1, 3, 2, 3] && !differs, "{:?} {got:?} for {expected:?}", cut.shape);
}

#[test]
fn an_array_is_known_by_its_beginning_where_its_name_tells_nothing() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let job = Job::small(&mesh);
    let renamed = mesh.file("four.dat", &fs::read(&job.input).expect("just written"));
    for input in ["-", "x=-", &renamed] {
        let folder = tempfile::tempdir_in(mesh.folder()).expect("the folder is ours");
        let mut command = mesh.client_command(&["submit", &job.model, input, "--output"]);
        // A file redirected into standard input is a regular file, not a pipe.
        command.arg(folder.path()).stdin(File::open(&job.input).expect("just written"));
        let done = command.output().expect("the program is there");
        assert!(done.status.success(), "{input}: {}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(Array::read(&folder.path().join("y.npy")).numbers(), job.expected, "{input}");
    }
}

#[test]
fn a_photograph_as_jpeg_shows_the_same_face() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = model("face_detection_short_range.tflite").display().to_string();
    let photograph = cached("reference/astronaut.jpg");
    assert!(fs::read(&photograph).unwrap().starts_with(b"\xff\xd8\xff"), "a JPEG file");
    let output = mesh.folder().join("out");
    let (picture, folder) = (photograph.display().to_string(), output.display().to_string());
    mesh.client(&["submit", &model, &picture, "--normalize=-1..1", "--output", &folder]).succeeded();

    let files = fs::read_dir(&output).unwrap().flatten().map(|entry| entry.path());
    let arrays = files.filter(|file| file.extension().is_some_and(|kind| kind == "npy")).map(|file| Array::read(&file));
    let scores = arrays.into_iter().find(|array| array.shape.ends_with(&[896, 1])).expect("896 scores");
    let logit = scores.f32s().into_iter().fold(f32::MIN, f32::max);
    assert!(1.0 / (1.0 + (-logit).exp()) > 0.9, "{logit}");
}

#[test]
fn all_inputs_of_a_model_may_stand_in_one_archive_or_one_document() {
    let mesh = Mesh::start();
    let _worker = mesh.worker("w1");
    let model = model("silero_vad.onnx").display().to_string();
    let case = cached("reference/speech/all.npz").parent().expect("it has one").to_owned();
    let read = |folder: &Path, name: &str| Array::read(&folder.join(format!("{name}.npy")));
    for form in ["all.npz", "all.json"] {
        let output = mesh.folder().join(form);
        let (input, folder) = (case.join(form).display().to_string(), output.display().to_string());
        mesh.client(&["submit", &model, &input, "--output", &folder]).succeeded();
        for name in ["output", "stateN"] {
            let (got, expected) = (read(&output, name), read(&case.join("expected"), name));
            assert_eq!((&got.shape, &got.dtype), (&expected.shape, &expected.dtype), "{form} {name}");
            let pairs = got.numbers().into_iter().zip(expected.numbers());
            let error = pairs.fold(0.0_f64, |error, (got, expected)| error.max((got - expected).abs()));
            assert!(error < 1e-4, "{form} {name} differs from the reference by {error}");
        }
    }
}
