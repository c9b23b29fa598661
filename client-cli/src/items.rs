//! From the command line to items. Owns folders, patterns, `name=path` and the items. Never reads a file's
//! content.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use mesh_models::Signature;

use crate::names::{DOCUMENT, Taken, partial, safe_name, unique};

/// `-`, by the name that opens it.
pub(crate) const STANDARD_INPUT: &str = "/dev/stdin";

/// Most files in one submit; more belong into several.
const ITEMS_MAX: usize = 1_000_000;

/// One item: a set of the model's inputs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Item {
    /// The item's unique name, also the name of its folder under `--output`.
    pub(crate) name: String,
    /// The item's files, with the names of the model's inputs if the user gave them.
    pub(crate) files: Vec<(Option<String>, PathBuf)>,
}

/// Why the inputs on the command line are invalid.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ItemsError {
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{0}: no such file, and nothing matches it")]
    Nothing(String),
    #[error(
        "{path}: no such file, and nothing matches it; '{name}' is an input of the model: write ./{name}={path} for the file of that name"
    )]
    NothingNamed { name: String, path: String },
    #[error("{}: the folder holds no file", .0.display())]
    EmptyFolder(PathBuf),
    #[error("{0}: not a valid pattern: {1}")]
    Pattern(String, glob::PatternError),
    #[error("{path}: one input of the model ('{name}') takes one file, not a folder or a pattern")]
    NamedMany { name: String, path: String },
    #[error("'{named}' names an input and '{plain}' does not: name all of them or none")]
    Mixed { named: String, plain: String },
    #[error("the model has no input '{got}': it has {known}")]
    UnknownName { got: String, known: String },
    #[error("input '{0}' is given twice")]
    Twice(String),
    #[error("standard input (-) can be given once: write all but one of these inputs to files")]
    StandardInputTwice,
    #[error(
        "the model has {} inputs ({known}), {got} files are given: name each (name=path), or give .npz or .json files that hold all",
        known.split(", ").count()
    )]
    Count { known: String, got: usize },
    #[error("no input is given; the model takes: {0}")]
    None(String),
    #[error("{0} items are too many for one submit: the limit is {ITEMS_MAX}")]
    TooMany(usize),
}

/// The items named by these arguments, for a model with this signature (`None`: it could not be read).
pub(crate) fn items(arguments: &[String], signature: Option<&Signature>) -> Result<Vec<Item>, ItemsError> {
    let known = || names(signature);
    if arguments.is_empty() {
        return match signature {
            Some(signature) if !signature.inputs.is_empty() => Err(ItemsError::None(known())),
            _ => Ok(vec![Item { name: "item".to_owned(), files: Vec::new() }]),
        };
    }
    let split: Vec<(Option<&str>, &str)> = arguments.iter().map(|argument| split_name(argument, signature)).collect();
    if split.iter().filter(|(_, path)| matches!(*path, "-" | STANDARD_INPUT)).count() > 1 {
        return Err(ItemsError::StandardInputTwice);
    }
    let plain = split.iter().position(|(name, _)| name.is_none());
    let named = split.iter().position(|(name, _)| name.is_some());
    match (named, plain) {
        (Some(named), Some(plain)) => {
            Err(ItemsError::Mixed { named: arguments[named].clone(), plain: arguments[plain].clone() })
        }
        (Some(_), None) => named_item(&split, signature).map(|item| vec![item]),
        _ => plain_items(arguments, signature),
    }
}

fn names(signature: Option<&Signature>) -> String {
    let inputs =
        signature.map(|signature| signature.inputs.iter().map(|input| input.name.as_str()).collect::<Vec<_>>());
    inputs.unwrap_or_default().join(", ")
}

/// Splits `name=path`. The longest fitting name of an input of the model wins, whatever files there are and whatever
/// signs it contains. Any other name ends at the first `=`, unless a file with that whole name exists.
fn split_name<'a>(argument: &'a str, signature: Option<&Signature>) -> (Option<&'a str>, &'a str) {
    let names = signature.into_iter().flat_map(|signature| &signature.inputs).map(|input| input.name.as_str());
    let fitting = names.filter_map(|name| argument.strip_prefix(name)?.strip_prefix('='));
    if let Some(path) = fitting.min_by_key(|path| path.len()) {
        return (Some(&argument[..argument.len() - path.len() - 1]), path);
    }
    match argument.split_once('=') {
        Some((name, path)) if !name.is_empty() && !name.contains('/') && !Path::new(argument).exists() => {
            (Some(name), path)
        }
        _ => (None, argument),
    }
}

