//! Uploads of blobs over one connection, as registries' clients do it: the kernel sends the files, so that what is
//! measured is the server.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Longer answers than this are no answers to an upload.
const ANSWER_BYTES_MAX: u64 = 64 << 10;

/// A connection to a registry.
pub(crate) struct Upload {
    stream: BufReader<TcpStream>,
    address: SocketAddr,
    authorization: Option<String>,
}

impl Upload {
    pub(crate) fn connect(address: SocketAddr, authorization: Option<String>) -> Result<Upload> {
        let stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Upload { stream: BufReader::new(stream), address, authorization })
    }

    /// Pushes a blob in one request.
    pub(crate) fn whole(&mut self, repository: &str, digest: &str, file: &Path) -> Result<()> {
        let at = self.begin(repository)?;
        self.request("PUT", &with_digest(&at, digest), None, Some(file)).map(drop)
    }

    /// Pushes a blob in parts of `size` bytes, the last one shorter.
    pub(crate) fn parts(
        &mut self,
        repository: &str,
        digest: &str,
        parts: &[PathBuf],
        size: u64,
    ) -> Result<()> {
        let mut at = self.begin(repository)?;
        for (number, part) in parts.iter().enumerate() {
            let (first, length) = (number as u64 * size, std::fs::metadata(part)?.len());
            let range = format!("{first}-{}", first + length - 1);
            at = self.request("PATCH", &at, Some(&range), Some(part))?.context("a part's Location")?;
        }
        self.request("PUT", &with_digest(&at, digest), None, None).map(drop)
    }

    /// Starts an upload; where it goes on.
    fn begin(&mut self, repository: &str) -> Result<String> {
        let path = format!("/v2/{repository}/blobs/uploads/");
        self.request("POST", &path, None, None)?.context("the upload's Location")
    }

    /// One request; the answer's Location, as a path.
    fn request(
        &mut self,
        method: &str,
        path: &str,
        range: Option<&str>,
        body: Option<&Path>,
    ) -> Result<Option<String>> {
        let mut body = body.map(File::open).transpose().context("open the content")?;
        let length = body.as_ref().map_or(Ok(0), |file| file.metadata().map(|it| it.len()))?;
        let mut head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/octet-stream\r\nContent-Length: {length}\r\n",
            self.address
        );
        if let Some(authorization) = &self.authorization {
            head += &format!("Authorization: {authorization}\r\n");
        }
        if let Some(range) = range {
            head += &format!("Content-Range: {range}\r\n");
        }
        let stream = self.stream.get_mut();
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        if let Some(file) = &mut body {
            // sendfile.
            std::io::copy(file, stream).with_context(|| format!("send to {path}"))?;
        }
        self.answer().with_context(|| format!("{method} {path}"))
    }

    fn answer(&mut self) -> Result<Option<String>> {
        let status = self.line()?;
        let (mut location, mut length) = (None, 0);
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            let value = value.trim();
            match name.to_ascii_lowercase().as_str() {
                "location" => location = Some(path_of(value).to_owned()),
                "content-length" => length = value.parse().context("Content-Length")?,
                _ => {}
            }
        }
        anyhow::ensure!(length <= ANSWER_BYTES_MAX, "an answer of {length} bytes");
        let mut text = vec![0; length as usize];
        self.stream.read_exact(&mut text)?;
        match status.split(' ').nth(1) {
            Some(code) if code.starts_with('2') => Ok(location),
            _ => bail!("{status}: {}", String::from_utf8_lossy(&text)),
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = (&mut self.stream).take(ANSWER_BYTES_MAX).read_line(&mut line)?;
        anyhow::ensure!(read > 0, "the server ended the connection");
        Ok(line.trim_end().to_owned())
    }
}

/// What follows the host in a URL.
fn path_of(location: &str) -> &str {
    match location.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => location,
    }
}

fn with_digest(location: &str, digest: &str) -> String {
    let join = if location.contains('?') { '&' } else { '?' };
    format!("{location}{join}digest={digest}")
}
