use bollard::models::SystemVersionComponents;
use mesh_core::worker::headroom::Headroom;
use proto_msgs::{Attempt, AttemptId, Demands, Digest, ModelFormat, ModelRef, TaskId};
use tokio::io::AsyncReadExt;

use super::*;
use crate::{
    batch::tests::skip,
    data::blobs::BlobStore,
    runners::pool::{Pool, RunnerDefaults, Wanted},
};

fn version(name: &str, version: &str) -> SystemVersion {
    let component = SystemVersionComponents { name: name.to_owned(), version: version.to_owned(), details: None };
    SystemVersion { components: Some(vec![component]), ..SystemVersion::default() }
}

#[test]
fn docker_and_podman_are_told_apart() {
    assert_eq!(Flavour::of(&version("Engine", "20.10.24")), Flavour::Docker);
    assert_eq!(Flavour::of(&version("Podman Engine", "4.3.1")), Flavour::Podman { major: 4, minor: 3 });
    assert_eq!(Flavour::of(&SystemVersion::default()), Flavour::Docker);
}

#[test]
fn an_end_by_the_memory_limit_is_told_and_where_the_engine_cannot_tell_it_is_not_guessed() {
    let podman = |major| Flavour::Podman { major, minor: 3 };
    let limit_bytes = 64 << 20;
    for flavour in [Flavour::Docker, podman(4), podman(5)] {
        assert_eq!(flavour.cause_of(137, true, limit_bytes), Cause::OutOfMemory { limit_bytes }, "{flavour:?}");
        assert_eq!(flavour.cause_of(139, false, limit_bytes), Cause::Signal(libc::SIGSEGV), "{flavour:?}");
        assert_eq!(flavour.cause_of(11, false, limit_bytes), Cause::Code(11), "{flavour:?}");
    }
    for flavour in [Flavour::Docker, podman(5)] {
        assert_eq!(flavour.cause_of(137, false, limit_bytes), Cause::Signal(libc::SIGKILL), "{flavour:?}");
    }
    let untold = Exit::without_word(podman(4).cause_of(137, false, limit_bytes)).while_running();
    assert_eq!(untold.code, ErrorCode::RunCrashed);
    assert!(untold.text.contains("SIGKILL") && untold.text.contains("64.0 MiB"), "{}", untold.text);
}

#[test]
fn an_old_runc_is_noticed() {
    let old = version("runc", "1.1.5+ds1");
    assert_eq!(old_runc(&old), Some("1.1.5+ds1"));
    for new in ["1.2.8", "1.3.3-rc.1", "2.0.0"] {
        assert_eq!(old_runc(&version("runc", new)), None, "{new}");
    }
    assert_eq!(old_runc(&version("crun", "1.0")), None, "another runtime");
}

#[test]
fn podman_is_told_how_many_processes_the_host_allows_and_docker_is_not() {
    let names = |flavour: Flavour| flavour.ulimits().into_iter().filter_map(|limit| limit.name).collect::<Vec<_>>();
    assert!(names(Flavour::Podman { major: 4, minor: 3 }).contains(&"nproc".to_owned()));
    assert!(!names(Flavour::Docker).contains(&"nproc".to_owned()), "there it would count all containers of the user");
}

#[test]
fn nothing_but_its_own_tmp_can_be_written_in_a_container_of_either_engine() {
    assert_eq!(Flavour::Docker.tmpfs(), HashMap::from([("/tmp".to_owned(), TMPFS.to_owned())]));
    let podman = Flavour::Podman { major: 4, minor: 3 }.tmpfs();
    let is_writable = |(_, options): &(&String, &String)| options.split(',').any(|option| option == "rw");
    let writable: Vec<_> = podman.iter().filter(is_writable).map(|(folder, _)| folder.as_str()).collect();
    assert_eq!(writable, ["/tmp"]);
    // Folders that Podman would make writable by default.
    assert!(["/run", "/var/tmp"].iter().all(|folder| podman.contains_key(*folder)), "{podman:?}");
}

#[test]
fn gpus_are_asked_for_in_the_way_the_engine_obeys() {
    let asked = |flavour: Flavour, device| flavour.gpu_request(device).expect("a form for it");
    let podman = Flavour::Podman { major: 5, minor: 4 };
    let docker = asked(Flavour::Docker, Device::AnyGpu).expect("the vendor's form");
    assert_eq!((docker.driver.as_deref(), docker.count, docker.device_ids), (Some("nvidia"), Some(-1), None));
    let second = asked(Flavour::Docker, Device::Gpu(1)).expect("the vendor's form");
    assert_eq!((second.count, second.device_ids), (None, Some(vec!["1".to_owned()])));
    let ids = |device| asked(podman, device).expect("CDI").device_ids;
    assert_eq!(ids(Device::AnyGpu), Some(vec!["nvidia.com/gpu=all".to_owned()]));
    assert_eq!(ids(Device::Gpu(1)), Some(vec!["nvidia.com/gpu=1".to_owned()]));
    assert_eq!(asked(Flavour::Docker, Device::Cpu), None);
    let old = Flavour::Podman { major: 4, minor: 9 };
    let refused = old.gpu_request(Device::Gpu(0)).expect_err("it would run without a GPU");
    assert_eq!(refused.code, ErrorCode::EngineUnavailable);
    assert_eq!(old.gpu_request(Device::Cpu), Ok(None));
}

