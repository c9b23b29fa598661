//! Probes whose rows are answered: nobody waits for the comparison, and nothing that becomes of the tasks spoils it.

use tokio::task::JoinHandle;

use super::*;

/// Numbers that the model answers in different ways, and in one.
const DIFFERENT: [f32; 4] = [1.0, 2.0, 3.0, 4.0];
const EQUAL: [f32; 4] = [1.0, 1.0, 1.0, 1.0];

/// A probe of all rows of a task that is answered and waits for the machine's order.
struct Answered {
    order: watch::Sender<Comparing>,
    probe: JoinHandle<Result<BatchTimes, Failure>>,
}

impl Home {
    async fn probe_until_answered(&mut self, task: &Arc<Material>, stage: u8, rows: u32) -> Answered {
        self.until_answered(BatchKind::Probe, task, stage, rows).await
    }

    async fn until_answered(&mut self, kind: BatchKind, task: &Arc<Material>, stage: u8, rows: u32) -> Answered {
        let (order, comparing) = watch::channel(Comparing::Undecided);
        let (mut batch, tools) = (batch(kind, stage, &[(task, 0..rows)], comparing), self.tools.clone());
        batch.unfinished = self.unfinished.clone();
        let probe = tokio::spawn(async move { batch.run(&tools).await });
        let answered = async {
            while !matches!(self.events.recv().await, Some(Event::BatchAnswered { .. })) {
                assert!(!probe.is_finished(), "it ended without an answer");
            }
        };
        timeout(PATIENCE, answered).await.expect("an answer");
        Answered { order, probe }
    }
}

impl Answered {
    async fn verdict(self, order: Comparing) -> Option<Equality> {
        self.order.send_replace(order);
        let ended = timeout(PATIENCE, self.probe).await.expect("it ends").expect("no panic");
        ended.expect("a comparison never fails a batch").equal
    }
}

fn goes(rows: u32) -> Comparing {
    Comparing::Goes { rows, limit: PATIENCE }
}

#[tokio::test]
async fn answers_are_there_before_anything_is_compared() {
    let Some(mut home) = Home::new() else { return };
    let model = models::negate(&[0, 1]);
    let task = home.task(1, std::slice::from_ref(&model), 4, &[&DIFFERENT]);
    let answered = home.probe_until_answered(&task, 0, 4).await;
    assert_eq!(result(&task).1, DIFFERENT.map(|x| -x));
    assert!(!answered.probe.is_finished(), "it waits for the order to compare");
    assert_eq!(answered.verdict(goes(2)).await, Some(Equality::Same));
    assert_eq!(home.tools.pool.warm(), [Digest::of(&model)]);
}

#[tokio::test]
async fn equal_rows_of_a_new_size_are_answered_before_other_rows_are_made_up() {
    let Some(mut home) = Home::new() else { return };
    let right = models::negate(&[0, 1]);
    let task = home.task(1, std::slice::from_ref(&right), 4, &[&EQUAL]);
    let answered = home.until_answered(BatchKind::Check, &task, 0, 4).await;
    assert_eq!(result(&task).1, EQUAL.map(|x| -x));
    assert!(!answered.probe.is_finished(), "it waits for the order to compare");
    assert_eq!(answered.verdict(Comparing::Stops).await, Some(Equality::Inconclusive), "others need the slot");
    let task = home.task(2, std::slice::from_ref(&right), 4, &[&EQUAL]);
    let answered = home.until_answered(BatchKind::Check, &task, 0, 4).await;
    assert_eq!(answered.verdict(goes(4)).await, Some(Equality::Same));
    let two = [0, 2];
    let rows = [[1.0, 2.0]; 4].concat();
    let task = home.task(3, &[models::rotating(&two)], 4, &[&rows]);
    let answered = home.until_answered(BatchKind::Check, &task, 0, 4).await;
    assert_eq!(answered.verdict(goes(4)).await, Some(Equality::Differs), "rows that change places");
}

