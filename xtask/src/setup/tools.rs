//! Programs that tests run and Debian doesn't have: in `target/tools`, each in a folder of its own.
//!
//! A folder's file `installed` says what was installed, and is written last. What is there of another version, or half, is
//! removed and installed anew.

use std::path::Path;

use anyhow::{Context, Result};

use crate::shell;

/// Which tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Those that every run of the tests needs.
    Usual,
    /// Those that take minutes to build as well.
    All,
}

struct Tool {
    name: &'static str,
    purpose: &'static str,
    /// What is installed; another one replaces it.
    version: &'static str,
    needed: Which,
    install: fn(&Path, &str) -> Result<()>,
}

const TOOLS: &[Tool] = &[
    Tool {
        name: "moto",
        purpose: "the registry's tests on another S3 server",
        version: include_str!("moto.txt"),
        needed: Which::Usual,
        install: with_pip,
    },
    Tool {
        name: "azurite",
        purpose: "the registry's tests on Azure",
        // The last one that runs on Debian 12's node.
        version: "azurite@3.35.0",
        needed: Which::Usual,
        install: with_npm,
    },
    // Extracted rather than installed: the package would start a server.
    Tool {
        name: "etcd-3.4",
        purpose: "the store's tests on etcd",
        version: "bookworm/etcd-server",
        needed: Which::Usual,
        install: with_apt,
    },
    Tool {
        name: "etcd-3.5",
        purpose: "the store's tests on a newer etcd",
        version: "trixie/etcd-server",
        needed: Which::Usual,
        install: with_apt,
    },
    Tool {
        name: "garage",
        purpose: "the registry's tests on a cluster that loses nodes; its build takes minutes",
        version: "garage@2.5.0",
        needed: Which::All,
        install: with_cargo,
    },
];

/// Installs what is missing; says what it does.
pub(crate) fn ensure(which: Which) -> Result<()> {
    let wanted = TOOLS.iter().filter(|tool| which == Which::All || tool.needed == Which::Usual);
    for tool in wanted {
        let folder = shell::root()?.join("target/tools").join(tool.name);
        let installed = folder.join("installed");
        if std::fs::read_to_string(&installed).is_ok_and(|version| version == tool.version) {
            continue;
        }
        println!("{}: missing; it is for {}, and goes to {}", tool.name, tool.purpose, folder.display());
        if folder.exists() {
            std::fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
        }
        std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
        (tool.install)(&folder, tool.version).with_context(|| format!("install {}", tool.name))?;
        std::fs::write(&installed, tool.version).with_context(|| format!("write {}", installed.display()))?;
    }
    println!("tools: all that are needed are in target/tools");
    Ok(())
}

/// A package of one version, with what it needs, and without running anything of it.
fn with_npm(folder: &Path, package: &str) -> Result<()> {
    let at = folder.to_string_lossy();
    let quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"];
    let words = [&["install", "--prefix", &at], quiet.as_slice(), &[package]].concat();
    shell::show(shell::command("npm", &words)?)
}

/// The files of a Debian package, of a release that needn't be this machine's.
fn with_apt(folder: &Path, from: &str) -> Result<()> {
    let (release, package) = from.split_once('/').context("a tool's version has no release")?;
    let apt = folder.join("apt");
    let (lists, sources) = (apt.join("lists"), apt.join("sources.list"));
    std::fs::create_dir_all(lists.join("partial")).with_context(|| format!("make {}", lists.display()))?;
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let line = format!("deb [signed-by={keyring}] http://deb.debian.org/debian {release} main\n");
    std::fs::write(&sources, line).with_context(|| format!("write {}", sources.display()))?;
    let options = [
        format!("Dir::Etc::SourceList={}", sources.display()),
        "Dir::Etc::SourceParts=/dev/null".to_owned(),
        format!("Dir::State::Lists={}", lists.display()),
        "Dir::Cache::pkgcache=".to_owned(),
        "Dir::Cache::srcpkgcache=".to_owned(),
        "Acquire::Languages=none".to_owned(),
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        // So that nobody else need be able to write here.
        "APT::Sandbox::User=root".to_owned(),
    ];
    for words in [["update", "--quiet"], ["download", package]] {
        let options = options.iter().flat_map(|option| ["-o", option]);
        let words: Vec<_> = options.chain(words).collect();
        let mut command = shell::command("apt-get", &words)?;
        command.current_dir(&apt);
        shell::show(command)?;
    }
    let found = std::fs::read_dir(&apt).with_context(|| format!("read {}", apt.display()))?;
    let package = found
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get left no package in {}", apt.display()))?;
    let words = ["--extract", &package.to_string_lossy(), &folder.to_string_lossy()];
    shell::show(shell::command("dpkg-deb", &words)?)?;
    std::fs::remove_dir_all(&apt).with_context(|| format!("remove {}", apt.display()))
}

/// A program of one version, with the dependencies that it was published with; quickly rather than optimised.
fn with_cargo(folder: &Path, package: &str) -> Result<()> {
    let (at, build) = (folder.to_string_lossy(), folder.join("build"));
    let kept_small = ["--locked", "--no-default-features", "--features", "bundled-libs,lmdb"];
    let target = build.to_string_lossy();
    let words =
        [&["install", package, "--root", &at, "--target-dir", &target], kept_small.as_slice()].concat();
    let mut command = shell::cargo(&words)?;
    for (name, value) in [("OPT_LEVEL", "1"), ("LTO", "off"), ("CODEGEN_UNITS", "16"), ("DEBUG", "false")] {
        command.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
    }
    shell::show(command)?;
    std::fs::remove_dir_all(&build).with_context(|| format!("remove {}", build.display()))
}

/// Python packages, each of one version.
fn with_pip(folder: &Path, requirements: &str) -> Result<()> {
    let file = folder.join("requirements.txt");
    std::fs::write(&file, requirements).with_context(|| format!("write {}", file.display()))?;
    let (at, file) = (folder.to_string_lossy(), file.to_string_lossy());
    shell::show(shell::command("python3", &["-m", "venv", &at])?)?;
    let pip = folder.join("bin/pip");
    let words = ["install", "--quiet", "--disable-pip-version-check", "--requirement", &file];
    shell::show(shell::command(&pip.to_string_lossy(), &words)?)
}
