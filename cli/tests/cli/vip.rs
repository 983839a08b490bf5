//! `vip describe` and `vip trace`: what they show, and what they say to what they can't use.

use serde_json::Value;

use crate::{
    fake::Fake,
    happy::{Registry, example, platform},
    runner::{Home, Ran},
};

const CLIENT: &str = "198.51.100.10:40000";

fn hello() -> (Home, Fake, Registry) {
    let (home, fake, registry) = (Home::new(), Fake::start(), Registry::start());
    platform(&home, &fake, Some(&registry));
    registry.push(&home, "hello:v1").ok();
    home.run(&["apply", "-f", &example("hello.yaml"), "--wait"]).ok();
    (home, fake, registry)
}

/// Asserts wrong usage; what was said.
fn usage(ran: Ran) -> String {
    assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{ran:?}");
    ran.err
}

#[test]
fn describe_says_who_has_which_share_and_why() {
    let (home, _fake, _registry) = hello();
    let text = home.run(&["vip", "describe", "hello"]).ok();
    let line = |part: &str| {
        let found = text.lines().find(|line| line.contains(part));
        found.unwrap_or_else(|| panic!("no `{part}` in {text}"))
    };
    assert!(text.starts_with("203.0.113.1 of deployment hello, 80/tcp: 6 of 6 instances ready\n"), "{text}");
    let header = "SHARE BUCKETS BEFORE SERVED-BY AT STATE WEIGHT WHY";
    assert_eq!(line("SHARE").split_whitespace().collect::<Vec<_>>().join(" "), header);
    let ready: Vec<&str> = line("hello-1").split_whitespace().collect();
    assert_eq!((ready[0], ready[4], ready[5], ready[6]), ("100.0%", "ams-1", "ready", "100"));
    assert!(line("hello-2").contains("draining") && line("hello-2").contains("keeps its connections"));
    assert!(line("hello-3").contains("not_ready"), "{text}");
    assert!(line("Entering at gru").contains("not known: its location scheduler has stopped reporting"));
    assert!(line("Entering at nrt").contains("withdrawn"));
    let nearest = line("location ams");
    assert!(nearest.contains("100.0%") && nearest.contains("9340 km, 1 ready"), "{text}");
    assert!(nearest.contains("nothing is ready here"), "{text}");
    assert_eq!(home.run(&["vip", "describe", "203.0.113.1"]).ok(), text);
    let one = home.run(&["vip", "describe", "hello", "--location", "nrt"]).ok();
    assert!(one.contains("Entering at nrt") && !one.contains("Entering at ams"), "{one}");
}

#[test]
fn describe_says_what_enters_and_what_may_go_elsewhere() {
    let (home, _fake, registry) = hello();
    registry.push(&home, "busy:v1").ok();
    let spec = "kind: Deployment\nname: busy\nimage: busy:v1\nresources: {memory: 32Mi}\nports: [{port: 80}]\n\
                load: {metric: connections_per_second, target: 20}\n";
    home.run(&["apply", "-f", &home.file("busy.yaml", spec), "--wait"]).ok();
    let text = home.run(&["vip", "describe", "busy", "--location", "ams"]).ok();
    let line = "  New connections a second: 80.0 enter, 100.8 are asked for, instances here can serve 20.0; granted are ams 20.0, \
                nrt 81.5";
    assert!(text.lines().any(|it| it == line), "{text}");
    let tokyo = text.lines().find(|line| line.contains("location nrt")).unwrap();
    assert!(tokyo.contains("75.0%") && tokyo.contains("120.5 ms, 9340 km, 1 ready"), "{text}");
    assert!(
        tokyo.contains("has a share of 75.0% of what enters here; grants 81.5 new connections a second"),
        "{text}"
    );
    let data = home.json(&["vip", "describe", "busy"]);
    let locations = &data["vips"][0]["locations"];
    assert_eq!(
        (&locations[0]["traffic"]["entering"], &locations[2]["traffic"]),
        (&80.0.into(), &Value::Null)
    );
}

#[test]
fn describe_and_trace_are_data_too() {
    let (home, _fake, _registry) = hello();
    let described = home.json(&["vip", "describe", "hello"]);
    let ams = &described["vips"][0]["locations"][0];
    assert_eq!((&described["deployment"], &ams["location"]), (&"hello".into(), &"ams".into()));
    let first = &ams["backends"][0];
    assert_eq!((&first["instance"], &first["percent"]), (&"hello-1".into(), &100.0.into()));
    let traced = home.json(&["vip", "trace", "hello", CLIENT]);
    let from: Vec<&Value> = traced["locations"].as_array().unwrap().iter().collect();
    assert_eq!((&traced["vip"], &traced["port"]), (&"203.0.113.1".into(), &80.into()));
    assert_eq!(from[0]["instance"]["instance"], "hello-1");
    assert!(from[1]["why_not"].as_str().unwrap().contains("has stopped reporting"), "{traced}");
    // Tokyo sends it to a machine in Amsterdam, whose own table chooses.
    assert_eq!((&from[2]["now"]["to"], &from[2]["now"]["location"]), (&"10.1.1.1".into(), &"ams".into()));
    assert_eq!(from[2]["now"]["there"]["now"]["instance"], "hello-1");
    assert_eq!(from[2]["instance"]["instance"], "hello-1");
    let yaml = home.run(&["vip", "trace", "hello", CLIENT, "-o", "yaml"]).ok();
    assert_eq!(serde_saphyr::from_str::<Value>(&yaml).unwrap(), traced);
}