#[tokio::test]
async fn who_needs_the_slot_has_it_and_the_runner_stays_warm() {
    let Some(mut home) = Home::new() else { return };
    let model = models::negate(&[0, 1]);
    let in_no_time = Comparing::Goes { rows: 4, limit: Duration::ZERO };
    for (number, order) in [(1, Comparing::Stops), (2, in_no_time)] {
        let task = home.task(number, std::slice::from_ref(&model), 4, &[&DIFFERENT]);
        let answered = home.probe_until_answered(&task, 0, 4).await;
        assert_eq!(answered.verdict(order).await, Some(Equality::Inconclusive), "{order:?}");
        assert_eq!(home.tools.pool.warm(), [Digest::of(&model)], "{order:?}");
    }
}

#[tokio::test]
async fn a_task_that_has_gone_with_its_files_leaves_the_question_open() {
    let Some(mut home) = Home::new() else { return };
    let model = models::negate(&[0, 1]);
    for (number, values) in [(1, DIFFERENT), (2, EQUAL)] {
        let path = home.dir.path().join(format!("input-{number}"));
        fs::write(&path, floats(&values)).expect("writing");
        // As a detached task has it: the file goes with the task's folder, whoever still uses it.
        let input = Payload::File { path: path.clone(), offset: 0, size_bytes: 16, owner: None };
        let task = home.task_of(number, std::slice::from_ref(&model), 4, vec![input]);
        let answered = home.probe_until_answered(&task, 0, 4).await;
        fs::remove_file(path).expect("it was there");
        assert_eq!(answered.verdict(goes(4)).await, Some(Equality::Inconclusive), "{values:?}");
        assert_eq!(home.tools.pool.warm(), [Digest::of(&model)], "the runner is not to blame");
    }
}

#[tokio::test]
async fn what_an_earlier_stage_made_is_compared_although_the_task_has_passed_it_on() {
    let Some(mut home) = Home::new() else { return };
    let stages = [models::negate(&[0, 1]), models::absolute(&[0, 1])];
    for (number, values, model, equal) in
        [(1, DIFFERENT, 1, Equality::Same), (2, EQUAL, 1, Equality::Same), (3, DIFFERENT, 0, Equality::Same)]
    {
        let task = home.task(number, &[stages[0].clone(), stages[model].clone()], 4, &[&values]);
        home.run(BatchKind::Whole, 0, &[(&task, 0..4)]).await.expect("the first stage");
        let answered = home.probe_until_answered(&task, 1, 4).await;
        assert_eq!(result(&task).1, values);
        assert_eq!(answered.verdict(goes(4)).await, Some(equal), "task {number}");
    }
}

#[tokio::test]
async fn a_comparison_with_made_up_items_that_is_cut_short_goes_on_with_the_next_probe() {
    let Some(mut home) = Home::new() else { return };
    let mut number = 0;
    let mut compare = async |model: &Vec<u8>, limit: Duration| {
        number += 1;
        let task = home.task(number, std::slice::from_ref(model), 4, &[&EQUAL]);
        let answered = home.probe_until_answered(&task, 0, 4).await;
        let begun = Instant::now();
        (answered.verdict(Comparing::Goes { rows: 4, limit }).await, begun.elapsed())
    };
    // The least of several: the first one may be slow, and a third of that be enough for a whole one.
    let mut takes = PATIENCE;
    for _ in 0..5 {
        let (whole, took) = compare(&models::absolute(&[0, 1]), PATIENCE).await;
        assert_eq!(whole, Some(Equality::Same));
        takes = takes.min(took);
    }
    let model = models::negate(&[0, 1]);
    let (mut verdicts, mut limit) = (Vec::new(), takes / 3);
    while verdicts.len() < 500 && !verdicts.contains(&Some(Equality::Same)) {
        let verdict = compare(&model, limit).await.0;
        if verdict == Some(Equality::Inconclusive) {
            // Not even one call fits in: the machine has become busier.
            limit += limit / 50;
        }
        verdicts.push(verdict);
    }
    assert_eq!(verdicts.last(), Some(&Some(Equality::Same)), "{verdicts:?}");
    // Cut short before a single call, on a busy machine, it has not come on.
    let cut_short = [Some(Equality::Unfinished), Some(Equality::Inconclusive)];
    assert!(verdicts[..verdicts.len() - 1].iter().all(|verdict| cut_short.contains(verdict)), "{verdicts:?}");
    assert!(verdicts.contains(&cut_short[0]), "{verdicts:?}");
}
