//! Builds the eBPF object from `ebpf/programs`, and checks the committed one.
//!
//! `cargo build` needs no eBPF compiler: the object is committed with a manifest. [`build`] makes both anew.
//! [`check`] rebuilds into a folder of its own, where the compiler is there, and compares.
//!
//! The compiler is Debian's `rustc-web` with `libstd-rust-web-dev-bpf` (a prebuilt `core` for bpfel-unknown-none, so
//! neither nightly nor rust-src), and bpf-linker from crates.io on Debian's libLLVM. The packages conflict with other
//! Rust installations, so they are unpacked into a cache folder and never installed:
//! `$XDG_CACHE_HOME/anyplace/ebpf-toolchain`, or `~/.cache/...`. [`install`] downloads 100 MB and takes a minute on two
//! cores; [`check`] doesn't call it by itself.
//!
//! The same sources give the same bytes only at the same path: debug information (which becomes BTF) names files, and
//! remapping doesn't reach all of it. So every build happens in [`BUILD`], with vendored dependencies inside.

#[path = "../../ebpf/loader/sources.rs"]
mod sources;

use std::{
    collections::BTreeSet,
    env, fs,
    io::Write as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};

/// Where sources are copied to and built. Part of the object's bytes: a change changes every object.
const BUILD: &str = "/var/tmp/anyplace-ebpf-build";
const LINKER_VERSION: &str = "0.13.0";
const TARGET: &str = "bpfel-unknown-none";
const RUSTFLAGS: [&str; 8] = [
    "-C",
    "link-arg=--btf",
    "--cfg",
    "bpf_target_arch=\"x86_64\"",
    "-C",
    "target-cpu=v3",
    "-C",
    "debuginfo=2",
];
const OBJECT: &str = "ebpf/loader/anyplace.bpf.o";
const MANIFEST: &str = "ebpf/loader/manifest.json";

/// What [`check`] did.
#[derive(Debug)]
pub(crate) enum CheckOutcome {
    /// The sources were compiled; run the packet tests with `ANYPLACE_BPF_OBJECT` set to `object`.
    Rebuilt {
        /// The fresh object.
        object: PathBuf,
        /// For the user: by which compiler, and whether the bytes were compared with the committed ones. They are not
        /// when this machine's compiler is another version than the manifest records.
        note: String,
    },
    /// There is no compiler on this machine.
    Skipped {
        /// Why, and what to do.
        reason: String,
    },
}

/// Rebuilds the committed object and its manifest, installing the compiler first if it is missing.
pub(crate) fn build(root: &Path) -> Result<()> {
    let toolchain = match Toolchain::find()? {
        Some(toolchain) => toolchain,
        None => install()?,
    };
    let object = toolchain.compile(root, true)?;
    let bytes = fs::read(&object)?;
    let manifest = format!(
        "{{\n  \"sources_sha256\": \"{}\",\n  \"object_sha256\": \"{}\",\n  \"compiler\": \"{}\",\n  \
         \"linker\": \"{}\",\n  \"target\": \"{TARGET}\",\n  \"flags\": \"{}\",\n  \"path\": \"{BUILD}\"\n}}\n",
        sha256(&sources::canonical(&root.join("ebpf"))?)?,
        sha256(&bytes)?,
        toolchain.compiler,
        toolchain.linker,
        RUSTFLAGS.join(" ").replace('"', "'"),
    );
    fs::write(root.join(OBJECT), bytes).with_context(|| format!("writing {OBJECT}"))?;
    fs::write(root.join(MANIFEST), manifest).with_context(|| format!("writing {MANIFEST}"))?;
    eprintln!("built {OBJECT} with {}", toolchain.compiler);
    Ok(())
}

/// Compiles the sources and compares the result with the committed object. Fails if the same compiler gives other
/// bytes, or if the sources don't compile.
pub(crate) fn check(root: &Path) -> Result<CheckOutcome> {
    let Some(toolchain) = Toolchain::find()? else {
        let reason = "no eBPF compiler in the cache: `cargo xtask ebpf` installs one (about a minute)".into();
        return Ok(CheckOutcome::Skipped { reason });
    };
    let manifest = fs::read_to_string(root.join(MANIFEST)).with_context(|| format!("reading {MANIFEST}"))?;
    let recorded =
        |name| sources::field(&manifest, name).with_context(|| format!("{MANIFEST} has no {name}"));
    let object = toolchain.compile(root, false)?;
    let (compiler, linker) = (recorded("compiler")?, recorded("linker")?);
    if (compiler, linker) != (&toolchain.compiler, &toolchain.linker) {
        let note = format!(
            "rebuilt with {} and {}; bytes not compared, the committed object is {compiler}'s and {linker}'s",
            toolchain.compiler, toolchain.linker
        );
        return Ok(CheckOutcome::Rebuilt { object, note });
    }
    let found = sha256(&fs::read(&object)?)?;
    let expected = recorded("object_sha256")?;
    ensure!(
        found == expected,
        "the rebuilt eBPF object {} has sha256 {found}, the committed one {expected}: run `cargo xtask ebpf` and \
         commit the result",
        object.display()
    );
    let note = format!("rebuilt with {}: the same bytes as committed", toolchain.compiler);
    Ok(CheckOutcome::Rebuilt { object, note })
}

