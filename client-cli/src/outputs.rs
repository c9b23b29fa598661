//! Outputs for people and for files: a summary of each output, and `.npy` files with the data. Owns how numbers are
//! summarised and where files go. Never talks to the mesh.

use std::{
    fs,
    io::{self, BufReader, BufWriter, Read, Write},
    path::Path,
};

use mesh_sdk::Output;
use proto_msgs::DType;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    names::{DOCUMENT, Taken, partial, safe_name, unique},
    npy,
    table::printable,
    tensor,
    tensor::Number,
    units,
};

/// Outputs up to this many elements are listed in JSON if they are not in files.
pub(crate) const DATA_ELEMENTS_MAX: u64 = 16 * 1024;

/// Outputs in files are listed in JSON as well up to this many elements.
const SAVED_ELEMENTS_MAX: u64 = 1024;

/// Outputs up to this many elements are shown completely on the terminal.
const SHOWN_ELEMENTS_MAX: u64 = 8;

/// Number of highest values shown for a vector.
const TOP: usize = 5;

/// Vectors with more elements than this are not lists of classes.
const CLASSES_MAX: u64 = 100_000;

/// The summary of one output.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) size_bytes: u64,
    /// Smallest, largest and mean value, without elements that are not finite. `None` for strings and empty outputs.
    pub(crate) spread: Option<(f64, f64, f64)>,
    /// Number of elements that are infinite or not a number.
    pub(crate) not_finite: u64,
    /// Index and value of the highest elements, if the output is a vector.
    pub(crate) top: Vec<(u64, f64)>,
    /// The elements, if there are few. JSON has no infinity: what is not finite is `null`.
    pub(crate) data: Option<Vec<Value>>,
    /// Index and name of those of the first few elements that are not finite.
    pub(crate) odd: Vec<(u64, &'static str)>,
    /// The file under `--output`.
    pub(crate) file: Option<String>,
}

/// Summarises an output. Reads it once, from memory or its file, in pieces.
pub(crate) fn summarize(output: &Output, is_saved: bool) -> io::Result<Summary> {
    let listed_max = if is_saved { SAVED_ELEMENTS_MAX } else { DATA_ELEMENTS_MAX };
    let mut summary = summarize_from(&output.name, output.dtype, &output.shape, listed_max, output.reader()?)?;
    summary.size_bytes = output.size_bytes();
    Ok(summary)
}

fn summarize_from(name: &str, dtype: DType, shape: &[u64], listed_max: u64, data: impl Read) -> io::Result<Summary> {
    let mut summary = Summary {
        name: name.to_owned(),
        dtype,
        shape: shape.to_vec(),
        size_bytes: 0,
        spread: None,
        not_finite: 0,
        top: Vec::new(),
        data: None,
        odd: Vec::new(),
        file: None,
    };
    let count = tensor::elements(shape).unwrap_or(u64::MAX);
    let is_small = count <= listed_max;
    let Some(element_bytes) = dtype.size_bytes() else {
        let mut bytes = Vec::new();
        BufReader::new(data).read_to_end(&mut bytes)?;
        let text = |string: &&[u8]| Value::from(String::from_utf8_lossy(string).into_owned());
        summary.data = tensor::strings(&bytes).filter(|_| is_small).map(|all| all.iter().map(text).collect());
        return Ok(summary);
    };
    let is_vector = (2..=CLASSES_MAX).contains(&count) && shape.contains(&count);
    let mut gathered = Gathered { keeps_top: is_vector && dtype != DType::Bool, ..Gathered::default() };
    let mut reader = BufReader::new(data);
    // A piece holds whole elements of every type.
    let mut piece = vec![0; 64 * 1024];
    loop {
        let got = read_full(&mut reader, &mut piece)?;
        for number in tensor::numbers(dtype, &piece[..got - got % element_bytes]) {
            gathered.take(number, dtype, is_small);
        }
        if got < piece.len() {
            break;
        }
    }
    summary.not_finite = gathered.not_finite;
    summary.spread =
        (gathered.finite > 0).then(|| (gathered.low, gathered.high, gathered.sum / gathered.finite as f64));
    summary.data = is_small.then_some(gathered.data);
    summary.odd = gathered.odd;
    summary.top = gathered.top;
    Ok(summary)
}

