//! The Metric Table in Redis: heartbeats per second that the broker accepts while it writes them to Redis, against the
//! same rows written directly, as fast as a pipeline allows.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use mesh_tests::{Mesh, MeshOptions, PATIENCE, Redis, wait_for, wait_until};
use serde_json::json;

use crate::{
    broker::fleet::{Fleet, Pace},
    measure::cpu_time,
    report::{Report, Table, median},
};

/// Rows per write in the baseline; more gain nothing.
const PIPELINE_ROWS: usize = 500;

/// Figures of one round, per second.
#[derive(Clone, Copy)]
struct Round {
    heartbeats: f64,
    rows: f64,
    raw_rows: f64,
    fields: usize,
    broker_percent: f64,
    redis_percent: f64,
}

pub(crate) fn run(quick: bool) -> Result<Report> {
    let (sizes, rounds, run_for): (&[usize], _, _) =
        if quick { (&[10], 1, Duration::from_millis(500)) } else { (&[10, 1000, 10_000], 3, Duration::from_secs(3)) };
    let mut report = Report::new("redis", "The Metric Table: heartbeats into Redis");
    let mut table = Table::new(
        "Workers that beat as fast as the broker takes it",
        &[
            "workers",
            "heartbeats/s taken",
            "rows/s written",
            "raw rows/s",
            "heartbeats to raw rows",
            "broker % of a core",
            "redis % of a core",
            "limited by",
        ],
    );
    let mut fields = 0;
    for workers in sizes {
        let mut all = Vec::new();
        for _ in 0..rounds {
            all.push(round(*workers, run_for)?);
        }
        let middle = |field: fn(&Round) -> f64| median(all.iter().map(field));
        fields = all[0].fields;
        table.row(vec![
            json!(workers),
            json!(middle(|round| round.heartbeats).round()),
            json!(middle(|round| round.rows).round()),
            json!(middle(|round| round.raw_rows).round()),
            json!(middle(|round| round.heartbeats) / middle(|round| round.raw_rows)),
            json!(middle(|round| round.broker_percent)),
            json!(middle(|round| round.redis_percent)),
            json!("the fleet: one thread, four system calls per heartbeat; the broker and Redis have time to spare"),
        ]);
    }
    report.table(table);
    report.note(format!(
        "Medians of {rounds} rounds. A row is one HSET of {fields} fields and its expiry. Raw: the same rows from one \
         connection, {PIPELINE_ROWS} in a pipeline, by hand. Redis keeps nothing on disk here, so that its disk is not \
         what is measured."
    ));
    report.note(
        "Heartbeats of one worker within one tick become one row: the broker may take in more than Redis is told.",
    );
    Ok(report)
}

fn round(workers: usize, run_for: Duration) -> Result<Round> {
    let redis = Redis::start_with(&["--appendonly", "no"]);
    let mut mesh = Mesh::with(MeshOptions { redis_url: Some(redis.url()), ..MeshOptions::default() });
    let fleet = Fleet::start(mesh.endpoint(), workers, 2, Pace::FlatOut)?;
    wait_until("all workers to be known", PATIENCE, || mesh.metric("workers") == Some(workers as f64));
    let key = wait_for("a row in Redis", PATIENCE, || first_row_key(&redis));
    let programs = [mesh.broker().pid(), redis.process().pid()];
    let taken = |mesh: &Mesh| mesh.metric("heartbeats_total").unwrap_or(0.0);

    let (start, before) = (Instant::now(), programs.map(cpu_time));
    let (beats, rows) = (taken(&mesh), rows_written(&redis));
    std::thread::sleep(run_for);
    let seconds = start.elapsed().as_secs_f64();
    let (heartbeats, rows) = ((taken(&mesh) - beats) / seconds, (rows_written(&redis) - rows) / seconds);
    let percent = |at: usize| (cpu_time(programs[at]) - before[at]).as_secs_f64() / seconds * 100.0;
    let (broker_percent, redis_percent) = (percent(0), percent(1));
    let row = redis.cli(&["HGETALL", &key]);
    drop(fleet);
    ensure!(heartbeats > 0.0 && rows > 0.0, "heartbeats arrive and rows are written");

    let raw_rows = raw_rows_per_s(&redis, &row, workers, run_for)?;
    Ok(Round { heartbeats, rows, raw_rows, fields: row.lines().count() / 2, broker_percent, redis_percent })
}

fn first_row_key(redis: &Redis) -> Option<String> {
    redis.cli(&["--scan", "--pattern", "*:worker:*"]).lines().next().map(str::to_owned)
}

/// HSET commands executed so far.
fn rows_written(redis: &Redis) -> f64 {
    let info = redis.cli(&["INFO", "commandstats"]);
    let calls = |line: &str| line.strip_prefix("cmdstat_hset:calls=")?.split(',').next()?.parse().ok();
    info.lines().find_map(calls).unwrap_or(0.0)
}

/// Writes the same row under `workers` keys, over and over. Returns rows per second.
fn raw_rows_per_s(redis: &Redis, row: &str, workers: usize, run_for: Duration) -> Result<f64> {
    let mut stream = TcpStream::connect(("127.0.0.1", redis.port()))?;
    let fields: Vec<&str> = row.lines().collect();
    let (start, mut written) = (Instant::now(), 0_usize);
    while start.elapsed() < run_for {
        let mut batch = Vec::new();
        for at in 0..PIPELINE_ROWS {
            let key = format!("raw:{}", (written + at) % workers);
            command(&mut batch, &[&["HSET", &key], &fields[..]].concat());
            command(&mut batch, &["PEXPIRE", &key, "3500"]);
        }
        stream.write_all(&batch)?;
        read_integers(&mut stream, 2 * PIPELINE_ROWS).context("redis broke off")?;
        written += PIPELINE_ROWS;
    }
    Ok(written as f64 / start.elapsed().as_secs_f64())
}

fn command(to: &mut Vec<u8>, words: &[&str]) {
    to.extend(format!("*{}\r\n", words.len()).bytes());
    words.iter().for_each(|word| to.extend(format!("${}\r\n{word}\r\n", word.len()).bytes()));
}

/// Reads `count` answers of the form `:N`.
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