/// Downloads the compiler's packages, unpacks them into the cache folder, and builds the linker.
pub(crate) fn install() -> Result<Toolchain> {
    let cache = cache()?;
    let packages = cache.join("packages");
    fs::create_dir_all(&packages).with_context(|| format!("creating {}", packages.display()))?;
    eprintln!("installing the eBPF compiler into {}", cache.display());

    // Follow the packages' own dependencies, since their names carry versions; what the system has is left alone.
    let mut wanted: Vec<String> = ["rustc-web", "libstd-rust-web-dev-bpf"].map(String::from).to_vec();
    let mut seen = BTreeSet::new();
    let mut llvm = None;
    while let Some(package) = wanted.pop() {
        let rust = package.contains("rust");
        let number = package.strip_prefix("libllvm").and_then(|rest| rest.parse::<u32>().ok());
        llvm = llvm.max(number);
        if !seen.insert(package.clone()) || (!rust && number.is_none() && is_installed(&package)?) {
            continue;
        }
        let file = download(&packages, &package)?;
        run(Command::new("dpkg").arg("-x").arg(&file).arg(cache.join("root")))?;
        let depends = output(Command::new("dpkg").arg("-f").arg(&file).arg("Depends"))?;
        fs::remove_file(&file)?;
        let names = depends.split(',').filter_map(|item| item.split(['|', '(', ':']).next());
        // Shared libraries and Rust's own parts; not the C development packages, which the build has anyway.
        let needed =
            |name: &&str| name.starts_with("lib") && (name.contains("rust") || !name.ends_with("-dev"));
        wanted.extend(names.map(str::trim).filter(needed).map(String::from));
    }
    let llvm = llvm.context("rustc-web depends on no libllvmNN package: its packaging has changed")?;

    // bpf-linker looks for PREFIX/lib/libLLVM.so.
    let prefix = cache.join("llvm");
    fs::create_dir_all(prefix.join("lib"))?;
    let library = find_library(&cache.join("root"), &format!("libLLVM.so.{llvm}"))?;
    let link = prefix.join("lib/libLLVM.so");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&library, &link).with_context(|| format!("linking {}", link.display()))?;
    eprintln!("building bpf-linker {LINKER_VERSION} on LLVM {llvm}");
    let feature = format!("llvm-{llvm}");
    run(cargo()
        .args(["install", "--quiet", "--locked", "--force", "--no-default-features", "--features", &feature])
        .args(["bpf-linker", "--version", LINKER_VERSION, "--root"])
        .arg(&cache)
        .env("LLVM_PREFIX", &prefix)
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_TARGET_DIR", cache.join("linker-build")))?;
    fs::remove_dir_all(cache.join("linker-build"))?;
    Toolchain::find()?.context("the eBPF compiler is installed but doesn't answer")
}

/// An installed compiler.
pub(crate) struct Toolchain {
    cache: PathBuf,
    /// What the compiler says of itself.
    compiler: String,
    /// What the linker says of itself.
    linker: String,
}

impl Toolchain {
    /// The compiler in the cache folder, if both of its parts run.
    fn find() -> Result<Option<Self>> {
        let mut found = Self { cache: cache()?, compiler: String::new(), linker: String::new() };
        if !found.rustc().exists() || !found.cache.join("bin/bpf-linker").exists() {
            return Ok(None);
        }
        found.compiler = output(found.environment(&mut Command::new(found.rustc())).arg("--version"))?;
        found.linker = output(found.environment(&mut Command::new("bpf-linker")).arg("--version"))?;
        Ok(Some(found))
    }

    fn rustc(&self) -> PathBuf {
        self.cache.join("root/usr/bin/rustc")
    }

    fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let mut path = self.cache.join("bin").into_os_string();
        path.push(":");
        path.push(env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path).env("LD_LIBRARY_PATH", self.cache.join("root/usr/lib").join(multiarch()))
    }

    /// Compiles `root`'s programs and returns the object's path. `may_lock`: the dependencies' lock file may be
    /// written (by `cargo xtask ebpf`); else it must fit.
    fn compile(&self, root: &Path, may_lock: bool) -> Result<PathBuf> {
        let build = Path::new(BUILD);
        private_folder(build)?;
        // Two builds at once, of two clones perhaps, would mix their files.
        let lock = fs::File::create(build.join("lock")).with_context(|| format!("creating {BUILD}/lock"))?;
        lock.lock().with_context(|| format!("locking {BUILD}/lock"))?;
        for folder in ["common", "programs"] {
            let _ = fs::remove_dir_all(build.join(folder));
            fs::create_dir_all(build.join(folder).join("src"))?;
        }
        let ebpf = root.join("ebpf");
        let lock_file = ebpf.join("programs/Cargo.lock");
        for file in sources::files(&ebpf)? {
            if ebpf.join(&file) != lock_file || lock_file.exists() {
                fs::copy(ebpf.join(&file), build.join(&file))
                    .with_context(|| format!("copying {}", file.display()))?;
            }
        }
        let programs = build.join("programs");
        let mut vendor = cargo();
        vendor.current_dir(&programs).args(["vendor", "--quiet", "--versioned-dirs"]);
        if !may_lock {
            vendor.arg("--locked");
        }
        run(vendor.arg("../vendor").stdout(Stdio::null()))?;
        if may_lock {
            fs::copy(programs.join("Cargo.lock"), &lock_file)?;
        }
        let flags = RUSTFLAGS.join("\x1f");
        let mut command = cargo();
        self.environment(&mut command)
            .current_dir(&programs)
            .env("RUSTC", self.rustc())
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags)
            .env("CARGO_TARGET_DIR", build.join("target"))
            .args(["build", "--quiet", "--release", "--frozen", "--target", TARGET])
            .args(["--config", "source.crates-io.replace-with='vendored'"])
            .args(["--config", &format!("source.vendored.directory='{BUILD}/vendor'")]);
        run(&mut command)?;
        let built = build.join("target").join(TARGET).join("release/anyplace");
        // Out of the way of the next build, and named for what it was built from.
        let kept = root.join("target/ebpf/anyplace.bpf.o");
        fs::create_dir_all(root.join("target/ebpf"))?;
        fs::copy(&built, &kept).with_context(|| format!("copying {}", built.display()))?;
        Ok(kept)
    }
}

/// Cargo without what an outer cargo left in the environment, which would change the build.
fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "RUSTC",
        "RUSTC_WRAPPER",
        "RUSTUP_TOOLCHAIN",
    ] {
        command.env_remove(name);
    }
    command
}

fn cache() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?)
            .join(".cache"),
    };
    Ok(base.join("anyplace/ebpf-toolchain"))
}

/// Makes the build folder, and refuses one that somebody else made under the well-known name.
fn private_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let found = fs::symlink_metadata(folder)?;
    let me = fs::metadata("/proc/self")?.uid();
    ensure!(
        found.is_dir() && found.uid() == me,
        "{} belongs to user {}, not to you ({me}): remove it first",
        folder.display(),
        found.uid()
    );
    Ok(())
}

fn multiarch() -> String {
    format!("{}-linux-gnu", env::consts::ARCH)
}

fn find_library(root: &Path, prefix: &str) -> Result<PathBuf> {
    let folder = root.join("usr/lib").join(multiarch());
    for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            return Ok(entry.path());
        }
    }
    bail!("{} has no {prefix}*", folder.display())
}

fn is_installed(package: &str) -> Result<bool> {
    let status = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .context("running dpkg-query: the eBPF compiler comes from Debian's packages")?;
    Ok(status.stdout == b"installed")
}

/// Downloads a package without installing it.
fn download(folder: &Path, package: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(folder)? {
        fs::remove_file(entry?.path())?;
    }
    let status = Command::new("apt-get")
        .args(["download", "-qq", package])
        .current_dir(folder)
        .stderr(Stdio::null())
        .status();
    let status = status.context("running apt-get: the eBPF compiler comes from Debian's packages")?;
    ensure!(
        status.success(),
        "apt-get download {package} failed: run `apt-get update`, then `cargo xtask ebpf` again"
    );
    let entry =
        fs::read_dir(folder)?.next().with_context(|| format!("apt-get left no file for {package}"))?;
    Ok(entry?.path())
}

/// By coreutils, so that xtask depends on no hash crate; a few hundred kilobytes.
fn sha256(bytes: &[u8]) -> Result<String> {
    let mut child = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("sha256sum")?;
    // It answers only after the end of its input, so writing all of it first can't deadlock.
    child.stdin.take().context("sha256sum's input")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    text.split_whitespace().next().map(String::from).context("sha256sum printed nothing")
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("running {command:?}"))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("running {command:?}"))?;
    ensure!(output.status.success(), "{command:?} ended with {}", output.status);
    Ok(String::from_utf8(output.stdout)?.trim().to_string())
}
