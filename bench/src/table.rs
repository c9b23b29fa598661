//! The Metric Table in Redis: how many heartbeats a second the broker takes in while it keeps the table in Redis, against
//! the same rows written by hand as fast as a pipeline goes.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use mesh_tests::{Mesh, MeshOptions, PATIENCE, Redis, wait_until};
use serde_json::json;

use crate::{fleet::Fleet, report::Section};

/// Commands per write in the baseline.
const PIPELINE: usize = 500;

pub(crate) fn run(smoke: bool) -> Result<Section> {
    let (workers, run_for) = if smoke { (10, Duration::from_millis(500)) } else { (1000, Duration::from_secs(5)) };
    let columns = &["what", "heartbeats/s", "rows written/s", "ratio to raw"];
    let mut section = Section::new("table", "The Metric Table: heartbeats into Redis", columns);

    let redis = Redis::start();
    let mesh = Mesh::with(MeshOptions { redis_url: Some(redis.url()), ..MeshOptions::default() });
    let fleet = Fleet::start(mesh.endpoint(), workers, 2, true)?;
    wait_until("all workers to be known", PATIENCE, || mesh.metric("workers") == Some(workers as f64));
    let key = || redis.cli(&["--scan", "--pattern", "*:worker:*"]).lines().next().map(str::to_owned);
    let key = mesh_tests::wait_for("a row in Redis", PATIENCE, key);
    let (start, beats, rows) = (Instant::now(), taken(&mesh), hash_writes(&redis));
    std::thread::sleep(run_for);
    let seconds = start.elapsed().as_secs_f64();
    let through_broker = (taken(&mesh) - beats) / seconds;
    let rows_per_s = (hash_writes(&redis) - rows) / seconds;
    let row = redis.cli(&["HGETALL", &key]);
    drop(fleet);

    let raw = raw_rows_per_s(&redis, &row, workers, run_for)?;
    section.row(vec![
        json!("through the broker"),
        json!(through_broker),
        json!(rows_per_s),
        json!(through_broker / raw),
    ]);
    section.row(vec![json!("raw HSET + PEXPIRE pipeline"), json!(raw), json!(raw), json!(1.0)]);
    section.note(format!(
        "{workers} workers that send heartbeats as fast as they can; a row has {} fields.",
        row.lines().count() / 2
    ));
    section.note(
        "Heartbeats of one worker within one tick become one row, so the broker may take in more than Redis could write. \
         What limits the broker's column is the message rate of libzmq and the fleet beside it; what limits the raw one is Redis.",
    );
    Ok(section)
}

fn taken(mesh: &Mesh) -> f64 {
    mesh.metric("heartbeats_total").unwrap_or(0.0)
}

/// HSET commands that the server has carried out.
fn hash_writes(redis: &Redis) -> f64 {
    let info = redis.cli(&["INFO", "commandstats"]);
    let calls = |line: &str| line.strip_prefix("cmdstat_hset:calls=")?.split(',').next()?.parse().ok();
    info.lines().find_map(calls).unwrap_or(0.0)
}

/// Writes the same row under as many keys, over and over, and counts.
fn raw_rows_per_s(redis: &Redis, row: &str, workers: usize, run_for: Duration) -> Result<f64> {
    let mut stream = TcpStream::connect(("127.0.0.1", redis.port()))?;
    let fields: Vec<&str> = row.lines().collect();
    let (start, mut written) = (Instant::now(), 0_usize);
    while start.elapsed() < run_for {
        let mut batch = Vec::new();
        for at in 0..PIPELINE {
            let key = format!("raw:{}", (written + at) % workers);
            command(&mut batch, ["HSET", &key].iter().chain(&fields));
            command(&mut batch, ["PEXPIRE", &key, "3500"].iter());
        }
        stream.write_all(&batch)?;
        read_integers(&mut stream, 2 * PIPELINE).context("redis broke off")?;
        written += PIPELINE;
    }
    Ok(written as f64 / start.elapsed().as_secs_f64())
}

fn command<'a>(to: &mut Vec<u8>, words: impl Iterator<Item = &'a &'a str> + Clone) {
    to.extend(format!("*{}\r\n", words.clone().count()).bytes());
    words.for_each(|word| to.extend(format!("${}\r\n{word}\r\n", word.len()).bytes()));
}

/// Reads this many `:N` answers.
fn read_integers(stream: &mut TcpStream, count: usize) -> std::io::Result<()> {
    let (mut seen, mut buffer) = (0, [0; 16 * 1024]);
    while seen < count {
        let length = stream.read(&mut buffer)?;
        if length == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        seen += buffer[..length].iter().filter(|byte| **byte == b'\n').count();
    }
    Ok(())
}