fn named_item(split: &[(Option<&str>, &str)], signature: Option<&Signature>) -> Result<Item, ItemsError> {
    let mut seen = BTreeSet::new();
    let mut files = Vec::new();
    for (name, path) in split.iter().filter_map(|(name, path)| Some(((*name)?, *path))) {
        if let Some(signature) = signature
            && signature.input(name).is_none()
        {
            return Err(ItemsError::UnknownName { got: name.to_owned(), known: names(Some(signature)) });
        }
        if !seen.insert(name) {
            return Err(ItemsError::Twice(name.to_owned()));
        }
        let found = expand(path).map_err(|error| match error {
            ItemsError::Nothing(path) if Path::new(&format!("{name}={path}")).exists() => {
                ItemsError::NothingNamed { name: name.to_owned(), path }
            }
            error => error,
        })?;
        let [file] = &found[..] else {
            return Err(ItemsError::NamedMany { name: name.to_owned(), path: path.to_owned() });
        };
        files.push((Some(name.to_owned()), file.clone()));
    }
    let given = files.len();
    match signature {
        Some(signature) if signature.inputs.len() != given => {
            Err(ItemsError::Count { known: names(Some(signature)), got: given })
        }
        _ => Ok(Item { name: files.first().map_or_else(String::new, |(_, path)| stem(path)), files }),
    }
}

fn plain_items(arguments: &[String], signature: Option<&Signature>) -> Result<Vec<Item>, ItemsError> {
    let mut paths = Vec::new();
    for argument in arguments {
        paths.extend(expand(argument)?);
    }
    if paths.len() > ITEMS_MAX {
        return Err(ItemsError::TooMany(paths.len()));
    }
    let inputs = signature.map_or(1, |signature| signature.inputs.len());
    // What comes through a single pipe shows by its content what it is; several pipes are one for each input.
    let is_single = paths.len() == 1;
    let is_stream = |path: &PathBuf| fs::metadata(path).is_ok_and(|meta| !meta.is_file()) || path == STANDARD_INPUT;
    let holds_all = |path: &PathBuf| matches!(extension(path).as_str(), "npz" | "json") || is_single && is_stream(path);
    if inputs != 1 && !paths.iter().all(holds_all) {
        // One file per input, in the model's order. A folder's order is not the user's choice, so it does not count.
        if paths.len() != inputs || arguments.len() != inputs {
            return Err(ItemsError::Count { known: names(signature), got: paths.len() });
        }
        let name = stem(&paths[0]);
        return Ok(vec![Item { name, files: paths.into_iter().map(|path| (None, path)).collect() }]);
    }
    // The folders of items stand beside the document of all.
    let mut taken = Taken::from([DOCUMENT.to_owned(), partial(DOCUMENT)].map(|name| (name, 2)));
    let item = |path: PathBuf| Item { name: unique(&stem(&path), &mut taken), files: vec![(None, path)] };
    Ok(paths.into_iter().map(item).collect())
}

/// The files named by an argument: the file itself, a folder's files, or a pattern's matches; sorted by name.
fn expand(argument: &str) -> Result<Vec<PathBuf>, ItemsError> {
    // Standard input, by the name that other programs use.
    let path = PathBuf::from(if argument == "-" { STANDARD_INPUT } else { argument });
    match fs::metadata(&path) {
        Ok(meta) if meta.is_dir() => files_in(&path),
        Ok(_) => Ok(vec![path]),
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ItemsError::Read { path, source }),
        Err(_) => {
            let matches = glob::glob(argument).map_err(|error| ItemsError::Pattern(argument.to_owned(), error))?;
            let matches = matches.map(|found| {
                found.map_err(|error| ItemsError::Read { path: error.path().to_owned(), source: error.into() })
            });
            let found = files_of(matches)?;
            if found.is_empty() { Err(ItemsError::Nothing(argument.to_owned())) } else { Ok(found) }
        }
    }
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>, ItemsError> {
    let failed = |source| ItemsError::Read { path: folder.to_owned(), source };
    let entries = fs::read_dir(folder).map_err(failed)?.map(|entry| entry.map(|entry| entry.path()).map_err(failed));
    let is_hidden = |path: &Path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    let mut files = files_of(entries.filter(|path| !path.as_ref().is_ok_and(|path| is_hidden(path))))?;
    files.sort();
    if files.is_empty() { Err(ItemsError::EmptyFolder(folder.to_owned())) } else { Ok(files) }
}

