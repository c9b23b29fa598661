//! What proves that rows may run together, and what ends it later.

use super::*;

/// Rows of two numbers.
fn rows(values: impl IntoIterator<Item = f32>) -> Vec<f32> {
    values.into_iter().flat_map(|value| [value, value + 1.0]).collect()
}

#[tokio::test]
async fn equal_answers_prove_nothing() {
    let Some(home) = Home::new() else { return };
    let two = [0, 2];
    let (low, high) = (rows([1.0, 2.0, 3.0, 4.0]), rows([60.0, 70.0, 60.0, 60.0]));
    for (what, model, given, equal) in [
        ("rotated rows of one class", models::rotating(&two), &low, Equality::Differs),
        ("one class beside louder rows", models::loudest(&two), &high, Equality::Differs),
        ("another class beside louder rows", models::loudest(&two), &low, Equality::Differs),
        ("a class that cannot be told from others", models::loudest(&two), &vec![0.0; 8], Equality::Inconclusive),
        ("no numbers", models::not_a_number(&two), &low, Equality::Inconclusive),
        ("several classes", models::loudest(&two), &rows([60.0, 1.0, 2.0, 60.0]), Equality::Same),
    ] {
        for kind in [BatchKind::Probe, BatchKind::Check] {
            let task = home.task(1, std::slice::from_ref(&model), 4, &[given.as_slice()]);
            let times = home.run(kind, 0, &[(&task, 0..4)]).await.expect("it answers");
            assert_eq!(times.equal, Some(equal), "{kind:?}: {what}");
        }
    }
    let none = home.task(2, &[models::nothing()], 3, &[&[1.0, 2.0, 3.0]]);
    let times = home.run(BatchKind::Probe, 0, &[(&none, 0..3)]).await.expect("nothing, thrice");
    assert_eq!(times.equal, Some(Equality::Inconclusive), "no row at all");
}

#[tokio::test]
async fn a_model_found_out_later_gives_the_answers_of_single_runs() {
    let Some(home) = Home::new() else { return };
    let two = [0, 2];
    let quiet = rows([60.0, 60.0, 60.0, 60.0, 1.0, 60.0, 60.0, 60.0]);
    let mut loud = quiet.clone();
    loud[4..6].copy_from_slice(&[400.0, 401.0]);
    let classes = |given: &[f32]| given.iter().map(|x| f32::from(u8::from(*x >= 50.0))).collect::<Vec<f32>>();
    let spot = async |model: Vec<u8>, given: &[f32]| {
        let task = home.task(1, &[model], 8, &[given]);
        let times = home.run(BatchKind::Spot, 0, &[(&task, 0..8)]).await.expect("it answers");
        (times.equal, result(&task).1)
    };
    assert_eq!(spot(models::loudest(&two), &quiet).await, (Some(Equality::Same), classes(&quiet)));
    assert_eq!(spot(models::loudest(&two), &loud).await, (Some(Equality::Differs), classes(&loud)));
    let mut signs = quiet.clone();
    signs[6] = -1.0;
    let expected: Vec<f32> = signs.iter().map(|x| f32::from(u8::from(*x >= 0.0))).collect();
    assert_eq!(spot(models::rotating(&two), &signs).await, (Some(Equality::Differs), expected));
}
