//! From an item's files to the inputs of a task. Owns the form of a file, and the check against the model's signature
//! before anything is sent. Never: the worker's own check, which decides.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use mesh_models::{Signature, TensorSpec};
use mesh_sdk::Input;
use proto_msgs::{DType, limits};

use crate::{
    image_input::{self, ImageError},
    items::{Item, STANDARD_INPUT, extension},
    json_input::{self, JsonError},
    npy::{self, NpyError},
    tensor::{self, Tensor},
};

/// Largest file of a picture: it is decoded in memory.
const PICTURE_BYTES_MAX: u64 = 256 * 1024 * 1024;

/// How inputs are converted to the model's form.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) image: image_input::Wishes,
    /// Whether numbers of another type are converted or, since that may change their meaning, refused.
    pub(crate) cast: bool,
}

/// Why a file cannot be used as an input.
#[derive(Debug, thiserror::Error)]
#[error("{} {problem}", path.display())]
pub(crate) struct InputError {
    path: PathBuf,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Npy(#[from] NpyError),
    #[error(transparent)]
    Json(#[from] JsonError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("is a picture, but the model's inputs cannot be read from its file: give a .npy, .json or raw file")]
    PictureForUnknown,
    #[error("is larger than {PICTURE_BYTES_MAX} bytes, too large for a picture")]
    PictureTooLarge,
    #[error("has more than {0} bytes, the most that a task may have: give it in parts")]
    PipeTooLong(u64),
    #[error("has {got} bytes, but input '{name}' of the model ({spec}) takes {wanted}")]
    Size { got: u64, wanted: String, name: String, spec: String },
    #[error("is {got}, but input '{name}' of the model is {spec}: convert it, or let --cast do so")]
    Type { got: DType, name: String, spec: String },
    #[error("has shape {got:?}, but input '{name}' of the model is {spec}")]
    Shape { got: Vec<u64>, name: String, spec: String },
    #[error("holds '{got}', but the model has {known}")]
    UnknownName { got: String, known: String },
    #[error("holds {got} tensors, but the model has {wanted} inputs ({known})")]
    Count { got: usize, wanted: usize, known: String },
    #[error(
        "is one input, but the model has {wanted} ({known}): pipe JSON or .npz that holds all, or give a file for each (name=path)"
    )]
    OneForSeveral { wanted: usize, known: String },
    #[error("holds '{got}', but it is given in the place of input '{name}': name each file (name=path)")]
    OtherName { got: String, name: String },
    #[error("holds {0} tensors: one file for one input must hold one")]
    SeveralForOne(usize),
}

/// The inputs of an item. Reads its files, so it blocks.
pub(crate) fn load(item: &Item, signature: Option<&Signature>, wishes: &Wishes) -> Result<Vec<Input>, InputError> {
    let mut inputs = Vec::new();
    for (place, (name, path)) in item.files.iter().enumerate() {
        let spec = match (signature, name) {
            (Some(signature), Some(name)) => signature.input(name),
            (Some(signature), None) => signature.inputs.get(place),
            (None, _) => None,
        };
        let source = Source { path, name: name.as_deref(), spec, is_alone: item.files.len() == 1 };
        let loaded = source.load(signature, wishes);
        inputs.extend(loaded.map_err(|problem| InputError { path: path.clone(), problem })?);
    }
    Ok(inputs)
}

/// One file and its purpose.
struct Source<'a> {
    path: &'a Path,
    name: Option<&'a str>,
    /// The model's input that the file is for, by name or position.
    spec: Option<&'a TensorSpec>,
    /// Whether the item has no other file, so that this one may hold every input.
    is_alone: bool,
}

