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
        let (order, comparing) = watch::channel(Comparing::Undecided);
        let (batch, tools) = (batch(BatchKind::Probe, stage, &[(task, 0..rows)], comparing), self.tools.clone());
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