fn read_full(reader: &mut impl Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match reader.read(&mut piece[filled..])? {
            0 => break,
            got => filled += got,
        }
    }
    Ok(filled)
}

#[derive(Default)]
struct Gathered {
    seen: u64,
    finite: u64,
    not_finite: u64,
    low: f64,
    high: f64,
    sum: f64,
    keeps_top: bool,
    top: Vec<(u64, f64)>,
    data: Vec<Value>,
    odd: Vec<(u64, &'static str)>,
}

impl Gathered {
    fn take(&mut self, number: Number, dtype: DType, keeps_data: bool) {
        let value = match number {
            Number::Int(value) => value as f64,
            Number::Real(value) => value,
        };
        if keeps_data {
            self.data.push(tensor::to_json(number, dtype));
        }
        let index = self.seen;
        self.seen += 1;
        if !value.is_finite() {
            self.not_finite += 1;
            if index < SHOWN_ELEMENTS_MAX {
                self.odd.push((index, tensor::name_of_odd(value)));
            }
            return;
        }
        if self.finite == 0 {
            (self.low, self.high) = (value, value);
        }
        self.finite += 1;
        (self.low, self.high) = (self.low.min(value), self.high.max(value));
        self.sum += value;
        if self.keeps_top && self.top.last().is_none_or(|(_, lowest)| self.top.len() < TOP || value > *lowest) {
            let place = self.top.partition_point(|(_, other)| *other >= value);
            self.top.insert(place, (index, value));
            self.top.truncate(TOP);
        }
    }
}

impl Summary {
    /// The summary for `result.json` and `--json`.
    pub(crate) fn to_json(&self) -> Value {
        let spread = |pick: fn((f64, f64, f64)) -> f64| self.spread.map(pick);
        json!({
            "name": self.name,
            "dtype": self.dtype.name(),
            "shape": self.shape,
            "size_bytes": self.size_bytes,
            "min": spread(|(low, ..)| low),
            "max": spread(|(_, high, _)| high),
            "mean": spread(|(.., mean)| mean),
            "not_finite": self.not_finite,
            "data": self.data,
            "omitted": self.is_left_out().then(|| format!("more than {DATA_ELEMENTS_MAX} elements: use --output DIR")),
            "file": self.file,
        })
    }

    /// Whether the elements are neither in the document nor in a file.
    pub(crate) fn is_left_out(&self) -> bool {
        self.data.is_none() && self.file.is_none()
    }

    /// The summary in a few words, for a table of items.
    pub(crate) fn in_short(&self) -> String {
        match (&self.data, self.top.first(), self.spread) {
            (Some(data), ..) if data.len() as u64 <= SHOWN_ELEMENTS_MAX => self.elements(data),
            (_, Some((index, value)), _) => format!("#{index} {}", short(*value)),
            (.., Some((low, high, _))) => format!("{} .. {}", short(low), short(high)),
            _ => units::show_bytes(self.size_bytes),
        }
    }

    fn elements(&self, data: &[Value]) -> String {
        let shown = (0..).zip(data).map(|(index, value)| match self.odd.iter().find(|(odd, _)| *odd == index) {
            Some((_, name)) => (*name).to_owned(),
            None => shown(value, self.dtype),
        });
        shown.collect::<Vec<_>>().join(" ")
    }

