//! `registry account|team|audit` against the real registry: what an operator does, and what its accounts can do then.

use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::{happy::Registry, runner::Home};

#[test]
fn a_machines_robot_is_made_used_and_ended_by_commands_alone() {
    let (home, registry) = Registry::with_an_image();
    let file = home.path().join("ams-1.credentials");
    let path = file.to_string_lossy().into_owned();
    let account = ["registry", "account", "set", "ams-1", "--grant", "**:pull", "--ttl", "30d"];
    let ran = home.run(&[&account[..], &["--out", &path]].concat());
    assert!(ran.code == 0 && ran.out.is_empty(), "{ran:?}");
    assert!(ran.err.contains("credentials of ams-1 written to"), "{ran:?}");
    let text = std::fs::read_to_string(&file).unwrap();
    let secret = text.trim_end().strip_prefix("ams-1:").unwrap();
    assert!(secret.len() == 48 && !ran.err.contains(secret), "{ran:?}");
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let table = home.run(&["registry", "account", "ls"]).ok();
    assert!(table.contains("NAME    TEAM   GRANTS") && table.contains("ams-1   -      **:pull"), "{table}");
    assert!(!table.contains(secret));

    // It pulls, and can do nothing else: the scope of a machine.
    let as_robot =
        |args: &[&str]| home.run(&[args, &["--registry-credentials-file", path.as_str()]].concat());
    as_robot(&["registry", "tags", "team/hello"]).ok();
    let message = as_robot(&["registry", "account", "ls"]).failed();
    assert!(message.contains("account `ams-1` may not operate the registry"), "{message}");
    let mine = home.path().join("mine");
    std::fs::create_dir(&mine).unwrap();
    std::fs::write(mine.join("file"), "mine").unwrap();
    let push = ["push", &mine.to_string_lossy(), "team/mine:v1", "--registry", &registry.url];
    let message = as_robot(&push).failed();
    assert!(
        message.contains("refused access to `team/mine` (403): account `ams-1` may not push"),
        "{message}"
    );

    // Set again it keeps its secret, which nobody can show.
    let ran = home.run(&account);
    assert!(
        ran.err.contains("account ams-1 is set, good until") && ran.err.contains("keeps its secret"),
        "{ran:?}"
    );
    assert_eq!(ran.ok(), "");
    as_robot(&["registry", "tags", "team/hello"]).ok();
    let message = home.run(&[&account[..], &["--out", &path]].concat()).failed();
    assert!(message.contains("keeps its secret") && message.contains("add --new-secret"), "{message}");
    // A new secret ends the old one; without a file it is the only thing on standard output.
    let ran = home.run(&[&account[..], &["--new-secret"]].concat());
    assert!(ran.err.contains("shown only this once"), "{ran:?}");
    let new = ran.ok();
    assert!(new.trim_end().len() == 48 && new.trim_end() != secret, "{new}");
    let message = as_robot(&["registry", "tags", "team/hello"]).failed();
    assert!(message.contains("no user or account has this name and password"), "{message}");
    let file = home.file("again", &format!("ams-1:{new}"));
    home.run(&["registry", "tags", "team/hello", "--registry-credentials-file", &file]).ok();
    let ran = home.run(&["registry", "account", "rm", "ams-1"]);
    assert!(ran.code == 0 && ran.err.contains("account ams-1 removed"), "{ran:?}");
    home.run(&["registry", "tags", "team/hello", "--registry-credentials-file", &file]).failed();
    let message = home.run(&["registry", "account", "rm", "ams-1"]).failed();
    assert!(message.contains("no account `ams-1`; `anyplace registry account ls`"), "{message}");
    assert!(home.run(&["registry", "account", "ls"]).err.contains("registry account set NAME --grant"));
}

