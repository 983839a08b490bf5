//! The system calls that instances may make: a list of what is allowed (`seccomp.json`), and everything else fails
//! with EPERM. It admits what container runtimes commonly admit: what ordinary programs use and what doesn't reach
//! beyond the instance's namespaces.
//!
//! A runtime compiles the list for each container anew, which takes crun longer than all the rest. So the filter that it
//! made for the first container is kept ([`Compiled`]), and the next ones are started with it.

use std::{fs, path::Path, sync::OnceLock};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

/// crun's annotation for a filter as the kernel takes it, in base64; it then ignores the profile beside it.
pub(super) const ANNOTATION: &str = "run.oci.seccomp_bpf_data";
/// Of one instruction of a filter (`struct sock_filter`), and the most instructions that the kernel takes.
const INSTRUCTION_BYTES: usize = 8;
const MAX_INSTRUCTIONS: usize = 4_096;

const ALLOWED: &str = include_str!("seccomp.json");
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET: no new namespaces.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;
/// Linux, BSD-like quirks off and on, 32 bit and back, and the question what it is.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// Sockets towards the hypervisor, which know no network namespaces.
const AF_VSOCK: u64 = 40;
const EPERM: u64 = 1;
const ENOSYS: u64 = 38;

/// The profile as crun compiled it; kept as long as the agent runs, so that another version of crun makes its own.
#[derive(Debug, Default)]
pub(crate) struct Compiled(OnceLock<String>);

impl Compiled {
    pub(crate) fn get(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }

    /// Takes over the filter that a container was started with, where one was kept.
    pub(crate) fn learn(&self, file: &Path) {
        let Ok(filter) = fs::read(file) else { return };
        let instructions = filter.len() / INSTRUCTION_BYTES;
        let whole = filter.len().is_multiple_of(INSTRUCTION_BYTES);
        if whole && (1..=MAX_INSTRUCTIONS).contains(&instructions) {
            self.0.get_or_init(|| STANDARD.encode(&filter));
        } else {
            tracing::warn!(file = %file.display(), bytes = filter.len(), "this is no seccomp filter");
        }
    }
}

/// The profile, in the form of the OCI runtime specification.
pub(super) fn profile() -> anyhow::Result<Value> {
    let allowed: Vec<String> = serde_json::from_str(ALLOWED).context("seccomp.json is damaged")?;
    let mut calls = vec![
        json!({"names": allowed, "action": "SCMP_ACT_ALLOW"}),
        json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
        ]}),
        // Its flags are behind a pointer; with ENOSYS libraries fall back to `clone`.
        json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}),
        json!({"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE"}
        ]}),
    ];
    calls.extend(PERSONALITIES.map(|personality| {
        json!({"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": personality, "op": "SCMP_CMP_EQ"}
        ]})
    }));
    let architectures = match std::env::consts::ARCH {
        "aarch64" => json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
        _ => json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
    };
    Ok(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": architectures,
        "syscalls": calls,
    }))
}