    /// The summary for the terminal: one line, and the highest values of a vector below it.
    pub(crate) fn to_text(&self) -> String {
        let shape = self.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        let mut text = format!("{}  {} [{shape}]", self.name, self.dtype);
        let few = self.data.as_ref().filter(|data| data.len() as u64 <= SHOWN_ELEMENTS_MAX);
        if let Some(data) = few {
            text.push_str(&format!("  {}", self.elements(data)));
        } else if let Some((low, high, mean)) = self.spread {
            text.push_str(&format!("  min {}  max {}  mean {}", short(low), short(high), short(mean)));
        } else {
            text.push_str(&format!("  {}", units::show_bytes(self.size_bytes)));
        }
        if self.not_finite > 0 {
            text.push_str(&format!("  {} not finite", self.not_finite));
        }
        // Name and strings come from the model.
        text = printable(&text);
        text.push('\n');
        if few.is_none() && !self.top.is_empty() {
            let top = self.top.iter().map(|(index, value)| format!("#{index} {}", short(*value)));
            text.push_str(&format!("  top {}: {}\n", self.top.len(), top.collect::<Vec<_>>().join("  ")));
        }
        text
    }
}

fn shown(value: &Value, dtype: DType) -> String {
    match value.as_f64() {
        Some(number) if matches!(dtype, DType::F16 | DType::F32 | DType::F64 | DType::BF16) => short(number),
        _ => value.to_string(),
    }
}

/// Six significant digits, without trailing zeros.
fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor() as i32;
    if !(-5..15).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let text = format!("{value:.*}", usize::try_from(5 - magnitude).unwrap_or(0));
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Creates the folder and checks that it is writable and has room for the folders of these items, before a model runs
/// in vain.
///
/// # Errors
/// If one of these fails; the text names the folder.
pub(crate) fn prepare<'a>(folder: &Path, items: impl IntoIterator<Item = &'a str>) -> io::Result<()> {
    make_folder(folder)?;
    let in_the_way = |path: &Path, what: &str| {
        let text = format!("{} is in the way: it is {what}; move it, or use another --output", path.display());
        Err(io::Error::new(io::ErrorKind::AlreadyExists, text))
    };
    let document = folder.join(DOCUMENT);
    if document.is_dir() {
        return in_the_way(&document, "a folder");
    }
    for item in items.into_iter().map(|item| folder.join(item)) {
        if fs::metadata(&item).is_ok_and(|meta| !meta.is_dir()) {
            return in_the_way(&item, "no folder");
        }
    }
    write_whole(&folder.join(".mesh-client-probe"), |_| Ok(()))?;
    fs::remove_file(folder.join(".mesh-client-probe"))
}

/// Creates the folder and its missing parents. An error names the folder.
pub(crate) fn make_folder(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot make folder {}: {error}", folder.display())))
}

/// Writes each output as `FOLDER/<name>.npy` and notes the file in its summary. Files appear only when complete.
///
/// # Errors
/// If a file cannot be written.
pub(crate) fn save(folder: &Path, outputs: &[Output], summaries: &mut [Summary]) -> io::Result<()> {
    make_folder(folder)?;
    let files = file_names(outputs.iter().map(|output| output.name.as_str()));
    for ((output, summary), file) in outputs.iter().zip(summaries).zip(files) {
        write_whole(&folder.join(&file), |out| npy::write(out, output.dtype, &output.shape, output.reader()?))?;
        summary.file = Some(file);
    }
    Ok(())
}

/// The files of outputs with these names, in the same order. None of them is the folder's document. An output whose name
/// can be that of a file gets it, whatever comes before it.
fn file_names<'a>(outputs: impl Iterator<Item = &'a str>) -> Vec<String> {
    let names: Vec<&str> = outputs.collect();
    let (mut taken, mut files) = (Taken::new(), vec![String::new(); names.len()]);
    for as_it_is in [true, false] {
        for (file, name) in files.iter_mut().zip(&names) {
            let safe = safe_name(name);
            if (safe == *name) == as_it_is {
                *file = format!("{}.npy", unique(&safe, &mut taken));
            }
        }
    }
    files
}