impl Source<'_> {
    fn load(&self, signature: Option<&Signature>, wishes: &Wishes) -> Result<Vec<Input>, Problem> {
        let json = |text: &[u8]| json_input::read(text, |name, place| self.wanted(signature, name, place));
        let piped = if self.is_stream()? { Some(self.read_stream()?) } else { None };
        let is_document = piped.as_ref().map_or_else(|| extension(self.path) == "json", |bytes| is_json(bytes));
        let of_archive = |tensors: Vec<(String, Tensor)>| -> Vec<(Option<String>, Tensor)> {
            tensors.into_iter().map(|(name, tensor)| (Some(name), tensor)).collect()
        };
        let tensors = match (extension(self.path).as_str(), piped) {
            (_, Some(bytes)) if bytes.starts_with(npy::MAGIC) => vec![(None, npy::read_from(&bytes[..])?)],
            (_, Some(bytes)) if bytes.starts_with(npy::ARCHIVE_MAGIC) => {
                of_archive(npy::read_npz_from(io::Cursor::new(bytes))?)
            }
            (_, Some(bytes)) if is_json(&bytes) => json(&bytes)?,
            (_, Some(bytes)) => {
                self.is_enough(signature)?;
                return Ok(vec![self.raw(bytes.len() as u64, Input::raw(bytes))?]);
            }
            ("npy", None) => vec![(None, npy::read(self.path)?)],
            (_, None) if self.is_npy_by_another_name()? => vec![(None, npy::read(self.path)?)],
            ("npz", None) => of_archive(npy::read_npz(self.path)?),
            ("json", None) => json(&fs::read(self.path)?)?,
            ("png" | "jpg" | "jpeg", None) => vec![(None, self.picture(signature, wishes)?)],
            // A regular file is read only when it is sent.
            (_, None) => return Ok(vec![self.raw(fs::metadata(self.path)?.len(), Input::file(self.path))?]),
        };
        match &tensors[..] {
            // The keys of a document for all inputs are written by hand; other files get theirs by the way.
            [(Some(key), _)] if is_document && self.is_alone && self.name.is_none() && is_unknown(key, signature) => {
                all(&tensors, signature, wishes.cast)
            }
            [(Some(key), _)] if is_document && self.is_for_another(key, signature) => {
                let name = self.spec.map_or_else(String::new, |spec| spec.name.clone());
                Err(Problem::OtherName { got: key.clone(), name })
            }
            // A single tensor is for the intended input, whatever name it has in the file.
            [(_, tensor)] if self.name.is_some() || !self.is_alone || is_for_one(signature) => {
                Ok(vec![named(fit(tensor, self.spec, wishes.cast)?, self.name)])
            }
            _ if self.name.is_some() || !self.is_alone => Err(Problem::SeveralForOne(tensors.len())),
            _ => all(&tensors, signature, wishes.cast),
        }
    }

    /// Whether a document in the place of one input has the name of another.
    fn is_for_another(&self, key: &str, signature: Option<&Signature>) -> bool {
        let is_by_place = self.name.is_none() && !self.is_alone;
        is_by_place && !is_unknown(key, signature) && self.spec.is_some_and(|spec| spec.name != key)
    }

    /// Whether one input is all that the model takes, or the other files are for the others.
    fn is_enough(&self, signature: Option<&Signature>) -> Result<(), Problem> {
        match signature {
            Some(signature) if self.is_alone && self.name.is_none() && signature.inputs.len() > 1 => {
                Err(Problem::OneForSeveral { wanted: signature.inputs.len(), known: known(signature) })
            }
            _ => Ok(()),
        }
    }

    fn wanted(&self, signature: Option<&Signature>, name: Option<&str>, place: usize) -> Option<DType> {
        let by_name = name.filter(|_| self.name.is_none()).and_then(|name| signature?.input(name));
        let by_place = || if self.is_alone { signature?.inputs.get(place) } else { self.spec };
        by_name.or(self.spec.filter(|_| place == 0)).or_else(by_place)?.dtype
    }

    fn picture(&self, signature: Option<&Signature>, wishes: &Wishes) -> Result<Tensor, Problem> {
        let (Some(signature), Some(spec)) = (signature, self.spec) else { return Err(Problem::PictureForUnknown) };
        if fs::metadata(self.path)?.len() > PICTURE_BYTES_MAX {
            return Err(Problem::PictureTooLarge);
        }
        Ok(image_input::read(&fs::read(self.path)?, spec, signature.format, &wishes.image)?)
    }

    /// Whether it is standard input, also if a file was redirected into it, or another pipe.
    fn is_stream(&self) -> io::Result<bool> {
        Ok(self.path == Path::new(STANDARD_INPUT) || !fs::metadata(self.path)?.is_file())
    }

    /// The bytes of a stream, which can be read only once and has no telling name.
    fn read_stream(&self) -> Result<Vec<u8>, Problem> {
        if self.path == Path::new(STANDARD_INPUT) {
            return read_at_most(limits::INPUT_BYTES_MAX, io::stdin().lock());
        }
        read_at_most(limits::INPUT_BYTES_MAX, fs::File::open(self.path)?)
    }

    /// Whether the file begins as `.npy` files do, and its name does not say what it is.
    fn is_npy_by_another_name(&self) -> io::Result<bool> {
        let is_known = matches!(extension(self.path).as_str(), "npz" | "json" | "png" | "jpg" | "jpeg");
        let mut beginning = Vec::new();
        if !is_known {
            fs::File::open(self.path)?.take(npy::MAGIC.len() as u64).read_to_end(&mut beginning)?;
        }
        Ok(beginning == npy::MAGIC)
    }

    /// The unchanged bytes, if there are as many as the model takes.
    fn raw(&self, got: u64, input: Input) -> Result<Input, Problem> {
        let input = named(input, self.name);
        let Some(spec) = self.spec else { return Ok(input) };
        let Some(unit_bytes) = bytes_of_fixed(spec) else { return Ok(input) };
        let is_open = spec.shape.iter().flatten().any(|dimension| *dimension < 0);
        let fits =
            if is_open { got > 0 && unit_bytes > 0 && got.is_multiple_of(unit_bytes) } else { got == unit_bytes };
        if fits {
            return Ok(match (spec.dtype, shape_by_size(spec, got / unit_bytes.max(1))) {
                (Some(dtype), Some(shape)) => input.shaped(dtype, shape),
                _ => input,
            });
        }
        let wanted = if is_open { format!("a multiple of {unit_bytes}") } else { unit_bytes.to_string() };
        Err(Problem::Size { got, wanted, name: spec.name.clone(), spec: spec.to_string() })
    }
}

