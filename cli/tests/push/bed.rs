//! A registry, trees to pack, and random numbers that can be had again.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyplace_images::{Client, Credentials};
use anyplace_seed::Seed;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::runner::Home;

/// A registry that runs in this process, until this value goes.
pub(crate) struct Registry {
    pub(crate) host: String,
    pub(crate) credentials_file: PathBuf,
    _data: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let runtime = runtime();
        let data = tempfile::tempdir().unwrap();
        let config = data.path().join("registry.toml");
        let text = format!("data_dir = '{}'\nlisten = '127.0.0.1:0'\n", data.path().join("data").display());
        std::fs::write(&config, text).unwrap();
        let config = anyplace_service::load_config(&config).unwrap();
        anyplace_service::install_crypto_provider();
        let server = runtime.block_on(anyplace_registry::Server::bind(config)).unwrap();
        let host = server.local_addr().unwrap().to_string();
        runtime.spawn(server.serve(CancellationToken::new()));
        Self { host, credentials_file: data.path().join("data/credentials"), _data: data, _runtime: runtime }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.host)
    }

    pub(crate) fn credentials(&self) -> Credentials {
        Credentials::from_file(&self.credentials_file).unwrap()
    }

    /// `user:password`.
    pub(crate) fn login(&self) -> String {
        let Credentials { user, password } = self.credentials();
        format!("{user}:{password}")
    }

    /// A client whose requests go to `url`.
    pub(crate) fn client_at(&self, url: &str) -> Client {
        Client::new(url, Some(self.credentials())).unwrap()
    }

    pub(crate) fn client(&self) -> Client {
        self.client_at(&self.url())
    }

    /// The command with its variables set, talking to `url`.
    pub(crate) fn command(&self, home: &Home, url: &str, args: &[&str]) -> Command {
        let mut command = home.command(args);
        command
            .env("ANYPLACE_REGISTRY", url)
            .env("ANYPLACE_REGISTRY_CREDENTIALS_FILE", &self.credentials_file)
            .env("HOME", home.path())
            .env("XDG_RUNTIME_DIR", home.path());
        command
    }
}

/// A runtime for a test's own requests.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// A root file system with a large file of noise, a small one and some links.
pub(crate) fn tree(root: &Path, seed: &mut Seed, len: usize) {
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::create_dir_all(root.join("etc/app")).unwrap();
    std::fs::write(root.join("bin/data"), seed.bytes(len)).unwrap();
    std::fs::write(root.join("etc/app/config"), "key = value\n".repeat(500)).unwrap();
    std::fs::hard_link(root.join("etc/app/config"), root.join("etc/app/same")).unwrap();
    std::os::unix::fs::symlink("app/config", root.join("etc/link")).unwrap();
}

/// Where a program is missing the test fails in CI, and is skipped with a reason elsewhere.
pub(crate) fn has(programs: &[&str]) -> bool {
    for program in programs {
        let found = std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()));
        let must = std::env::var_os("CI").is_some() || nix::unistd::geteuid().is_root();
        assert!(found || !must, "this test needs {program}; run `cargo xtask setup`");
        if !found || !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: needs root and {program}");
            return false;
        }
    }
    true
}