#[test]
fn a_path_with_colons_stays_one_path() {
    let model = bind(Path::new("/srv/mesh:a/model"), "/model", true);
    assert_eq!((model.source.as_deref(), model.target.as_deref()), (Some("/srv/mesh:a/model"), Some("/model")));
    assert_eq!((model.typ, model.read_only), (Some(MountType::BIND), Some(true)));
}

#[tokio::test]
async fn a_container_that_its_engine_could_not_remove_is_removed_once_it_answers() {
    let home = tempfile::tempdir().expect("a temporary folder");
    let socket = home.path().join("engine.sock");
    drop(std::os::unix::net::UnixListener::bind(&socket).expect("the folder is ours"));
    let client = open(socket.to_str()).await.expect("its socket is there, though nobody listens");

    remove(&client, "left").await;
    std::fs::remove_file(&socket).expect("it was bound");
    let engine = tokio::net::UnixListener::bind(&socket).expect("the folder is ours");

    let asked = tokio::time::timeout(ENGINE_WAIT, engine.accept()).await.expect("the worker asks again");
    let (mut asked, mut request) = (asked.expect("a connection").0, vec![0; 1024]);
    let length = asked.read(&mut request).await.expect("a request");
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    assert!(request.starts_with("DELETE ") && request.contains("/containers/left?"), "{request}");
    assert!(request.contains("force=true"), "it may still run: {request}");
}

/// An ONNX model of y = −x for one number.
const NEGATE: &[u8] = b"\x08\x08\x3a\x32\x0a\x0b\x0a\x01x\x12\x01y\x22\x03Neg\x12\x01g\
    \x5a\x0f\x0a\x01x\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01\
    \x62\x0f\x0a\x01y\x12\x0a\x0a\x08\x08\x01\x12\x04\x0a\x02\x08\x01\
    \x42\x02\x10\x0d";

#[tokio::test]
async fn a_container_may_use_what_was_asked_and_the_head_room() {
    let worker = WorkerId::from(uuid::Uuid::new_v4());
    let settings = DockerSettings { host: None, image: "mesh-runner:latest".to_owned(), worker };
    let docker = match Docker::connect(settings).await {
        Ok(docker) => docker,
        Err(error) => return skip(&error.to_string()),
    };
    let home = tempfile::tempdir().expect("a temporary folder");
    let store = BlobStore::open(&home.path().join("blobs"), 1 << 30).expect("a store");
    let mut file = store.spool(NEGATE.len() as u64).and_then(|file| file.create()).expect("room");
    file.write(NEGATE).expect("writing");
    let pin = store.adopt(file.finish().0, Digest::of(NEGATE)).expect("adopted");
    let defaults = RunnerDefaults { cpu_millis: 1000, memory_bytes: 512 << 20, headroom: Headroom::default() };
    let runners = home.path().join("runners");
    std::fs::create_dir(&runners).expect("a folder");
    let (pool, mut all_ended) = Pool::new(Box::new(docker.clone()), store.clone(), runners, defaults, 2);
    for (asked, granted) in [(2000, 2.2), (5000, 5.3), (0, 1.0)] {
        let wanted = Wanted {
            attempt: AttemptId { task: TaskId::from_bytes([1; 16]), attempt: Attempt(asked) },
            model: ModelRef { digest: Digest::of(NEGATE), size_bytes: NEGATE.len() as u64, format: ModelFormat::Onnx },
            pin: pin.clone(),
            demands: Demands { cpu_millis: asked, ..Demands::default() },
            device: -1,
            apart: false,
        };
        let runner = pool.take(&wanted, async || ()).await.expect("a container with the model");
        assert_eq!(cores_of(&docker, &wanted).await, granted, "asked {asked}");
        drop(runner);
    }
    pool.close().await;
    tokio::time::timeout(ENGINE_WAIT, all_ended.recv()).await.expect("all containers are removed");
}

/// Processors that this attempt's container may use, as the engine reports.
async fn cores_of(docker: &Docker, wanted: &Wanted) -> f64 {
    let label = format!("{LABEL_ATTEMPT}={}-{}", wanted.attempt.task, wanted.attempt.attempt);
    let worker = format!("{LABEL_WORKER}={}", docker.settings.worker);
    let filter = HashMap::from([("label", vec![label, worker])]);
    let options = ListContainersOptionsBuilder::new().filters(&filter).build();
    let found = docker.client.list_containers(Some(options)).await.expect("an answer");
    let id = found[0].id.clone().expect("it has one");
    let host = docker.client.inspect_container(&id, None).await.expect("an answer").host_config.expect("it has one");
    host.cpu_quota.expect("a limit") as f64 / host.cpu_period.expect("a limit") as f64
}