/// The files among these. What cannot be looked at, such as a link that leads nowhere, is an error: else an item would
/// be missing without a word.
fn files_of(paths: impl Iterator<Item = Result<PathBuf, ItemsError>>) -> Result<Vec<PathBuf>, ItemsError> {
    let mut files = Vec::new();
    for path in paths {
        let path = path?;
        match fs::metadata(&path) {
            Ok(meta) if meta.is_file() => files.push(path),
            Ok(_) => {}
            Err(source) => return Err(ItemsError::Read { path, source }),
        }
    }
    Ok(files)
}

/// The extension of a file name in lower case.
pub(crate) fn extension(path: &Path) -> String {
    path.extension().map_or_else(String::new, |extension| extension.to_string_lossy().to_lowercase())
}

fn stem(path: &Path) -> String {
    safe_name(&path.file_stem().map_or_else(|| "item".to_owned(), |stem| stem.to_string_lossy().into_owned()))
}

#[cfg(test)]
mod tests {
    use mesh_models::TensorSpec;
    use proto_msgs::ModelFormat;

    use super::*;

    fn signature(names: &[&str]) -> Signature {
        let spec = |name: &&str| TensorSpec { name: (*name).into(), dtype: None, shape: None, quantization: None };
        Signature { format: ModelFormat::Onnx, inputs: names.iter().map(spec).collect(), outputs: Vec::new() }
    }

