//! Joining the mesh with settings that cannot work.

use std::time::Duration;

use mesh_sdk::{ConnectError, Mesh, Options};

/// What is said of these addresses, though no broker is there to ask.
async fn advertising(advertise: Vec<String>) -> ConnectError {
    let state = tempfile::tempdir().expect("a folder");
    let connect_within = Duration::from_millis(100);
    // Port 1 is nobody's.
    let options = Options::new("tcp://127.0.0.1:1");
    let options = Options { state_dir: state.path().to_owned(), advertise, connect_within, ..options };
    Mesh::connect(options).await.expect_err("nobody is there")
}

#[tokio::test]
async fn addresses_that_no_message_can_carry_are_refused_before_anybody_is_waited_for() {
    let names = |count: u32| (0..count).map(|number| format!("door-{number}.example")).collect();
    assert!(matches!(advertising(names(8)).await, ConnectError::Broker(_)), "as many as there may be");
    let error = advertising(names(9)).await.to_string();
    assert_eq!(error, "9 addresses to advertise are too many: name 8 at most");
    let error = advertising(vec!["x".repeat(300)]).await.to_string();
    assert!(error.contains("is too long"), "{error}");
}
