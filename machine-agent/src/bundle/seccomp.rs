//! The system calls that instances may make: a list of what is allowed (`seccomp.json`), and everything else fails
//! with EPERM. It admits what container runtimes commonly admit: what ordinary programs use and what doesn't reach
//! beyond the instance's namespaces.

use anyhow::Context as _;
use serde_json::{Value, json};

const ALLOWED: &str = include_str!("seccomp.json");
/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET: no new namespaces.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;
/// Linux, BSD-like quirks off and on, 32 bit and back, and the question what it is.
const PERSONALITIES: [u64; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
/// Sockets towards the hypervisor, which know no network namespaces.
const AF_VSOCK: u64 = 40;
const EPERM: u64 = 1;
const ENOSYS: u64 = 38;

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
