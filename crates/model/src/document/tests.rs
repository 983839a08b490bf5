use super::*;
use crate::{Bytes, MilliCpu};

const HELLO: &str = "\
kind: Deployment
name: hello
image: hello:v1
resources:
  cpu: 100m
  memory: 32Mi
ports:
  - port: 80
    container_port: 8080
instances:
  min: 3
health:
  readiness:
    http:
      port: 8080
";

fn refused(text: &str) -> String {
    parse_spec(text, Format::Yaml, "hello.yaml").unwrap_err().to_string()
}

#[test]
fn the_three_formats_say_the_same() {
    let toml = "kind = 'Deployment'\nname = 'hello'\nimage = 'hello:v1'\n[resources]\ncpu = '100m'\nmemory = '32Mi'\n\
        [[ports]]\nport = 80\ncontainer_port = 8080\n[instances]\nmin = 3\n[health.readiness.http]\nport = 8080\n";
    let yaml = parse_spec(HELLO, Format::Yaml, "hello.yaml").unwrap();
    assert_eq!(parse_spec(toml, Format::Toml, "hello.toml").unwrap(), yaml);
    let json = serde_json::to_string(&yaml).unwrap();
    assert_eq!(parse_spec(&json, Format::Json, "hello.json").unwrap(), yaml);
    let Spec::Deployment(spec) = yaml else { panic!("a deployment") };
    assert_eq!((spec.resources.cpu, spec.resources.memory), (MilliCpu(100), Bytes(32 << 20)));
    assert_eq!(spec.ports[0].container_port(), 8080);
}

#[test]
fn a_broken_file_names_its_line() {
    let message = refused("kind: Deployment\nname: [hello\nimage: x\n");
    assert!(message.starts_with("hello.yaml:"), "{message}");
    let error = parse_spec("{\"kind\": \"Job\",\n \"name\": }", Format::Json, "job.json").unwrap_err();
    assert_eq!(error.line, Some(2), "{error}");
    let error = parse_spec("kind = 'Job'\nname = \n", Format::Toml, "job.toml").unwrap_err();
    assert_eq!(error.line, Some(2), "{error}");
}

#[test]
fn an_unknown_field_is_named_with_its_line_and_the_fix() {
    let message = refused(&HELLO.replace("  cpu: 100m", "  cpus: 100m"));
    assert!(message.starts_with("hello.yaml:5: resources"), "{message}");
    assert!(message.contains("unknown field `cpus`") && message.contains("anyplace schema"), "{message}");
}

#[test]
fn a_wrong_unit_is_named_with_its_line_and_the_fix() {
    let message = refused(&HELLO.replace("memory: 32Mi", "memory: 32"));
    assert!(message.starts_with("hello.yaml:6: resources.memory: `32` is not a size"), "{message}");
    assert!(message.contains("`512Mi`"), "{message}");
}

#[test]
fn an_impossible_value_is_named_with_its_line_and_the_fix() {
    let message = refused(&HELLO.replace("  min: 3", "  min: 3\n  max: 2"));
    assert_eq!(
        message,
        "hello.yaml:12: instances.max: 2 is less than instances.min (3); write 3 or more, or leave it out"
    );
    let message = refused(&HELLO.replace("port: 80\n", "port: 0\n"));
    assert!(message.starts_with("hello.yaml:8: ports[0].port"), "{message}");
}

#[test]
fn a_port_clash_is_refused() {
    let clash = HELLO.replace("instances:", "  - port: 80\n    container_port: 81\ninstances:");
    assert!(
        refused(&clash).starts_with("hello.yaml:10: ports[1].port: port 80 is there twice"),
        "{}",
        refused(&clash)
    );
}

#[test]
fn a_missing_image_or_kind_is_named() {
    assert!(refused(&HELLO.replace("image: hello:v1\n", "")).contains("missing field `image`"));
    assert!(
        refused(&HELLO.replace("kind: Deployment\n", ""))
            .contains("kind: is missing; write `Deployment` or `Job`")
    );
    assert!(refused(&HELLO.replace("hello:v1", "\"\"")).contains("image: `` is not an image reference"));
}

#[test]
fn what_parsers_say_is_put_into_plain_words() {
    let message = refused(&HELLO.replace("- port: 80\n", "- port: 70000\n"));
    assert!(
        message.starts_with("hello.yaml:8: ports[0].port: expected a whole number of at most 65535"),
        "{message}"
    );
    let toml = "kind = 'Deployment'\nname = 'hello'\nimage = 'hello:v1'\n[[ports]]\nport = -1\n";
    let message = parse_spec(toml, Format::Toml, "hello.toml").unwrap_err().to_string();
    assert!(
        message
            .starts_with("hello.toml:5: ports[0].port: invalid value: integer `-1`, expected a whole number"),
        "{message}"
    );
    let message = refused(&format!("{HELLO}---\n{HELLO}"));
    assert!(
        message.contains("a second document begins here; write each spec into a file of its own"),
        "{message}"
    );
}