fn read_at_most(bytes_max: u64, pipe: impl Read) -> Result<Vec<u8>, Problem> {
    let mut bytes = Vec::new();
    // One byte more tells whether there is more.
    pipe.take(bytes_max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max { Err(Problem::PipeTooLong(bytes_max)) } else { Ok(bytes) }
}

/// Whether text from a pipe is JSON: a list or an object. Binary data that begins like one is rarely text.
fn is_json(bytes: &[u8]) -> bool {
    matches!(bytes.trim_ascii_start().first(), Some(b'[' | b'{')) && std::str::from_utf8(bytes).is_ok()
}

fn is_unknown(name: &str, signature: Option<&Signature>) -> bool {
    signature.is_some_and(|signature| signature.input(name).is_none())
}

/// The names of the model's inputs.
fn known(signature: &Signature) -> String {
    signature.inputs.iter().map(|input| input.name.as_str()).collect::<Vec<_>>().join(", ")
}

fn is_for_one(signature: Option<&Signature>) -> bool {
    signature.is_none_or(|signature| signature.inputs.len() == 1)
}

fn named(input: Input, name: Option<&str>) -> Input {
    match name {
        Some(name) => input.named(name),
        None => input,
    }
}

/// Length in bytes of a tensor with every open dimension 1; `None` if it is unknown.
fn bytes_of_fixed(spec: &TensorSpec) -> Option<u64> {
    let element_bytes = spec.dtype?.size_bytes()? as u64;
    let fixed = spec.shape.as_ref()?.iter().filter_map(|dimension| u64::try_from(*dimension).ok());
    Some(fixed.fold(element_bytes, u64::saturating_mul))
}

/// The model's shape if at most one dimension is open, which is then `open`, known from the file's length.
fn shape_by_size(spec: &TensorSpec, open: u64) -> Option<Vec<u64>> {
    let shape = spec.shape.as_ref()?;
    let is_one_open = shape.iter().filter(|dimension| **dimension < 0).count() <= 1;
    is_one_open.then(|| shape.iter().map(|dimension| u64::try_from(*dimension).unwrap_or(open)).collect())
}

/// Every input of the model, from a file that holds them by name or in order.
fn all(tensors: &[(Option<String>, Tensor)], signature: Option<&Signature>, cast: bool) -> Result<Vec<Input>, Problem> {
    let Some(signature) = signature else {
        let unchecked =
            |(name, tensor): &(Option<String>, Tensor)| Ok(named(fit(tensor, None, false)?, name.as_deref()));
        return tensors.iter().map(unchecked).collect();
    };
    let known = || known(signature);
    if tensors.len() != signature.inputs.len() {
        return Err(Problem::Count { got: tensors.len(), wanted: signature.inputs.len(), known: known() });
    }
    let fitted = tensors.iter().zip(&signature.inputs).map(|((name, tensor), by_place)| {
        let spec = match name {
            // `numpy.savez(file, a, b)` names them arr_0, arr_1, by their order.
            Some(name) if !is_numbered(name) => {
                signature.input(name).ok_or_else(|| Problem::UnknownName { got: name.clone(), known: known() })?
            }
            _ => by_place,
        };
        Ok(fit(tensor, Some(spec), cast)?.named(spec.name.clone()))
    });
    fitted.collect()
}

fn is_numbered(name: &str) -> bool {
    name.strip_prefix("arr_").is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// The tensor in the model's type and rank, or why that is impossible.
fn fit(tensor: &Tensor, spec: Option<&TensorSpec>, cast: bool) -> Result<Input, Problem> {
    let Some(spec) = spec else {
        return Ok(Input::tensor(tensor.dtype, tensor.shape.clone(), tensor.data.clone()));
    };
    let wanted = spec.dtype.unwrap_or(tensor.dtype);
    let is_text = |dtype| dtype == DType::Bytes;
    let data = if tensor.dtype == wanted {
        tensor.data.clone()
    } else if cast && !is_text(tensor.dtype) && !is_text(wanted) {
        let mut data = Vec::new();
        tensor::numbers(tensor.dtype, &tensor.data).for_each(|number| number.push_nearest(wanted, &mut data));
        data.into()
    } else {
        return Err(Problem::Type { got: tensor.dtype, name: spec.name.clone(), spec: spec.to_string() });
    };
    let wrong_shape = || Problem::Shape { got: tensor.shape.clone(), name: spec.name.clone(), spec: spec.to_string() };
    let shape = match &spec.shape {
        Some(dimensions) => fitted_shape(&tensor.shape, dimensions).ok_or_else(wrong_shape)?,
        None => tensor.shape.clone(),
    };
    Ok(Input::tensor(wanted, shape, data))
}

/// The shape with leading ones up to the model's rank, if it then fits the model's shape.
fn fitted_shape(got: &[u64], wanted: &[i64]) -> Option<Vec<u64>> {
    let missing = wanted.len().checked_sub(got.len()).filter(|_| wanted.len() <= limits::RANK_MAX)?;
    let shape: Vec<u64> = std::iter::repeat_n(1, missing).chain(got.iter().copied()).collect();
    let fits =
        shape.iter().zip(wanted).all(|(got, wanted)| u64::try_from(*wanted).map_or(true, |wanted| wanted == *got));
    fits.then_some(shape)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use mesh_models::Signature;
    use proto_msgs::ModelFormat;

    use super::*;

    fn signature(inputs: &[(&str, DType, &[i64])]) -> Signature {
        let spec = |(name, dtype, shape): &(&str, DType, &[i64])| TensorSpec {
            name: (*name).into(),
            dtype: Some(*dtype),
            shape: Some(shape.to_vec()),
            quantization: None,
        };
        Signature { format: ModelFormat::Onnx, inputs: inputs.iter().map(spec).collect(), outputs: Vec::new() }
    }

    /// The inputs loaded from one file of this name and content.
    fn load_one(file: &str, content: &[u8], signature: &Signature, cast: bool) -> Result<Vec<String>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file);
        fs::write(&path, content).unwrap();
        let item = Item { name: "item".into(), files: vec![(None, path)] };
        let wishes = Wishes { cast, ..Wishes::default() };
        let loaded = load(&item, Some(signature), &wishes);
        let folder = format!("{}/", dir.path().display());
        loaded
            .map(|inputs| inputs.iter().map(Input::to_string).collect())
            .map_err(|e| e.to_string().replace(&folder, ""))
    }

    fn npy(dtype: DType, shape: &[u64]) -> Vec<u8> {
        let bytes = tensor::elements(shape).unwrap() as usize * dtype.size_bytes().unwrap();
        let mut file = Vec::new();
        npy::write(&mut file, dtype, shape, vec![0; bytes].as_slice()).unwrap();
        file
    }

    fn npz(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut archive = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        for (name, file) in members {
            archive.start_file(format!("{name}.npy"), zip::write::SimpleFileOptions::default()).unwrap();
            archive.write_all(file).unwrap();
        }
        archive.finish().unwrap().into_inner()
    }

    #[test]
    fn raw_bytes_must_have_the_models_size() {
        let fixed = signature(&[("x", DType::F32, &[1, 3])]);
        assert_eq!(load_one("x.bin", &[0; 12], &fixed, false).unwrap(), ["FP32 [1, 3]"]);
        let error = load_one("x.bin", &[0; 11], &fixed, false).unwrap_err();
        assert_eq!(error, "x.bin has 11 bytes, but input 'x' of the model (FP32 [1,3]) takes 12");
        let open = signature(&[("x", DType::F32, &[-1, 3])]);
        assert_eq!(load_one("x.bin", &[0; 24], &open, false).unwrap(), ["FP32 [2, 3]"]);
        let error = load_one("x.bin", &[0; 20], &open, false).unwrap_err();
        assert_eq!(error, "x.bin has 20 bytes, but input 'x' of the model (FP32 [?,3]) takes a multiple of 12");
    }

    #[test]
    fn what_comes_through_a_pipe_is_known_by_its_beginning() {
        let model = signature(&[("x", DType::F32, &[-1, 3])]);
        let piped = |content: &[u8]| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("pipe");
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let item = Item { name: "item".into(), files: vec![(None, path.clone())] };
            std::thread::scope(|scope| {
                scope.spawn(|| fs::write(&path, content).unwrap());
                let loaded = load(&item, Some(&model), &Wishes::default());
                loaded.map(|inputs| inputs[0].to_string()).map_err(|error| error.problem.to_string())
            })
        };
        assert_eq!(piped(&npy(DType::F32, &[2, 3])).unwrap(), "FP32 [2, 3]");
        assert_eq!(piped(b" [[1, 2, 3]]\n").unwrap(), "FP32 [1, 3]");
        assert_eq!(piped(&[0; 36]).unwrap(), "FP32 [3, 3]");
        assert_eq!(piped(&npz(&[("x", npy(DType::F32, &[2, 3]))])).unwrap(), "FP32 [2, 3]");
        assert!(piped(b"[[1, 2]").unwrap_err().starts_with("is not valid JSON"));
        assert_eq!(piped(br#"{"z": [[1, 2, 3]]}"#).unwrap_err(), "holds 'z', but the model has x");
    }

    #[test]
    fn what_is_too_long_for_a_task_is_refused_and_not_cut() {
        assert_eq!(read_at_most(3, &b"abc"[..]).unwrap(), b"abc");
        let error = read_at_most(3, &b"abcd"[..]).unwrap_err().to_string();
        assert!(error.starts_with("has more than 3 bytes"), "{error}");
    }

    #[test]
    fn an_array_of_another_type_is_refused_or_cast() {
        let model = signature(&[("x", DType::F32, &[1, 3])]);
        let file = npy(DType::F64, &[1, 3]);
        let error = load_one("x.npy", &file, &model, false).unwrap_err();
        assert_eq!(error, "x.npy is FP64, but input 'x' of the model is FP32 [1,3]: convert it, or let --cast do so");
        assert_eq!(load_one("x.npy", &file, &model, true).unwrap(), ["FP32 [1, 3]"]);
    }

    #[test]
    fn a_missing_batch_dimension_is_added() {
        let model = signature(&[("x", DType::F32, &[-1, 2, 3])]);
        assert_eq!(load_one("x.npy", &npy(DType::F32, &[2, 3]), &model, false).unwrap(), ["FP32 [1, 2, 3]"]);
        assert_eq!(load_one("x.npy", &npy(DType::F32, &[5, 2, 3]), &model, false).unwrap(), ["FP32 [5, 2, 3]"]);
        let error = load_one("x.npy", &npy(DType::F32, &[3, 2]), &model, false).unwrap_err();
        assert_eq!(error, "x.npy has shape [3, 2], but input 'x' of the model is FP32 [?,2,3]");
    }

    #[test]
    fn one_file_may_hold_every_input() {
        let model = signature(&[("x", DType::F32, &[1]), ("y", DType::I64, &[2])]);
        let loaded = load_one("all.json", br#"{"y": [1, 2], "x": [0.5]}"#, &model, false).unwrap();
        assert_eq!(loaded, ["x: FP32 [1]", "y: INT64 [2]"]);
        let error = load_one("all.json", br#"{"z": [1, 2], "x": [0.5]}"#, &model, false).unwrap_err();
        assert_eq!(error, "all.json holds 'z', but the model has x, y");
        let error = load_one("all.json", br#"{"x": [0.5]}"#, &model, false).unwrap_err();
        assert_eq!(error, "all.json holds 1 tensors, but the model has 2 inputs (x, y)");
    }

    #[test]
    fn a_document_for_one_input_does_not_take_the_place_of_another() {
        let model = signature(&[("x", DType::F32, &[1]), ("y", DType::F32, &[1])]);
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first.json"), dir.path().join("second.npy"));
        fs::write(&second, npy(DType::F32, &[1])).unwrap();
        let given = |text: &str| {
            fs::write(&first, text).unwrap();
            let item = Item { name: "item".into(), files: vec![(None, first.clone()), (None, second.clone())] };
            load(&item, Some(&model), &Wishes::default()).map(|inputs| inputs.len()).map_err(|e| e.to_string())
        };
        assert_eq!(given(r#"{"x": [1]}"#), Ok(2));
        assert_eq!(given(r#"{"data": [1]}"#), Ok(2), "whatever else it is called");
        let error = given(r#"{"y": [1]}"#).unwrap_err();
        assert!(error.ends_with("holds 'y', but it is given in the place of input 'x': name each file (name=path)"));
    }

    #[test]
    fn an_archive_without_names_goes_by_order() {
        let model = signature(&[("x", DType::F32, &[1]), ("y", DType::I64, &[2])]);
        let file = npz(&[("arr_0", npy(DType::F32, &[1])), ("arr_1", npy(DType::I64, &[2]))]);
        assert_eq!(load_one("all.npz", &file, &model, false).unwrap(), ["x: FP32 [1]", "y: INT64 [2]"]);
    }

    #[test]
    fn a_file_that_is_not_what_it_is_called_is_named() {
        let model = signature(&[("x", DType::U8, &[1, 1, 3])]);
        assert_eq!(load_one("x.npy", b"hello, world", &model, false).unwrap_err(), "x.npy is not a .npy file");
        assert!(load_one("x.png", b"hello", &model, false).unwrap_err().starts_with("x.png is not a readable picture"));
        assert!(load_one("x.npz", b"hello", &model, false).unwrap_err().starts_with("x.npz is not a .npz archive"));
    }
}
