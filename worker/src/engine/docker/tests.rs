use bollard::models::SystemVersionComponents;

use super::*;

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
