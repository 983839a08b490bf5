//! A small registry in this process, which can be made to fail.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::objects::lock;
use super::Format;
use crate::client::{Client, Patience};
use crate::digest::Digest;
use crate::manifest::{Descriptor, ImageConfig, Manifest, OCI_CONFIG, OCI_MANIFEST, Platform, RootFs};

/// What the registry does to a body before it sends it: path, whether a range was asked for, the body.
type Mangle = Box<dyn Fn(&str, &mut Vec<u8>) + Send>;

/// A registry in this process.
pub(crate) struct Server {
    shared: Arc<Shared>,
    url: String,
}

#[derive(Default)]
struct Shared {
    contents: Mutex<HashMap<String, (String, Vec<u8>)>>,
    mangle: Mutex<Option<Mangle>>,
    /// Bytes of blobs that were sent.
    sent: AtomicU64,
    requests: AtomicU64,
    no_ranges: AtomicBool,
    /// Where blobs are, in place of here.
    redirect: Mutex<Option<String>>,
    /// Requests that carried an authorization.
    authorized: AtomicU64,
    stopped: AtomicBool,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
    }
}

impl Server {
    pub(crate) fn start() -> Server {
        Server::start_at("127.0.0.1:0")
    }

    pub(crate) fn start_at(address: &str) -> Server {
        let listener = TcpListener::bind(address).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        listener.set_nonblocking(true).unwrap();
        let shared = Arc::new(Shared::default());
        let of = shared.clone();
        std::thread::spawn(move || {
            while !of.stopped.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let of = of.clone();
                        std::thread::spawn(move || {
                            let _ = serve(&of, &stream);
                        });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Server { shared, url }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A client that doesn't wait long for a registry that fails on purpose.
    pub(crate) fn client(&self) -> Client {
        Client::new(&self.url, None).unwrap().with_patience(Patience::NONE)
    }

    pub(crate) fn set_ranges(&self, known: bool) {
        self.shared.no_ranges.store(!known, Ordering::SeqCst);
    }

    pub(crate) fn set_mangle(&self, mangle: impl Fn(&str, &mut Vec<u8>) + Send + 'static) {
        *lock(&self.shared.mangle) = Some(Box::new(mangle));
    }

    pub(crate) fn stop_mangling(&self) {
        *lock(&self.shared.mangle) = None;
    }

    /// Blobs are at another server, to which this one sends whoever asks.
    pub(crate) fn redirect_blobs(&self, to: &Server) {
        let mut theirs = lock(&to.shared.contents);
        for (path, content) in lock(&self.shared.contents).iter().filter(|(path, _)| path.contains("/blobs/"))
        {
            theirs.insert(path.clone(), content.clone());
        }
        *lock(&self.shared.redirect) = Some(to.url.clone());
    }

    pub(crate) fn authorized(&self) -> u64 {
        self.shared.authorized.load(Ordering::SeqCst)
    }

    pub(crate) fn sent(&self) -> u64 {
        self.shared.sent.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn put(&self, path: &str, media_type: &str, bytes: Vec<u8>) {
        lock(&self.shared.contents).insert(path.to_owned(), (media_type.to_owned(), bytes));
    }

    pub(crate) fn get(&self, path: &str) -> Vec<u8> {
        lock(&self.shared.contents)[path].1.clone()
    }

    /// Stores an image `app:TAG`; returns the layers' descriptors.
    pub(crate) fn put_image(&self, tag: &str, layers: &[(Vec<u8>, Format)]) -> Vec<Descriptor> {
        let described: Vec<Descriptor> =
            layers.iter().map(|(tar, format)| self.put_layer(tar, *format)).collect();
        let diff_ids = layers.iter().map(|(tar, _)| Digest::of(tar)).collect();
        self.put_manifest(tag, described.clone(), diff_ids);
        described
    }

    pub(crate) fn put_manifest(&self, tag: &str, layers: Vec<Descriptor>, diff_ids: Vec<Digest>) {
        let platform = Platform::host();
        let config = ImageConfig {
            architecture: platform.architecture,
            os: platform.os,
            config: None,
            rootfs: RootFs { kind: "layers".to_owned(), diff_ids },
        };
        let config = self.put_blob(OCI_CONFIG, serde_json::to_vec(&config).unwrap());
        let media_type = Some(OCI_MANIFEST.to_owned());
        let manifest = Manifest { schema_version: 2, media_type, config, layers };
        let bytes = serde_json::to_vec(&manifest).unwrap();
        self.put(&format!("/v2/app/manifests/{}", Digest::of(&bytes)), OCI_MANIFEST, bytes.clone());
        self.put(&format!("/v2/app/manifests/{tag}"), OCI_MANIFEST, bytes);
    }

    pub(crate) fn put_layer(&self, tar: &[u8], format: Format) -> Descriptor {
        let mut annotations = None;
        let (media_type, blob) = match format {
            Format::Plain => ("application/vnd.oci.image.layer.v1.tar", tar.to_vec()),
            Format::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(tar).unwrap();
                ("application/vnd.oci.image.layer.v1.tar+gzip", gzip.finish().unwrap())
            }
            Format::Zstd => {
                ("application/vnd.oci.image.layer.v1.tar+zstd", zstd::bulk::compress(tar, 1).unwrap())
            }
            Format::Chunked => {
                let mut blob = Vec::new();
                let options = zstd_chunked::Options { level: 1, threads: 1 };
                let packed = zstd_chunked::pack(tar, &mut blob, &options).unwrap();
                annotations = packed.annotations.map(|annotations| annotations.to_map());
                ("application/vnd.oci.image.layer.v1.tar+zstd", blob)
            }
        };
        Descriptor { annotations, ..self.put_blob(media_type, blob) }
    }

    pub(crate) fn put_blob(&self, media_type: &str, bytes: Vec<u8>) -> Descriptor {
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        self.put(&format!("/v2/app/blobs/{digest}"), "application/octet-stream", bytes);
        Descriptor { media_type: media_type.to_owned(), digest, size, platform: None, annotations: None }
    }
}

fn serve(shared: &Shared, stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut reader = BufReader::new(stream);
    loop {
        let (mut path, mut range, mut line) = (None, None, String::new());
        loop {
            line.clear();
            if reader.by_ref().take(8192).read_line(&mut line)? == 0 || shared.stopped.load(Ordering::SeqCst)
            {
                return Ok(());
            }
            let text = line.trim_end();
            if path.is_none() {
                let target = text.split(' ').nth(1);
                path = target.map(|target| target.split('?').next().unwrap_or_default().to_owned());
            } else if text.is_empty() {
                break;
            } else if text.to_ascii_lowercase().starts_with("authorization:") {
                shared.authorized.fetch_add(1, Ordering::SeqCst);
            } else if let Some(bytes) = text.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (first, last) = bytes.split_once('-').unwrap_or((bytes, ""));
                range = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().ok()));
            }
        }
        let path = path.unwrap_or_default();
        let found = lock(&shared.contents).get(&path).cloned();
        let mut stream = stream;
        let redirect = lock(&shared.redirect).clone().filter(|_| path.contains("/blobs/"));
        if let Some(to) = redirect {
            let head = format!("HTTP/1.1 307 Temporary Redirect\r\nlocation: {to}{path}?signature=1\r\n");
            stream.write_all(format!("{head}content-length: 0\r\n\r\n").as_bytes())?;
            continue;
        }
        let Some((media_type, mut body)) = found else {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")?;
            continue;
        };
        if let Some(mangle) = &*lock(&shared.mangle) {
            mangle(&path, &mut body);
        }
        let total = body.len();
        let range = range.filter(|_| !shared.no_ranges.load(Ordering::SeqCst));
        let (status, extra) = match range {
            Some((first, last)) => {
                let last = last.unwrap_or(total - 1).min(total.saturating_sub(1));
                body = body.get(first..=last).unwrap_or_default().to_vec();
                ("206 Partial Content", format!("content-range: bytes {first}-{last}/{total}\r\n"))
            }
            None => ("200 OK", String::new()),
        };
        if path.contains("/blobs/") {
            shared.sent.fetch_add(body.len() as u64, Ordering::SeqCst);
            shared.requests.fetch_add(1, Ordering::SeqCst);
        }
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: {media_type}\r\ncontent-length: {length}\r\n{extra}\r\n"
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(&body)?;
    }
}
