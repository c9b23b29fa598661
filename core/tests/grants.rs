//! What a client makes of a grant: too late, not to be reached, or for a task that goes on without it.

use std::time::Duration;

use mesh_core::{
    MonoTime,
    client::{Action, Client, Config, Event},
};
use mesh_samples::{TICKET_KEY, client_id, submit, task_id, ticket_body, worker_id};
use proto_msgs::{
    Attempt, BrokerToClient, ClientToBroker, Direction, Epoch, ErrorCode, Grant, Outcome, Purpose, TaskSpec, Ticket,
    TicketBody,
};

const NOW: MonoTime = MonoTime::from_micros(1);

fn granted(client: &mut Client, body: TicketBody) -> Vec<Action> {
    let grant = Grant {
        id: body.attempt_id(),
        worker: worker_id(1),
        worker_name: "w1".to_owned(),
        worker_key: None,
        endpoints: vec!["tcp://w:1".to_owned()],
        direction: Direction::ClientDials,
        window_bytes: 1,
        model_held: false,
        predicted_ms: None,
        ticket: Ticket::sign(body, &TICKET_KEY),
    };
    client.handle(NOW, Event::BrokerSaid(BrokerToClient::Grant(grant)))
}

fn submitted(client: &mut Client, spec: TaskSpec) {
    let _ = client.handle(NOW, Event::Submit(Box::new(spec)));
}

/// The code with which the task ends.
fn code(actions: &[Action]) -> Option<ErrorCode> {
    actions.iter().find_map(|action| match action {
        Action::End { end, .. } => match &end.outcome {
            Outcome::Failed(failure) => Some(failure.code),
            _ => None,
        },
        _ => None,
    })
}

#[test]
fn a_grant_for_a_task_that_has_ended_is_given_back_unless_the_task_goes_on_alone() {
    let gives_back = |detached| {
        let mut client = Client::new(Config::new(client_id(1)));
        submitted(&mut client, TaskSpec { detached, ..submit(1, 1).spec });
        let _ = client.handle(NOW, Event::Cancel { task: task_id(1) });
        let said = granted(&mut client, TicketBody { detached, ..ticket_body(1, 1, 1) });
        said.iter().any(|action| matches!(action, Action::TellBroker(ClientToBroker::Close(_))))
    };
    assert_eq!([false, true].map(gives_back), [true, false]);
}

#[test]
fn a_result_that_cannot_be_reached_three_times_is_not_asked_for_again() {
    let mut client = Client::new(Config::new(client_id(1)));
    let _ = client.handle(NOW, Event::Fetch { task: task_id(1) });
    let mut tries = (1..=3).map(|_| {
        let body = TicketBody { purpose: Purpose::Fetch, attempt: Attempt(1), ..ticket_body(1, 1, 1) };
        let id = body.attempt_id();
        let _ = granted(&mut client, body);
        code(&client.handle(NOW, Event::ConnectFailed { id, text: "no route".to_owned() }))
    });
    assert!(tries.by_ref().eq([None, None, Some(ErrorCode::Unreachable)]));
}

#[test]
fn a_worker_that_started_again_is_asked_anew_for_a_result() {
    let mut client = Client::new(Config::new(client_id(1)));
    let _ = client.handle(NOW, Event::Fetch { task: task_id(1) });
    let in_life = |life| TicketBody { purpose: Purpose::Fetch, epoch: Epoch(life), ..ticket_body(1, 1, 1) };
    let id = in_life(1).attempt_id();
    for life in [1, 1, 2, 2] {
        let _ = granted(&mut client, in_life(life));
        let failed = client.handle(NOW, Event::ConnectFailed { id, text: "no route".to_owned() });
        assert_eq!(code(&failed), None, "two failures in one life are not three");
    }
    let connects = |said: Vec<Action>| said.iter().any(|action| matches!(action, Action::Connect { .. }));
    assert!(connects(granted(&mut client, in_life(3))));
    assert!(!connects(granted(&mut client, in_life(3))), "said again");
    let said = granted(&mut client, in_life(4));
    assert!(!said.iter().any(|action| matches!(action, Action::TellWorker { .. })), "the result is not given up");
    assert!(connects(said), "the ticket that it holds is worth nothing");
    assert!(!connects(granted(&mut client, in_life(3))), "late");
}

#[test]
fn a_detached_task_that_is_all_sent_does_not_expire_at_its_client() {
    let expires = |sends: bool| {
        let mut client = Client::new(Config::new(client_id(1)));
        submitted(&mut client, TaskSpec { detached: true, deadline_ms: Some(10_000), ..submit(1, 1).spec });
        let body = TicketBody { detached: true, ..ticket_body(1, 1, 1) };
        let id = body.attempt_id();
        let _ = granted(&mut client, body);
        if sends {
            let _ = client.handle(NOW, Event::Sent { id });
        }
        let times = (1..240).map(|step| NOW + Duration::from_millis(50) * step);
        let mut codes = times.filter_map(|now| code(&client.handle(now, Event::Deadline)));
        codes.any(|code| code == ErrorCode::Expired)
    };
    assert_eq!([false, true].map(expires), [true, false]);
}