#[test]
fn teams_bound_what_their_accounts_do() {
    let (home, _registry) = Registry::with_an_image();
    let account = ["registry", "account", "set", "ana", "--grant", "vision/**:pull,push", "--team", "vision"];
    let message = home.run(&account).failed();
    assert!(
        message.contains("team: there is no team `vision`; make it with `anyplace registry team set`"),
        "{message}"
    );
    let team = ["registry", "team", "set", "vision", "--repository", "team/**", "--quota", "1Gi"];
    home.run(&[&team[..], &["--rate", "500"]].concat()).ok();
    let made = home.json(&account);
    assert_eq!((&made["team"], made["secret"].as_str().unwrap().len()), (&"vision".into(), 48));
    assert!(home.json(&["registry", "account", "ls"])[0].get("secret").is_none());

    let teams = home.json(&["registry", "team", "ls"]);
    assert_eq!((&teams[0]["quota_bytes"], &teams[0]["requests_per_s"]), (&(1u64 << 30).into(), &500.into()));
    assert!(teams[0]["used_bytes"].as_u64().unwrap() > 500, "{teams}");
    let table = home.run(&["registry", "team", "ls"]).ok();
    assert!(table.contains("vision   team/**") && table.contains("1Gi     500"), "{table}");
    let message = home.run(&["registry", "team", "rm", "vision"]).failed();
    assert!(message.contains("team: `vision` has accounts; remove them"), "{message}");
    home.run(&["registry", "account", "rm", "ana"]).ok();
    home.run(&["registry", "team", "rm", "vision"]).ok();
    let message = home.run(&["registry", "team", "rm", "vision"]).failed();
    assert!(message.contains("`anyplace registry team ls` lists them"), "{message}");
}

#[test]
fn the_record_says_who_did_what_where_and_since_when() {
    let (home, registry) = Registry::with_an_image();
    registry.push(&home, "other/app:v2").ok();
    home.run(&["registry", "team", "set", "other"]).ok();
    let subjects = |args: &[&str]| -> Vec<(String, String)> {
        let events = home.json(&[&["registry", "audit"], args].concat());
        let text = |it: &Value, key: &str| it[key].as_str().unwrap().to_owned();
        events.as_array().unwrap().iter().map(|it| (text(it, "action"), text(it, "subject"))).collect()
    };
    let all = subjects(&[]);
    assert_eq!(all.last().unwrap(), &("set-team".into(), "other".into()));
    assert_eq!(subjects(&["--since", "1h"]), all);
    assert_eq!(subjects(&["--tail", "1"]), all[all.len() - 1..]);
    assert_eq!(subjects(&["--since", "2999-01-01T00:00:00Z"]), []);
    let of = subjects(&["--repository", "other/**"]);
    assert!(of.contains(&("push-manifest".into(), "other/app".into())), "{of:?}");
    assert!(of.iter().all(|(_, subject)| subject == "other/app"), "{of:?}");
    // A team of that name is no repository.
    assert_eq!(subjects(&["--repository", "other"]), []);
    let ran = home.run(&["registry", "audit", "--tail", "1"]);
    assert!(ran.err.contains("there may be more, see --tail"), "{ran:?}");
    let table = ran.ok();
    assert!(table.starts_with("AT ") && table.contains("anyplace   -      set-team"), "{table}");
}

#[test]
fn wrong_arguments_are_named_before_anything_is_asked() {
    let home = Home::new();
    for (args, said) in [
        (&["account", "set", "ana"][..], "--grant"),
        (&["account", "set", "Ana", "--grant", "**:pull"], "`Ana` is no name; expected 1 to 64 of a-z"),
        (&["account", "set", "ana", "--grant", "vision:write"], "expected REPOSITORIES:ACTIONS, such as"),
        (&["account", "rm", "../gc"], "`../gc` is no name"),
        (&["team", "set", "a", "--quota", "1Gi"], "--repository"),
        (&["audit", "--since", "yesterday"], "expected a duration such as 30m"),
        (&["audit", "--tail", "10001"], "expected 1 to 10000"),
    ] {
        let ran = home.run(&[&["registry"], args].concat());
        assert!(ran.code == 2 && ran.err.contains(said), "{args:?} {ran:?}");
    }
}
