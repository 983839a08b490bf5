//! What is said when the input is wrong: the file, the line, the field, and what to do.

use crate::{
    fake::Fake,
    happy::{Registry, platform},
    runner::Home,
};

const HELLO: &str =
    "kind: Deployment\nname: hello\nimage: hello:v1\nresources:\n  memory: 32Mi\nports:\n  - port: 80\n";

fn refused(text: &str) -> String {
    let home = Home::new();
    let file = home.file("hello.yaml", text);
    let message = home.run(&["apply", "-f", &file]).failed();
    message
        .strip_prefix(&file.replace("hello.yaml", ""))
        .expect("the message begins with the file")
        .to_owned()
}

#[test]
fn broken_specs_are_refused_with_line_field_and_fix() {
    assert!(refused("kind: Deployment\nname: [hello\nimage: x\n").starts_with("hello.yaml:"));
    let message = refused(&HELLO.replace("memory", "memori"));
    assert!(message.starts_with("hello.yaml:5: resources"), "{message}");
    assert!(message.contains("unknown field `memori`") && message.contains("`anyplace schema`"), "{message}");
    let message = refused(&HELLO.replace("32Mi", "32"));
    assert!(message.starts_with("hello.yaml:5: resources.memory: `32` is not a size: write"), "{message}");
    let message = refused(&format!("{HELLO}  - port: 80\n"));
    assert!(message.starts_with("hello.yaml:8: ports[1].port: port 80 is there twice"), "{message}");
    let message = refused(&HELLO.replace("image: hello:v1\n", ""));
    assert!(message.contains("missing field `image`; add it"), "{message}");
}

#[test]
fn standard_input_has_a_name_too() {
    let message = Home::new().run_with_input(&["apply", "-f", "-"], "kind: Pod\n").failed();
    assert!(
        message.starts_with("<stdin>:1: kind: `Pod` is not known; write `Deployment` or `Job`"),
        "{message}"
    );
}

#[test]
fn missing_files_are_named() {
    let home = Home::new();
    let message = home.run(&["apply", "-f", "nowhere.yaml"]).failed();
    assert!(message.contains("`nowhere.yaml` can't be read; check -f"), "{message}");
    let message = home.run(&["push", "nowhere", "hello:v1"]).failed();
    assert!(message.contains("there is no `nowhere` to push; give a folder"), "{message}");
    let message = home.run(&["get", "deployments", "--token-file", "nowhere"]).failed();
    assert!(
        message.contains("token file nowhere") && message.contains("`anyplace token create`"),
        "{message}"
    );
}

#[test]
fn a_platform_that_is_down_is_named_with_the_flag() {
    let message = Home::new().run(&["get", "deployments", "--url", "http://127.0.0.1:1"]).failed();
    assert!(message.contains("http://127.0.0.1:1/v1/deployments does not answer"), "{message}");
    assert!(message.contains("refused") && message.contains("--url"), "{message}");
    let message = Home::new().run(&["get", "deployments", "--url", "nonsense"]).failed();
    assert!(message.contains("`nonsense` is not a URL; write one such as"), "{message}");
}

#[test]
fn credentials_that_are_refused_say_where_to_get_others() {
    let (home, fake) = (Home::new(), Fake::start());
    let run = |token: &str| {
        let mut command = home.command(&["get", "deployments", "--url", &fake.url]);
        crate::runner::ran(command.env("ANYPLACE_TOKEN", token).output().unwrap()).failed()
    };
    let message = run("old");
    assert!(message.contains("expired an hour ago; make another with `anyplace token create`"), "{message}");
    assert_eq!(run("wrong"), "the token is not known");
    let message = home.run(&["get", "deployments", "--url", &fake.url]).failed();
    assert!(message.contains("no token was sent: give --token-file, ANYPLACE_TOKEN"), "{message}");
}

#[test]
fn an_image_that_is_not_there_is_refused_before_it_is_applied() {
    let (home, fake, registry) = (Home::new(), Fake::start(), Registry::start());
    platform(&home, &fake, Some(&registry));
    registry.push(&home, "hello:v1").ok();
    let apply = |image: &str| {
        let file = home.file("spec.yaml", &HELLO.replace("hello:v1", image));
        home.run(&["apply", "-f", &file]).failed()
    };
    for image in ["other:v1", "hello:v2", &format!("hello@sha256:{}", "0".repeat(64))] {
        let message = apply(image);
        assert!(message.starts_with(&format!("image: no image `{image}` in the registry at")), "{message}");
        assert!(message.contains("`anyplace push DIRECTORY"), "{message}");
    }
    let message = apply("Hello:v1");
    assert!(message.starts_with("image: `Hello:v1` is no image reference"), "{message}");
    assert_eq!(home.run(&["get", "deployments", "-o", "json"]).ok(), "[]\n");
}

