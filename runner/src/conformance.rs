//! `mesh-runner conformance`: the ONNX project's own tests of single operators, run through the serving engine. Owns
//! the count of passed tests, and that a crash costs only one test: tests run in child processes, one batch per child.

use std::{
    collections::VecDeque,
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use proto_msgs::ModelFormat;

use crate::{
    cli::Conformance,
    engine::{LoadOptions, Model},
    exit,
};

mod compare;
mod tensor_proto;

/// Tests per child: few enough that all processors stay busy, enough that starting a child costs nothing.
const BATCH: usize = 50;

/// A test's name and, if it failed, the reason.
type Verdict = (String, Option<String>);

/// Runs all tests of a folder and prints the failed ones; fails if fewer pass than the floor.
pub(crate) fn conformance(arguments: &Conformance) -> Result<u8> {
    if arguments.names_on_stdin {
        run_named(&arguments.folder)?;
        return Ok(exit::SUCCESS);
    }
    let started = Instant::now();
    let mut names = Vec::new();
    for entry in
        fs::read_dir(&arguments.folder).with_context(|| format!("no tests in {}", arguments.folder.display()))?
    {
        let entry = entry?;
        if entry.path().join("model.onnx").is_file() {
            names.push(entry.file_name().into_string().ok().context("a test's name is not text")?);
        }
    }
    ensure!(!names.is_empty(), "there are no tests in {}", arguments.folder.display());
    names.sort();
    let mut verdicts = in_children(&arguments.folder, &names)?;
    verdicts.sort();
    ensure!(verdicts.len() == names.len(), "{} of {} tests have a verdict", verdicts.len(), names.len());

    let failed = verdicts.iter().filter_map(|(name, why)| why.as_ref().map(|why| (name, why)));
    for (name, why) in failed.clone() {
        println!("failed {name}: {why}");
    }
    let passed = verdicts.len() - failed.count();
    println!("{passed} of {} node tests pass, floor {}, {:.1?}", verdicts.len(), arguments.floor, started.elapsed());
    Ok(if passed >= arguments.floor { exit::SUCCESS } else { exit::FAILURE })
}

/// Hands batches to as many children as there are processors.
fn in_children(folder: &Path, names: &[String]) -> Result<Vec<Verdict>> {
    let batches: Mutex<VecDeque<_>> = Mutex::new(names.chunks(BATCH).collect());
    let next = || batches.lock().expect("no holder panics").pop_front();
    let hands = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let work = || {
            let mut verdicts = Vec::new();
            while let Some(batch) = next() {
                verdicts.extend(batch_verdicts(folder, batch)?);
            }
            Ok(verdicts)
        };
        let hands: Vec<_> = (0..hands).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::new();
        for hand in hands {
            let verdicts: Result<Vec<Verdict>> = hand.join().expect("hands do not panic");
            all.extend(verdicts?);
        }
        Ok(all)
    })
}

/// Runs a batch. If the child dies, the test it was in has failed, and another child runs the rest.
fn batch_verdicts(folder: &Path, mut names: &[String]) -> Result<Vec<Verdict>> {
    let mut verdicts = Vec::new();
    while !names.is_empty() {
        let mut child = child(folder, names)?;
        let output = BufReader::new(child.stdout.take().expect("the child's output is piped"));
        for line in output.lines() {
            let line = line?;
            let (name, verdict) = line.split_once('\t').context("a child said something else than a verdict")?;
            verdicts.push((name.to_owned(), (verdict != "ok").then(|| verdict.to_owned())));
            names = &names[1..];
        }
        let status = child.wait()?;
        if let [lost, rest @ ..] = names {
            verdicts.push((lost.clone(), Some(format!("the runner ended: {status}"))));
            names = rest;
        }
    }
    Ok(verdicts)
}

fn child(folder: &Path, names: &[String]) -> Result<Child> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("conformance")
        .arg("--names-on-stdin")
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdin = child.stdin.take().expect("the child's input is piped");
    // A batch of names is smaller than a pipe's buffer, so this does not wait for the child.
    stdin.write_all(names.join("\n").as_bytes())?;
    Ok(child)
}

/// The child's side: writes one line with a verdict per name.
fn run_named(folder: &Path) -> Result<()> {
    for name in std::io::stdin().lines() {
        let name = name?;
        let verdict = match run_test(&folder.join(&name)) {
            Ok(()) => "ok".to_owned(),
            Err(error) => format!("{error:#}").replace(['\n', '\t'], " "),
        };
        println!("{name}\t{verdict}");
    }
    Ok(())
}

fn run_test(folder: &Path) -> Result<()> {
    let options = LoadOptions { format: Some(ModelFormat::Onnx), threads: 1, gpu: false, gpu_required: false };
    let mut model = Model::load(&folder.join("model.onnx"), options)?;
    for set in 0.. {
        let data = folder.join(format!("test_data_set_{set}"));
        if !data.is_dir() {
            ensure!(set > 0, "there is no data");
            break;
        }
        let inputs = tensors(&data, "input", model.signature().inputs.len())?;
        let outputs = model.run(&inputs)?;
        let expected = tensors(&data, "output", outputs.len())?;
        for (spec, (got, expected)) in model.signature().outputs.iter().zip(outputs.iter().zip(&expected)) {
            if let Err(why) = compare::equal(got, expected) {
                bail!("output '{}' of data set {set}: {why}", spec.name);
            }
        }
    }
    Ok(())
}

fn tensors(folder: &Path, side: &str, count: usize) -> Result<Vec<crate::tensor::Tensor>> {
    (0..count)
        .map(|index| {
            let file = folder.join(format!("{side}_{index}.pb"));
            let bytes = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            tensor_proto::parse(&bytes).with_context(|| format!("{side} {index}"))
        })
        .collect()
}