    /// A folder with these files, and the arguments `@/…` within it.
    fn within(files: &[&str]) -> (tempfile::TempDir, impl Fn(&[&str]) -> Vec<String>) {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            fs::create_dir_all(dir.path().join(file).parent().unwrap()).unwrap();
            fs::write(dir.path().join(file), "").unwrap();
        }
        let root = dir.path().to_str().unwrap().to_owned();
        (dir, move |arguments| arguments.iter().map(|argument| argument.replace('@', &root)).collect())
    }

    fn names_of(items: &[Item]) -> Vec<&str> {
        items.iter().map(|item| item.name.as_str()).collect()
    }

    #[test]
    fn each_file_for_a_model_of_one_input_is_an_item() {
        let (_dir, at) = within(&["b.png", "a.png", "more/a.jpg", "more/.hidden"]);
        let one = signature(&["x"]);
        assert_eq!(names_of(&items(&at(&["@/b.png", "@/a.png"]), Some(&one)).unwrap()), ["b", "a"]);
        assert_eq!(names_of(&items(&at(&["@/*.png", "@/more"]), Some(&one)).unwrap()), ["a", "b", "a-2"]);
        assert_eq!(names_of(&items(&at(&["@/a.png"]), None).unwrap()), ["a"]);
    }

    #[test]
    fn a_link_that_leads_nowhere_is_no_item_that_is_left_out_in_silence() {
        let (dir, at) = within(&["a.bin"]);
        std::os::unix::fs::symlink("gone.bin", dir.path().join("b.bin")).unwrap();
        for argument in ["@", "@/*.bin"] {
            let error = items(&at(&[argument]), Some(&signature(&["x"]))).unwrap_err().to_string();
            assert!(error.contains("b.bin") && error.contains("No such file"), "{argument}: {error}");
        }
        fs::write(dir.path().join("gone.bin"), "").unwrap();
        assert_eq!(names_of(&items(&at(&["@/*.bin"]), Some(&signature(&["x"]))).unwrap()), ["a", "b", "gone"]);
    }

    #[test]
    fn no_item_takes_the_place_of_the_document_of_all() {
        let (_dir, at) = within(&["result.json.bin", "result.json.part.bin", "result.bin"]);
        let named = items(&at(&["@"]), Some(&signature(&["x"]))).unwrap();
        assert_eq!(names_of(&named), ["result", "result.json-2", "result.json.part-2"]);
    }

    #[test]
    fn files_for_a_model_of_several_inputs_are_one_item() {
        let (_dir, at) = within(&["1.bin", "2.bin", "all.npz", "other.npz", "odd=name.bin"]);
        let two = signature(&["x", "y"]);
        let by_place = items(&at(&["@/2.bin", "@/1.bin"]), Some(&two)).unwrap();
        assert_eq!((by_place.len(), by_place[0].files.len()), (1, 2));
        let by_name = items(&at(&["y=@/2.bin", "x=@/1.bin"]), Some(&two)).unwrap();
        assert_eq!(by_name[0].files[0].0.as_deref(), Some("y"));
        assert_eq!(names_of(&items(&at(&["@/all.npz", "@/other.npz"]), Some(&two)).unwrap()), ["all", "other"]);
        // /dev/null stands for a pipe: neither is a file.
        let of_pipes = |pipes: &[&str]| items(&at(pipes), Some(&two)).unwrap();
        assert_eq!(of_pipes(&["/dev/null", "/dev/null"])[0].files.len(), 2, "one pipe for each input");
        assert_eq!(of_pipes(&["/dev/null"])[0].files.len(), 1, "a single one may hold all");
        let odd = items(&at(&["@/odd=name.bin"]), Some(&signature(&["x"]))).unwrap();
        assert_eq!(odd[0].files[0].0, None, "a file may have the sign in its name");
    }

    #[test]
    fn the_name_of_an_input_of_the_model_may_have_any_signs_and_wins() {
        let (dir, at) = within(&["1.bin", "2.bin", "a=b.bin"]);
        let named = |arguments: &[&str], inputs: &[&str]| {
            let item = items(&at(arguments), Some(&signature(inputs))).map(|mut items| items.remove(0));
            item.map(|item| item.files.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
        };
        let some = |name: &str| Some(name.to_owned());
        assert_eq!(named(&["a=b=@/1.bin"], &["a=b"]).unwrap(), [some("a=b")]);
        assert_eq!(named(&["a=@/1.bin", "a=b=@/2.bin"], &["a", "a=b"]).unwrap(), [some("a"), some("a=b")]);
        assert_eq!(named(&["in/x:0=@/1.bin"], &["in/x:0"]).unwrap(), [some("in/x:0")]);
        // A file whose name begins like an input, as seen from its folder.
        let whole = at(&["@/a=b.bin"]).remove(0);
        let input = whole.strip_suffix("=b.bin").unwrap();
        let error = named(&["@/a=b.bin"], &[input]).unwrap_err().to_string();
        assert!(
            error.starts_with("b.bin: no such file") && error.contains(&format!("write ./{input}=b.bin")),
            "{error}"
        );
        assert_eq!(named(&["@/a=b.bin"], &["a"]).unwrap(), [None], "a path is no name");
        drop(dir);
    }

    #[test]
    fn what_cannot_be_understood_is_said_before_anything_is_sent() {
        let (_dir, at) = within(&["1.bin", "2.bin", "3.bin", "folder/x.bin"]);
        let two = signature(&["x", "y"]);
        let error = |arguments: &[&str]| items(&at(arguments), Some(&two)).unwrap_err().to_string();
        assert!(error(&["@/1.bin"]).starts_with("the model has 2 inputs (x, y), 1 files are given"));
        assert!(error(&["x=@/1.bin"]).starts_with("the model has 2 inputs (x, y), 1 files are given"));
        assert!(error(&["x=@/1.bin", "@/2.bin"]).contains("name all of them or none"));
        assert_eq!(error(&["x=@/1.bin", "z=@/2.bin"]), "the model has no input 'z': it has x, y");
        assert_eq!(error(&["x=@/1.bin", "x=@/2.bin"]), "input 'x' is given twice");
        assert!(error(&["x=-", "y=-"]).starts_with("standard input (-) can be given once"));
        assert!(error(&["x=@/*.bin", "y=@/1.bin"]).contains("takes one file"));
        assert!(error(&["@/none.bin", "@/1.bin"]).ends_with("none.bin: no such file, and nothing matches it"));
        assert_eq!(error(&[]), "no input is given; the model takes: x, y");
        let empty = tempfile::tempdir().unwrap();
        let folder = empty.path().to_str().unwrap().to_owned();
        assert!(items(&[folder], None).unwrap_err().to_string().ends_with("the folder holds no file"));
    }
}
