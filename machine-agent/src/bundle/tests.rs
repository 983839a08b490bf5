use anyplace_model::{AttemptId, Resources};

use super::*;

fn assignment() -> Assignment {
    Assignment {
        instance: "hello-1".parse().unwrap(),
        workload: Workload::Deployment("hello".parse().unwrap()),
        location: "ams".parse().unwrap(),
        generation: 1,
        image: "hello:v1".into(),
        command: None,
        env: BTreeMap::from([("COLOUR".into(), "blue".into())]),
        isolation: anyplace_model::Isolation::Container,
        resources: Resources::default(),
        gpus: vec![],
        address: "10.1.1.65".parse().unwrap(),
        ports: vec![],
        health: anyplace_model::Health::default(),
        restart: true,
        timeout_ms: None,
        draining: false,
    }
}

fn config_of(assignment: &Assignment, image: &ContainerConfig) -> anyhow::Result<Value> {
    let config: crate::Config = toml::from_str(
        r#"
        data_dir = "/data"
        advertise = "http://10.1.1.1:7620"
        machine = "ams-1"
        location_scheduler = "http://10.1.0.10:7610"
        token_file = "/t"
        registry = "http://10.1.0.10:5000"
        address = "10.1.1.1"
        uplink = "eth0"
        instance_cidr = "10.1.1.64/26"
        "#,
    )?;
    let paths = crate::paths::Paths::new(&config).instance(&assignment.instance);
    let bundle = Bundle { assignment, machine: &config.machine, image, paths: &paths, filter: Some("AAAA") };
    let user = User { uid: 5, gid: 6, more_gids: vec![7], home: "/home/app".into() };
    Ok(serde_json::to_value(bundle.spec(&user, vec![])?)?)
}

fn image() -> ContainerConfig {
    ContainerConfig {
        entrypoint: Some(vec!["/bin/server".into()]),
        cmd: Some(vec!["--port".into(), "80".into()]),
        env: Some(vec!["COLOUR=red".into(), "PATH=/app".into(), "ODD".into()]),
        working_dir: Some("/app".into()),
        ..ContainerConfig::default()
    }
}

#[test]
fn the_process_is_the_images_with_the_specs_environment() {
    let config = config_of(&assignment(), &image()).unwrap();
    let process = &config["process"];
    assert_eq!(process["args"], json!(["/bin/server", "--port", "80"]));
    assert_eq!(process["cwd"], "/app");
    assert_eq!(process["user"], json!({"uid": 5, "gid": 6, "additionalGids": [7]}));
    let env: Vec<&str> =
        process["env"].as_array().unwrap().iter().map(|entry| entry.as_str().unwrap()).collect();
    for expected in [
        "COLOUR=blue",
        "PATH=/app",
        "ODD=",
        "HOME=/home/app",
        "ANYPLACE_LOCATION=ams",
        "ANYPLACE_MACHINE=ams-1",
        "ANYPLACE_INSTANCE=hello-1",
        "ANYPLACE_DEPLOYMENT=hello",
        "NVIDIA_VISIBLE_DEVICES=void",
    ] {
        assert!(env.contains(&expected), "{expected} in {env:?}");
    }
    assert_eq!(env.iter().filter(|entry| entry.starts_with("COLOUR=")).count(), 1);
}

#[test]
fn a_jobs_command_replaces_the_images_and_knows_its_attempt() {
    let mut job = assignment();
    job.command = Some(vec!["/bin/other".into()]);
    job.workload = Workload::Job(AttemptId { job: "train".parse().unwrap(), attempt: 3 });
    let config = config_of(&job, &image()).unwrap();
    assert_eq!(config["process"]["args"], json!(["/bin/other"]));
    let env = config["process"]["env"].to_string();
    assert!(env.contains("ANYPLACE_JOB=train") && env.contains("ANYPLACE_ATTEMPT=3"), "{env}");
    let error = config_of(&assignment(), &ContainerConfig::default()).unwrap_err().to_string();
    assert!(error.contains("names no program; give `command`"), "{error}");
}

#[test]
fn an_instance_is_confined() {
    let config = config_of(&assignment(), &image()).unwrap();
    let process = &config["process"];
    assert_eq!(process["noNewPrivileges"], true);
    for set in ["bounding", "effective", "permitted"] {
        let capabilities = process["capabilities"][set].as_array().unwrap();
        assert_eq!(capabilities.len(), CAPABILITIES.len());
        for forbidden in ["CAP_NET_RAW", "CAP_SYS_ADMIN", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_SYS_PTRACE"] {
            assert!(!capabilities.contains(&json!(forbidden)), "{forbidden}");
        }
    }
    let linux = &config["linux"];
    assert_eq!(linux["cgroupsPath"], "/anyplace/ams-1/hello-1");
    assert_eq!(linux["resources"]["memory"]["limit"], 64 << 20);
    assert_eq!(linux["resources"]["cpu"]["quota"], 10_000);
    assert_eq!(linux["resources"]["pids"]["limit"], 1_024);
    assert_eq!(linux["resources"]["devices"], json!([{"allow": false, "access": "rwm"}]));
    assert!(linux["namespaces"].as_array().unwrap().contains(&json!(
        {"type": "network", "path": "/data/netns/hello-1"}
    )));
    assert_eq!(linux["namespaces"].as_array().unwrap().len(), 5);
    assert!(linux["maskedPaths"].to_string().contains("/proc/kcore"));

    let seccomp = &linux["seccomp"];
    assert_eq!(
        (&seccomp["defaultAction"], &seccomp["defaultErrnoRet"]),
        (&json!("SCMP_ACT_ERRNO"), &json!(1))
    );
    let calls = seccomp["syscalls"].as_array().unwrap();
    let free: Vec<&str> =
        calls[0]["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for needed in ["read", "execve", "futex", "epoll_wait", "accept4", "rseq", "openat2", "statx"] {
        assert!(free.contains(&needed), "{needed}");
    }
    for forbidden in [
        "mount",
        "umount2",
        "setns",
        "unshare",
        "bpf",
        "kexec_load",
        "init_module",
        "reboot",
        "swapon",
        "perf_event_open",
        "open_by_handle_at",
        "add_key",
        "keyctl",
        "userfaultfd",
        "io_uring_setup",
        "pivot_root",
        "clone",
        "clone3",
        "socket",
        "personality",
    ] {
        assert!(!free.contains(&forbidden), "{forbidden}");
    }
    assert!(free.is_sorted());
    assert_eq!(calls[2]["errnoRet"], 38);
}

#[test]
fn a_compiled_filter_goes_beside_the_profile_and_rubbish_is_none() {
    let spec = config_of(&assignment(), &image()).unwrap();
    assert_eq!(spec["annotations"]["run.oci.seccomp_bpf_data"], "AAAA");
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");

    let dir = tempfile::tempdir().unwrap();
    let (file, filter) = (dir.path().join("seccomp.bpf"), Compiled::default());
    filter.learn(&file);
    for wrong in [0, 12, 8 * 4_097] {
        std::fs::write(&file, vec![0; wrong]).unwrap();
        filter.learn(&file);
        assert_eq!(filter.get(), None, "{wrong}");
    }
    std::fs::write(&file, [0; 8]).unwrap();
    filter.learn(&file);
    std::fs::write(&file, [1; 8]).unwrap();
    filter.learn(&file);
    assert_eq!(filter.get(), Some("AAAAAAAAAAA="));
}
