//! One registry under measurement, and the requests that curl and wrk send to it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};

use super::daemon::{Daemon, free_address};
use super::images::inside;
use super::payload;
use super::sample::settle;
use super::upload::Upload;
use crate::shell;

const USER: &str = "bench:bench-password";

pub(crate) struct Server {
    pub(crate) daemon: Daemon,
    auth: bool,
    data: PathBuf,
}

impl Server {
    /// Ours, as its users run it: with a password, every write synced. `more` is added to its configuration.
    pub(crate) fn anyplace(
        binary: &Path,
        data: &Path,
        namespace: Option<&str>,
        more: &str,
    ) -> Result<Server> {
        let credentials = Server::credentials(data)?;
        let address = free_address()?;
        let listen = listen(address, namespace);
        let config = data.with_extension("toml");
        let text =
            format!("data_dir = {data:?}\nlisten = \"{listen}\"\ncredentials_file = {credentials:?}\n{more}");
        std::fs::write(&config, text)?;
        let args = ["registry", "--config", &config.to_string_lossy()].map(str::to_owned);
        Server::start(&binary.to_string_lossy(), &args, namespace, address, data, true)
    }

    /// The file with our servers' password, which clients use too.
    pub(crate) fn credentials(data: &Path) -> Result<PathBuf> {
        std::fs::create_dir_all(data)?;
        let path = data.join("credentials");
        std::fs::write(&path, format!("{USER}\n"))?;
        Ok(path)
    }

    /// That file of this server.
    pub(crate) fn credentials_path(&self) -> PathBuf {
        self.data.join("credentials")
    }

    /// Debian's, without a password, as its example configuration is.
    pub(crate) fn docker_registry(data: &Path, namespace: Option<&str>) -> Result<Server> {
        std::fs::create_dir_all(data)?;
        let address = free_address()?;
        let listen = listen(address, namespace);
        let config = data.with_extension("yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {data:?}}}, delete: {{enabled: true}}}}\nhttp: {{addr: \"{listen}\"}}\n"
        );
        std::fs::write(&config, text)?;
        let args = ["serve", &config.to_string_lossy()].map(str::to_owned);
        Server::start("docker-registry", &args, namespace, address, data, false)
    }

    fn start(
        program: &str,
        args: &[String],
        namespace: Option<&str>,
        address: SocketAddr,
        data: &Path,
        auth: bool,
    ) -> Result<Server> {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let mut command = match namespace {
            Some(namespace) => inside(namespace, program, &args),
            None => {
                let mut command = Command::new(program);
                command.args(&args);
                command
            }
        };
        command.env("RUST_LOG", "warn");
        let log = data.with_extension("log");
        let daemon = Daemon::start(command, address, namespace, &log)?;
        Ok(Server { daemon, auth, data: data.to_owned() })
    }

    /// Runs something; its seconds and the server's CPU seconds.
    pub(crate) fn timed(&self, act: impl FnOnce() -> Result<()>) -> Result<(f64, f64)> {
        settle();
        let (cpu, begun) = (self.daemon.cpu_s()?, Instant::now());
        act()?;
        Ok((begun.elapsed().as_secs_f64(), self.daemon.cpu_s()? - cpu))
    }

    fn url(&self, path: &str) -> String {
        if path.starts_with("http") {
            path.to_owned()
        } else {
            format!("http://{}{path}", self.daemon.address)
        }
    }

    /// curl, for one path or more at this server.
    pub(crate) fn curl(&self, paths: &[&str]) -> Command {
        let mut curl = Command::new("curl");
        // Without the question whether to go on, which costs a round trip.
        curl.args(["--silent", "--show-error", "--fail", "--header", "Expect:"]);
        if self.auth {
            curl.args(["--user", USER]);
        }
        curl.args(paths.iter().map(|path| self.url(path))).stdin(Stdio::null());
        curl
    }

    /// Pushes a blob in one request.
    pub(crate) fn push(&self, repository: &str, digest: &str, file: &Path) -> Result<()> {
        Upload::connect(self.daemon.address, self.authorization()?)?.whole(repository, digest, file)
    }

    /// Pushes a blob in parts of `size` bytes, the last one shorter.
    pub(crate) fn push_parts(
        &self,
        repository: &str,
        digest: &str,
        parts: &[PathBuf],
        size: u64,
    ) -> Result<()> {
        Upload::connect(self.daemon.address, self.authorization()?)?.parts(repository, digest, parts, size)
    }

    /// What clients say who they are.
    fn authorization(&self) -> Result<Option<String>> {
        if !self.auth {
            return Ok(None);
        }
        let encoded = shell::output(Command::new("base64").arg("-w0").stdin(text(USER)?))?;
        Ok(Some(format!("Basic {encoded}")))
    }

    /// Pulls a blob over some connections at once.
    pub(crate) fn pull(&self, repository: &str, digest: &str, connections: usize) -> Result<()> {
        let readers = (0..connections).map(|_| {
            let mut curl = self.curl(&[&format!("/v2/{repository}/blobs/{digest}")]);
            curl.args(["--output", "/dev/null"]).spawn().context("start curl")
        });
        for mut reader in readers.collect::<Result<Vec<_>>>()? {
            anyhow::ensure!(reader.wait()?.success(), "a reader failed");
        }
        Ok(())
    }

    /// Pushes a small image.
    pub(crate) fn push_manifest(&self, repository: &str, tag: &str) -> Result<()> {
        let config = br#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]}}"#;
        let (digest, file) = (payload::digest(config), self.data.with_extension("config"));
        std::fs::write(&file, config)?;
        self.push(repository, &digest, &file)?;
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{KIND}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":{}}},"layers":[]}}"#,
            config.len()
        );
        let mut curl = self.curl(&[&format!("/v2/{repository}/manifests/{tag}")]);
        curl.args([
            "--request",
            "PUT",
            "--header",
            &format!("Content-Type: {KIND}"),
            "--data-binary",
            &manifest,
        ]);
        shell::output(curl.args(["--output", "/dev/null"])).map(drop)
    }

    /// Requests a second that wrk gets answered.
    pub(crate) fn wrk(&self, path: &str, connections: u32, seconds: u32) -> Result<f64> {
        let mut wrk = Command::new("wrk");
        wrk.args([
            "-t1",
            &format!("-c{connections}"),
            &format!("-d{seconds}s"),
            "-H",
            &format!("Accept: {KIND}"),
        ]);
        if let Some(authorization) = self.authorization()? {
            wrk.args(["-H", &format!("Authorization: {authorization}")]);
        }
        let output = shell::output(wrk.arg(self.url(path)))?;
        anyhow::ensure!(!output.contains("Non-2xx"), "wrk got refusals: {output}");
        let rate =
            output.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:")?.trim().parse().ok());
        rate.with_context(|| format!("wrk printed no rate: {output}"))
    }
}

const KIND: &str = "application/vnd.oci.image.manifest.v1+json";

impl Drop for Server {
    fn drop(&mut self) {
        // The next run starts with an empty disk; the folder as a whole goes with the run.
        let _ = std::fs::remove_dir_all(&self.data);
    }
}

/// All addresses inside a namespace of its own, else loopback.
fn listen(address: SocketAddr, namespace: Option<&str>) -> String {
    if namespace.is_some() { format!("0.0.0.0:{}", address.port()) } else { address.to_string() }
}

/// Text as a program's standard input.
fn text(text: &str) -> Result<Stdio> {
    use std::io::Write as _;
    let (read, mut write) = std::io::pipe()?;
    write.write_all(text.as_bytes())?;
    Ok(read.into())
}
