//! What a testbed left behind, looked at independently of the code that removes it: by the tools an operator would use.

use std::process::Command;

use crate::{cleanup, netns};

/// Everything still there that carries the testbed's name; empty when it is gone without a trace.
pub fn leftovers(bed: &str) -> Vec<String> {
    let mut left = Vec::new();
    let state = cleanup::state_dir(bed);
    if state.exists() {
        left.push(format!("folder {}", state.display()));
    }
    let prefix = netns::prefix(bed);
    let state_text = state.to_string_lossy().into_owned();
    let cgroup = format!("anyplace-{bed}");

    let lines = |program: &str, args: &[&str]| -> Vec<String> {
        let output = Command::new(program).args(args).output();
        let text =
            output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    };
    let namespaces = lines("ip", &["netns", "list"]);
    left.extend(
        namespaces.into_iter().filter(|line| line.starts_with(&prefix)).map(|line| format!("netns {line}")),
    );
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let ours = |line: &&str| line.contains(&state_text) || line.contains(&format!("/netns/{prefix}"));
    left.extend(mounts.lines().filter(ours).map(|line| format!("mount {line}")));
    let links = lines("ip", &["-oneline", "link", "show"]);
    let ours = |line: &String| line.contains(&format!(" {prefix}")) || line.contains(" apv");
    left.extend(links.into_iter().filter(ours).map(|line| format!("link {line}")));
    let routes = lines("ip", &["route", "show", "table", "all"]);
    let ours = |line: &String| line.contains(&format!("dev {prefix}")) || line.contains("dev apv");
    left.extend(routes.into_iter().filter(ours).map(|line| format!("route {line}")));
    let folders = lines("find", &["/sys/fs/cgroup", "-type", "d", "-name", &cgroup]);
    left.extend(folders.into_iter().map(|line| format!("cgroup {line}")));
    left.extend(processes(bed, &state_text, &prefix));
    left
}

/// Processes that carry the mark, or that name the testbed's files or namespaces on their command line.
fn processes(bed: &str, state: &str, prefix: &str) -> Vec<String> {
    let mark = format!("ANYPLACE_TESTBED={bed}");
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let read = |file: &str| {
            let bytes = std::fs::read(entry.path().join(file)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let line = read("cmdline").replace('\0', " ");
        let marked = read("environ").split('\0').any(|variable| variable == mark);
        let program = line.split(' ').next().unwrap_or_default();
        // An editor or a shell that somebody opened on a log is theirs, not ours.
        let ours = ["bird", "anyplace", "anyplace-delay-link", "runc", "crun", "runsc"];
        let is_ours = ours.contains(&program.rsplit('/').next().unwrap_or_default());
        if pid != own && (marked || is_ours && (line.contains(&format!("{state}/")) || line.contains(prefix)))
        {
            found.push(format!("process {pid} ({})", line.trim()));
        }
    }
    found
}