#[test]
fn a_registry_that_is_down_is_named() {
    let (home, fake) = (Home::new(), Fake::start());
    platform(&home, &fake, None);
    let file = home.file("spec.yaml", HELLO);
    let message = home.run(&["apply", "-f", &file, "--registry", "http://127.0.0.1:1"]).failed();
    assert!(message.contains("its registry is down; start it, or check --registry"), "{message}");
    assert!(message.contains("http://127.0.0.1:1"), "{message}");
    let rootfs = tempfile::tempdir().unwrap();
    let source = rootfs.path().to_string_lossy();
    let ran = home.run(&["push", &source, "hello:v1", "--registry", "http://127.0.0.1:1"]);
    assert!(ran.failed().contains("no answer from the registry at http://127.0.0.1:1"));
}

#[test]
fn an_interrupted_push_leaves_nothing_behind() {
    let (home, temporary) = (Home::new(), tempfile::tempdir().unwrap());
    std::fs::create_dir(home.path().join("rootfs")).unwrap();
    // Takes connections and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let registry = format!("http://{}", listener.local_addr().unwrap());
    let source = home.path().join("rootfs");
    let mut command = home.command(&["push", &source.to_string_lossy(), "hello:v1", "--registry", &registry]);
    let child = command.env("TMPDIR", temporary.path()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let _connection = listener.accept().unwrap();
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 1);
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let ran = crate::runner::ran(child.wait_with_output().unwrap());
    assert_eq!(ran.code, 130, "{ran:?}");
    assert!(ran.err.contains("interrupted"), "{ran:?}");
    assert_eq!(std::fs::read_dir(temporary.path()).unwrap().count(), 0);
}

#[test]
fn a_registry_refuses_without_credentials() {
    let (home, fake, registry) = (Home::new(), Fake::start(), Registry::start());
    platform(&home, &fake, None);
    let file = home.file("spec.yaml", HELLO);
    let message = home.run(&["apply", "-f", &file, "--registry", &registry.url]).failed();
    assert!(message.contains("refused access to `hello`") && message.contains("credentials"), "{message}");
}

#[test]
fn a_name_that_is_taken_is_said_with_its_field() {
    let (home, fake, registry) = (Home::new(), Fake::start(), Registry::start());
    platform(&home, &fake, Some(&registry));
    registry.push(&home, "hello:v1").ok();
    let file = home.file("job.yaml", "kind: Job\nname: nightly\nimage: hello:v1\n");
    home.run(&["jobs", "run", "-f", &file]).ok();
    let message = home.run(&["jobs", "run", "-f", &file]).failed();
    assert_eq!(message, "name: there is a job `nightly` already; choose another name, or delete that one");
    let file = home.file("hello.yaml", HELLO);
    let message = home.run(&["jobs", "run", "-f", &file]).failed();
    assert!(message.contains("is a deployment, not a job; run `anyplace apply -f"), "{message}");
}

#[test]
fn wrong_usage_exits_with_2() {
    let home = Home::new();
    for args in [
        &["frobnicate"][..],
        &[],
        &["get", "pods"],
        &["apply"],
        &["apply", "-f", "x", "--timeout", "2m"],
        &["location", "set", "ams"],
        &["location", "set", "ams", "--off-peak", "night"],
        &["token", "create", "--role", "location"],
        &["delete", "deployment", "No_Name"],
        &["jobs", "logs"],
        &["registry"],
    ] {
        let ran = home.run(args);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{args:?} {ran:?}");
        assert!(!ran.err.is_empty());
    }
    let ran = home.run(&["apply", "-f", "x", "--wait", "--timeout", "2"]);
    assert!(ran.err.contains("write a number with a unit"), "{ran:?}");
}

#[test]
fn a_roles_configuration_is_refused_with_file_and_line() {
    let home = Home::new();
    let file = home.file("registry.toml", "data_dir = '/nowhere'\nlissen = '127.0.0.1:0'\n");
    let message = home.run(&["registry", "--config", &file]).failed();
    assert!(message.contains("registry.toml:2: unknown field `lissen`"), "{message}");
    for role in ["global-scheduler", "location-scheduler", "registry", "machine-agent", "state-router"] {
        let message = home.run(&[role, "--config", "nowhere.toml"]).failed();
        assert!(message.contains("nowhere.toml can't be read"), "{role}: {message}");
    }
}