/// The file names in an earlier `result.json`. A whole job's document has none, and nothing of it is kept in memory.
#[derive(Deserialize)]
struct Earlier {
    #[serde(default)]
    outputs: Vec<EarlierOutput>,
}

#[derive(Deserialize)]
struct EarlierOutput {
    file: Option<String>,
}

/// Removes the outputs of an earlier result except for `files`, those of the new result: otherwise they would look like
/// its own. Nothing else is removed, whatever the earlier result names.
///
/// # Errors
/// If a file cannot be removed.
pub(crate) fn remove_earlier(folder: &Path, files: &[&str]) -> io::Result<()> {
    let Ok(document) = fs::File::open(folder.join(DOCUMENT)) else { return Ok(()) };
    let Ok(earlier) = serde_json::from_reader::<_, Earlier>(BufReader::new(document)) else { return Ok(()) };
    let is_output = |file: &String| file.ends_with(".npy") && safe_name(file) == *file;
    let outputs = earlier.outputs.into_iter().filter_map(|output| output.file).filter(is_output);
    for file in outputs.filter(|file| !files.contains(&file.as_str())) {
        let path = folder.join(file);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                let text = format!("cannot remove {} of an earlier result: {error}", path.display());
                return Err(io::Error::new(error.kind(), text));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Writes a temporary file beside `path` and moves it there.
pub(crate) fn write_whole(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<fs::File>) -> io::Result<()>,
) -> io::Result<()> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()));
    let partial = path.with_file_name(partial(&path.file_name().unwrap_or_default().to_string_lossy()));
    let written = (|| {
        let mut out = BufWriter::new(fs::File::create(&partial)?);
        write(&mut out)?;
        out.flush()?;
        fs::rename(&partial, path)
    })();
    if written.is_err() {
        // There may be no file to remove.
        let _ = fs::remove_file(&partial);
    }
    written.map_err(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, dtype: DType, shape: &[u64], data: &[u8]) -> Summary {
        let size_bytes = data.len() as u64;
        Summary { size_bytes, ..summarize_from(name, dtype, shape, DATA_ELEMENTS_MAX, data).unwrap() }
    }

    fn f32s(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    #[test]
    fn a_vector_shows_its_highest_elements() {
        let mut values = vec![0.001_f32; 10];
        (values[7], values[2], values[4]) = (0.9, 0.05, 0.05);
        let summary = of("probabilities", DType::F32, &[1, 10], &f32s(&values));
        let expected = "probabilities  FP32 [1,10]  min 0.001  max 0.9  mean 0.1007\n  \
                        top 5: #7 0.9  #2 0.05  #4 0.05  #0 0.001  #1 0.001\n";
        assert_eq!(summary.to_text(), expected);
    }

    #[test]
    fn a_few_elements_are_shown_as_they_are() {
        assert_eq!(of("score", DType::U8, &[1, 1], &[249]).to_text(), "score  UINT8 [1,1]  249\n");
        assert_eq!(of("s", DType::F32, &[], &f32s(&[0.1])).to_text(), "s  FP32 []  0.1\n");
        assert_eq!(of("label", DType::Bytes, &[1], b"\x03\0\0\0cat").to_text(), "label  BYTES [1]  \"cat\"\n");
    }

    #[test]
    fn what_is_no_number_has_its_name_for_people_and_is_null_in_json() {
        let summary = of("y", DType::F32, &[4], &f32s(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5]));
        assert_eq!(summary.to_text(), "y  FP32 [4]  NaN inf -inf 0.5  3 not finite\n");
        assert_eq!(summary.in_short(), "NaN inf -inf 0.5");
        assert_eq!(summary.to_json()["data"], json!([null, null, null, 0.5]));
        assert_eq!((&summary.to_json()["not_finite"], &summary.to_json()["max"]), (&json!(3), &json!(0.5)));
    }

    #[test]
    fn a_picture_shows_its_spread_and_what_is_no_number() {
        let mut values = vec![1.0_f32; 200];
        (values[0], values[1]) = (f32::NAN, -3.0);
        let summary = of("mask", DType::F32, &[2, 100], &f32s(&values));
        assert_eq!(summary.to_text(), "mask  FP32 [2,100]  min -3  max 1  mean 0.979899  1 not finite\n");
    }

    #[test]
    fn json_keeps_few_elements_and_leaves_out_many() {
        let expected = json!({
            "name": "y", "dtype": "FP32", "shape": [2], "size_bytes": 8, "min": 0.5, "max": 2.0, "mean": 1.25,
            "not_finite": 0, "data": [0.5, 2.0], "omitted": null, "file": null,
        });
        assert_eq!(of("y", DType::F32, &[2], &f32s(&[0.5, 2.0])).to_json(), expected);
        let mut large = of("y", DType::U8, &[20_000], &[0; 20_000]);
        assert_eq!(large.to_json()["data"], Value::Null);
        assert_eq!(large.to_json()["omitted"], "more than 16384 elements: use --output DIR");
        large.file = Some("y.npy".to_owned());
        assert_eq!(large.to_json()["omitted"], Value::Null, "the file has them");
        let faces = of("boxes", DType::U8, &[1, 896, 16], &[0; 896 * 16]);
        assert_eq!(faces.to_json()["data"].as_array().unwrap().len(), 896 * 16);
        assert_eq!(of("y", DType::F32, &[0], &[]).to_json()["min"], Value::Null);
    }

    #[test]
    fn elements_are_read_across_pieces() {
        let values: Vec<f32> = (0..50_000_u16).map(f32::from).collect();
        let summary = of("y", DType::F32, &[50_000], &f32s(&values));
        assert_eq!(summary.spread, Some((0.0, 49_999.0, 24_999.5)));
        assert_eq!(summary.top[0], (49_999, 49_999.0));
    }

    #[test]
    fn the_names_and_strings_of_a_model_cannot_command_the_terminal() {
        let text = of("y\x1b[2J\n", DType::Bytes, &[1], b"\x02\0\0\0\xc2\x9b").to_text();
        assert_eq!(text, "y\u{fffd}[2J\u{fffd}  BYTES [1]  \"\u{fffd}\"\n");
    }

    #[test]
    fn a_folder_is_made_and_tried_and_a_bad_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("some/where");
        prepare(&folder, []).unwrap();
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
        fs::write(dir.path().join("file"), "").unwrap();
        let error = prepare(&dir.path().join("file/nope"), []).unwrap_err();
        assert!(error.to_string().contains("file/nope"), "{error}");
    }

    #[test]
    fn what_is_in_the_way_of_outputs_is_named_before_anything_runs() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("face")).unwrap();
        prepare(dir.path(), ["face", "new"]).unwrap();
        fs::write(dir.path().join("new"), "").unwrap();
        let error = prepare(dir.path(), ["face", "new"]).unwrap_err().to_string();
        assert!(error.contains("/new is in the way: it is no folder"), "{error}");
        fs::create_dir(dir.path().join(DOCUMENT)).unwrap();
        let error = prepare(dir.path(), []).unwrap_err().to_string();
        assert!(error.contains("/result.json is in the way: it is a folder"), "{error}");
    }

    #[test]
    fn an_output_has_its_own_name_whatever_it_is_called() {
        assert_eq!(file_names(["a/b", "a_b", "a:b"].into_iter()), ["a_b-2.npy", "a_b.npy", "a_b-3.npy"]);
        let files = file_names(["result", "result.json", "a/b:0", "y", "y"].into_iter());
        assert_eq!(files, ["result.npy", "result.json.npy", "a_b_0.npy", "y.npy", "y-2.npy"]);
    }

    #[test]
    fn a_file_that_cannot_be_written_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("y.npy");
        let error = write_whole(&path, |_| Err(io::Error::other("no more"))).unwrap_err();
        assert_eq!(error.to_string(), format!("cannot write {}: no more", path.display()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
