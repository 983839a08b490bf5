//! The schema, the examples in the documentation, and the completions.

use serde_json::Value;

use crate::{runner::Home, validator::check};

fn schema(args: &[&str]) -> Value {
    let schema: Value = serde_json::from_str(&Home::new().run(args).ok()).unwrap();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert!(!schema.to_string().contains("components/schemas"), "{schema}");
    schema
}

fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap()
}

const HELLO: &str = include_str!("../../../docs/examples/hello.yaml");

#[test]
fn the_schema_accepts_every_example_and_so_does_the_parser() {
    let schema = schema(&["schema"]);
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let wrong = check(&schema, &schema, &yaml(&text), "spec");
        assert!(wrong.is_empty(), "{}: {wrong:?}", path.display());
        let format = anyplace_model::Format::of_file(&path.to_string_lossy());
        anyplace_model::parse_spec(&text, format, "example").unwrap();
        seen += 1;
    }
    assert!(seen >= 3, "{seen} examples");
}

#[test]
fn the_schema_refuses_what_the_parser_refuses() {
    let deployment = schema(&["schema", "deployment"]);
    for (from, to) in [
        ("  cpu: 50m", "  cpus: 50m"),
        ("name: hello", "name: Hello"),
        ("kind: Deployment", "kind: Job"),
        ("port: 80\n", "port: 0\n"),
        ("memory: 32Mi", "memory: 32"),
        ("image: hello:v1\n", ""),
    ] {
        let text = HELLO.replacen(from, to, 1);
        assert_ne!(text, HELLO, "{from}");
        assert!(!check(&deployment, &deployment, &yaml(&text), "spec").is_empty(), "{to} is accepted");
        assert!(anyplace_model::parse_spec(&text, anyplace_model::Format::Yaml, "x").is_err(), "{to}");
    }
    let cores = HELLO.replace("cpu: 50m", "cpu: 2");
    assert_eq!(check(&deployment, &deployment, &yaml(&cores), "spec"), Vec::<String>::new());
}

#[test]
fn a_job_has_a_schema_of_its_own() {
    let job = schema(&["schema", "job"]);
    assert_eq!(job["title"], "anyplace job");
    let wrong = check(&job, &job, &yaml("kind: Job\nname: nightly\nimage: hello:v1\n"), "spec");
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = Home::new().run(&["completions", shell]).ok();
        assert!(script.contains("describe") && script.contains("off-peak"), "{shell}");
    }
    let bash = Home::new().run(&["completions", "bash"]).ok();
    let mut check = std::process::Command::new("bash");
    check.arg("-n").stdin(std::process::Stdio::piped());
    let mut child = check.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), bash.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn help_and_version_go_to_standard_output() {
    let home = Home::new();
    assert!(home.run(&["--help"]).ok().contains("Exit codes: 0 done"));
    assert_eq!(home.run(&["version"]).ok(), format!("anyplace {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let home = Home::new();
    let mut child =
        home.command(&["completions", "bash"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}
