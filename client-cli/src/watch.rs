//! `workers --watch`: shows the workers repeatedly. Owns when it asks and when it ends: by Ctrl-C, with `--timeout`, or
//! when the reader leaves. Never: a worker's line.

use std::{io::IsTerminal, time::Duration};

use mesh_sdk::{AskError, WorkerView};
use tokio::sync::watch::Receiver;

use crate::{
    args::Global,
    ask::ask_failed,
    connect::connect,
    exit::{self, Failed},
    progress::Progress,
    stop::{Stop, stop_signal, unless_stopped},
    streams::{Reader, say, write},
    views,
};

/// Interval of the questions: two heartbeats.
const EVERY: Duration = Duration::from_secs(2);

/// Clears the terminal and moves the cursor to its first line.
const CLEAR: &str = "\x1b[H\x1b[2J";

pub(crate) async fn workers(global: &Global) -> Result<u8, Failed> {
    let progress = Progress::new(1, true, global.json);
    let mut stop = stop_signal(global.timeout);
    let mesh = connect(global, None, &progress, &mut stop).await?;
    let ended = watch(EVERY, &mut stop, async || mesh.workers().await, |workers| show(global, workers)).await;
    mesh.close().await;
    ended.map(|()| exit::OK)
}

fn show(global: &Global, workers: &[WorkerView]) -> Result<Reader, Failed> {
    let text = match global.json {
        true => format!("{:#}\n", views::workers_json(workers)),
        false if std::io::stdout().is_terminal() => {
            format!("{CLEAR}{}", views::workers_text(workers, global.columns()))
        }
        false => views::workers_text(workers, global.columns()),
    };
    write(|out| out.write_all(text.as_bytes()))
}

async fn watch(
    every: Duration,
    stop: &mut Receiver<Option<Stop>>,
    ask: impl AsyncFn() -> Result<Vec<WorkerView>, AskError>,
    mut show: impl FnMut(&[WorkerView]) -> Result<Reader, Failed>,
) -> Result<(), Failed> {
    while let Ok(answer) = unless_stopped(stop, ask()).await {
        match answer {
            Ok(workers) if show(&workers)? == Reader::Gone => return Ok(()),
            Ok(_) => {}
            // If the broker restarts, only one round is missed and the watch continues.
            Err(error @ AskError::Silent { .. }) => say(&format!("mesh-client: {error}: asking again\n")),
            Err(error) => return Err(ask_failed(&error)),
        }
        if unless_stopped(stop, tokio::time::sleep(every)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn a_missed_round_is_not_the_end_and_a_reader_who_leaves_is() {
        let (_never, mut stop) = tokio::sync::watch::channel(None);
        let rounds = Cell::new(0);
        let ask = async || {
            rounds.set(rounds.get() + 1);
            match rounds.get() {
                2 => Err(AskError::Silent {
                    broker: "tcp://cloud:5555".into(),
                    within: Duration::from_secs(10),
                    hint: None,
                }),
                _ => Ok(Vec::new()),
            }
        };
        let mut shown = 0;
        let show = |_: &[WorkerView]| {
            shown += 1;
            Ok(if shown == 2 { Reader::Gone } else { Reader::There })
        };

        watch(Duration::ZERO, &mut stop, ask, show).await.unwrap();

        assert_eq!((rounds.get(), shown), (3, 2));
    }

    #[tokio::test]
    async fn it_ends_when_it_is_to_stop_and_when_there_will_be_no_answer() {
        let (stopping, mut stop) = tokio::sync::watch::channel(None);
        let closed = async || Err(AskError::Closed);
        let failed = watch(EVERY, &mut stop, closed, |_| Ok(Reader::There)).await.unwrap_err();
        assert_eq!(failed.exit, exit::INTERNAL);

        stopping.send(Some(Stop::CtrlC)).unwrap();
        let silent = async || std::future::pending().await;
        watch(EVERY, &mut stop, silent, |_| Ok(Reader::There)).await.unwrap();
    }
}