#[test]
fn trace_says_the_bucket_the_hops_and_the_instance() {
    let (home, _fake, _registry) = hello();
    let text = home.run(&["vip", "trace", "203.0.113.1", CLIENT]).ok();
    assert!(text.starts_with("198.51.100.10:40000 to 203.0.113.1:80/tcp of deployment hello\n"), "{text}");
    let header = "ENTERS-AT BUCKET NOW BEFORE NEW-CONNECTION";
    let lines: Vec<String> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(lines[2], header);
    assert!(lines[3].starts_with("ams ") && lines[3].contains(" of "), "{text}");
    assert!(lines[3].ends_with("hello-1 on ams-1, ams, at 10.1.1.65"), "{text}");
    assert!(lines[4].starts_with("gru - - - nobody: its table is not known"), "{text}");
    assert!(lines[5].contains("location ams by 10.1.1.1, bucket"), "{text}");
    assert!(lines[5].ends_with("hello-1 on ams-1, ams, at 10.1.1.65"), "{text}");
    // Of a thousand ports of a client some are in buckets that the draining instance had.
    let remembered = (1..30).any(|port| {
        let client = format!("198.51.100.10:{}", 1_000 + port * 7);
        home.json(&["vip", "trace", "hello", &client])["locations"][0]["before"]["instance"] == "hello-2"
    });
    assert!(remembered, "no bucket remembers the instance that drains");
}

#[test]
fn what_is_not_there_is_refused_with_what_to_do() {
    let (home, _fake, _registry) = hello();
    let failed = |args: &[&str]| home.run(&[&["vip"], args].concat()).failed();
    assert!(failed(&["describe", "other"]).contains("there is no deployment `other`"));
    let message = failed(&["trace", "203.0.113.9", CLIENT]);
    assert_eq!(
        message,
        "no deployment has the virtual IP 203.0.113.9; `anyplace get deployments` lists them"
    );
    let message = failed(&["trace", "hello", CLIENT, "--location", "syd"]);
    assert_eq!(message, "no location syd has joined; `anyplace get locations` lists those that have");
    let message = failed(&["trace", "hello", CLIENT, "--to", "443"]);
    assert_eq!(message, "203.0.113.1 does not serve that port; choose one of 80/tcp with --to");
    assert_eq!(failed(&["trace", "hello", CLIENT, "--to", "80/udp"]), message);
    home.run(&["vip", "trace", "hello", CLIENT, "--to", "80/tcp"]).ok();
    let message = failed(&["trace", "hello", "[2001:db8::1]:40000"]);
    assert_eq!(
        message,
        "the client's address is IPv6, the virtual IP is 203.0.113.1; give both of one family"
    );
}

#[test]
fn a_client_is_traced_to_the_address_of_its_family_and_the_port_that_is_meant() {
    let (home, _fake, _registry) = hello();
    let spec = "kind: Deployment\nname: dual\nimage: hello:v1\nresources: {memory: 32Mi}\n\
                ports: [{port: 53, protocol: udp}, {port: 53}, {port: 443}]\n";
    home.run(&["apply", "-f", &home.file("dual.yaml", spec), "--wait"]).ok();
    let trace = |args: &[&str]| home.json(&[&["vip", "trace"], args].concat());
    let failed = |args: &[&str]| home.run(&[&["vip", "trace"], args].concat()).failed();
    let six = "[2001:db8::1]:40000";
    let message = failed(&["dual", six]);
    assert_eq!(message, "several ports may be meant; choose one of 53/udp, 53/tcp, 443/tcp with --to");
    let message = failed(&["dual", six, "--to", "53"]);
    assert_eq!(message, "several ports may be meant; choose one of 53/udp, 53/tcp with --to");
    let traced = trace(&["dual", six, "--to", "53/udp"]);
    assert_eq!((&traced["vip"], &traced["protocol"]), (&"2001:db8:a::1".into(), &"udp".into()));
    assert_eq!(traced["locations"][0]["instance"]["instance"], "dual-1");
    assert_eq!(trace(&["2001:db8:a::1", six, "--to", "53/udp"]), traced);
    assert_eq!(trace(&["dual", CLIENT, "--to", "443"])["vip"], "203.0.113.1");
    let message = failed(&["2001:db8:a::1", CLIENT, "--to", "443"]);
    assert_eq!(
        message,
        "the client's address is IPv4, the virtual IP is 2001:db8:a::1; give both of one family"
    );
    let text = home.run(&["vip", "describe", "dual"]).ok();
    assert!(text.contains("203.0.113.1 of deployment dual, 53/udp, 53/tcp, 443/tcp:"), "{text}");
    assert!(text.contains("\n\n2001:db8:a::1 of deployment dual"), "{text}");
}

#[test]
fn addresses_and_ports_that_are_none_are_wrong_usage() {
    let home = Home::new();
    let trace = |target: &str, client: &str| usage(home.run(&["vip", "trace", target, client]));
    let message = trace("hello", "198.51.100.10");
    assert!(
        message.contains("the port is missing") && message.contains("`198.51.100.10:40000`"),
        "{message}"
    );
    assert!(trace("hello", "2001:db8::1").contains("`[2001:db8::1]:40000`"));
    assert!(trace("hello", "somewhere:80").contains("write an address and a port"));
    assert!(trace("hello", "198.51.100.10:0").contains("no connection comes from port 0"));
    assert!(trace("203.0.113.1:80", CLIENT).contains("without prefix or port"));
    assert!(trace("203.0.113.0/24", CLIENT).contains("without prefix or port"));
    assert!(trace("Hello", CLIENT).contains("lower-case letters"));
    let message = usage(home.run(&["vip", "trace", "hello", CLIENT, "--to", "https"]));
    assert!(message.contains("write a port from 1 to 65535"), "{message}");
    assert!(
        usage(home.run(&["vip", "trace", "hello", CLIENT, "--to", "53/sctp"])).contains("`tcp` or `udp`")
    );
}
