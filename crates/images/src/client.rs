//! A client of the OCI distribution API: one registry of its own, and any other that a reference names.
//!
//! A reference without a host goes to the client's registry, with the client's credentials. A reference with
//! another host goes there without credentials (over https, or http on loopback), so that public images work.
//! Failures that pass are repeated (see [`Patience`]), broken transfers go on where they were, and proxies are those
//! of the environment.

mod auth;
mod download;
mod proxy;
mod referrers;
mod retry;
mod upload;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LINK};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::manifest::{MANIFEST_MAX_BYTES, MANIFEST_TYPES, OCI_MANIFEST};
use crate::reference::Reference;
use auth::Grant;
pub use download::BlobStream;
use retry::Counters;
pub use retry::{ClientStats, Patience};
pub(crate) use upload::{Content, UploadOptions};
pub use upload::{PutOutcome, RemoteBlob};

/// How long to wait for a connection: longer than any healthy path on Earth needs, with two retransmissions.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a registry may take to answer where no blob's content goes either way, nor anything waits for some.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long it may send nothing otherwise: a cache sends nothing while it fetches and verifies a large layer.
const READ_TIMEOUT: Duration = Duration::from_secs(300);
/// Most pages of a tag list that are read: 1,000 tags a page.
const TAG_PAGES_MAX: usize = 1_000;

/// A user and password for a registry.
#[derive(Clone)]
pub struct Credentials {
    /// User name.
    pub user: String,
    /// Password or access token.
    pub password: String,
}

impl Credentials {
    /// Reads the first line of a file, `user:password`.
    pub fn from_file(path: &Path) -> Result<Credentials> {
        let text = std::fs::read_to_string(path).map_err(Error::io("reading", path))?;
        let line = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
        match line.and_then(|line| line.split_once(':')) {
            Some((user, password)) => {
                Ok(Credentials { user: user.to_owned(), password: password.to_owned() })
            }
            None => Err(Error::InvalidRegistry {
                what: format!("credentials file {}", path.display()),
                reason: "expected a line `user:password`".to_owned(),
            }),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({}:...)", self.user)
    }
}

/// A manifest as the registry sent it, its digest verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawManifest {
    /// Digest of the bytes.
    pub digest: Digest,
    /// Media type.
    pub media_type: String,
    /// The exact bytes.
    pub bytes: bytes::Bytes,
}

/// What a registry says about a manifest without sending it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestInfo {
    /// Its digest, where the registry tells.
    pub digest: Option<Digest>,
    /// Its media type, where the registry tells.
    pub media_type: Option<String>,
}

/// Talks to registries. Clones share connections and tokens.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
    patience: Patience,
    /// Registries that have the same, in the order of asking.
    others: Vec<Client>,
}

struct Inner {
    http: reqwest::Client,
    base: Url,
    credentials: Option<Credentials>,
    /// Another registry that wants credentials of its own.
    login: Option<(String, Credentials)>,
    /// Authorization headers as last accepted.
    authorizations: Mutex<HashMap<auth::Scope, Arc<auth::Slot>>>,
    counters: Counters,
}

/// A repository in a registry: where requests go.
#[derive(Clone)]
struct Target {
    base: Url,
    repository: String,
    credentials: Option<Credentials>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.inner.base)
    }
}

impl Client {
    /// A client whose own registry is at `registry`, such as `http://10.1.0.10:5000`.
    pub fn new(registry: &str, credentials: Option<Credentials>) -> Result<Client> {
        let invalid =
            |reason: String| Error::InvalidRegistry { what: format!("registry `{registry}`"), reason };
        let base = Url::parse(registry)
            .map_err(|e| invalid(format!("{e}; expected a URL such as http://10.1.0.10:5000")))?;
        if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
            return Err(invalid("expected a URL such as http://10.1.0.10:5000".to_owned()));
        }
        install_crypto_provider();
        let builder = || {
            let builder = reqwest::Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(READ_TIMEOUT)
                .user_agent(concat!("anyplace/", env!("CARGO_PKG_VERSION")));
            proxy::apply(builder, |name| std::env::var(name).ok())
        };
        // A machine without any CA certificate can't speak https, but its own registry may well be http.
        let http = match builder()?.build() {
            Ok(http) => http,
            Err(_) => builder()?.tls_certs_only([]).build().map_err(|e| invalid(e.to_string()))?,
        };
        let authorizations = Mutex::new(HashMap::new());
        let login = None;
        let inner = Inner { http, base, credentials, login, authorizations, counters: Counters::default() };
        Ok(Client { inner: Arc::new(inner), patience: Patience::SHORT, others: Vec::new() })
    }

    /// The same client, but with this patience.
    pub fn with_patience(&self, patience: Patience) -> Client {
        let others = self.others.iter().map(|other| other.with_patience(patience)).collect();
        Client { inner: self.inner.clone(), patience, others }
    }

    /// The same client, whose pulls ask `other`'s registry where this one's is away, and those that were named before.
    pub fn or(mut self, other: Client) -> Client {
        self.others.push(other);
        self
    }

    /// How often requests are repeated.
    pub fn patience(&self) -> Patience {
        self.patience
    }

    /// A client for each registry that a pull may ask, in order: one where the reference itself says which.
    pub(crate) fn in_order(&self, reference: &Reference) -> Vec<Client> {
        let others = if reference.registry.is_none() { &self.others[..] } else { &[] };
        let own = Client { inner: self.inner.clone(), patience: self.patience, others: Vec::new() };
        std::iter::once(own).chain(others.iter().cloned()).collect()
    }

    /// A client whose own registry is another one, with the login that this one has for it, if any.
    pub fn at(&self, registry: &str) -> Result<Client> {
        let mut client = Client::new(registry, None)?;
        if client.inner.base == self.inner.base {
            return Ok(self.clone());
        }
        let login = self.inner.login.clone();
        if let (Some(inner), Some((host, credentials))) = (Arc::get_mut(&mut client.inner), login)
            && host == authority(&inner.base)
        {
            inner.credentials = Some(credentials);
        }
        client.patience = self.patience;
        Ok(client)
    }

    /// The same client, which logs in to another registry too, given by its host and port.
    pub fn with_login(&self, host: &str, credentials: Credentials) -> Client {
        let Inner { http, base, credentials: own, .. } = &*self.inner;
        let inner = Inner {
            http: http.clone(),
            base: base.clone(),
            credentials: own.clone(),
            login: Some((host.to_owned(), credentials)),
            authorizations: Mutex::default(),
            counters: Counters::default(),
        };
        Client { inner: Arc::new(inner), patience: self.patience, others: self.others.clone() }
    }

    /// What this client and its clones met.
    pub fn stats(&self) -> ClientStats {
        self.inner.counters.snapshot()
    }

    /// The client's own registry.
    pub fn registry(&self) -> &Url {
        &self.inner.base
    }

    /// Asks for a manifest's digest and type only.
    pub async fn head_manifest(&self, reference: &Reference) -> Result<ManifestInfo> {
        let target = self.target(reference)?;
        let url = target.url(&format!("manifests/{}", reference.manifest_key()))?;
        let response = self
            .send(&target, Grant::Pull, || {
                let request = self.inner.http.head(url.clone()).timeout(ANSWER_TIMEOUT);
                Ok(request.header(ACCEPT, accepted()))
            })
            .await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Err(target.not_found(reference));
        }
        let response = check(&target, response).await?;
        let digest = header(response.headers(), "docker-content-digest").map(|d| d.parse()).transpose()?;
        Ok(ManifestInfo { digest, media_type: header(response.headers(), "content-type") })
    }

    /// Gets a manifest or index, and verifies its digest where the reference or the registry names one.
    pub async fn get_manifest(&self, reference: &Reference) -> Result<RawManifest> {
        let target = self.target(reference)?;
        let url = target.url(&format!("manifests/{}", reference.manifest_key()))?;
        let response = self
            .send(&target, Grant::Pull, || {
                let request = self.inner.http.get(url.clone()).timeout(ANSWER_TIMEOUT);
                Ok(request.header(ACCEPT, accepted()))
            })
            .await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Err(target.not_found(reference));
        }
        let mut response = check(&target, response).await?;
        let claimed: Option<Digest> = match header(response.headers(), "docker-content-digest") {
            Some(text) => Some(text.parse()?),
            None => None,
        };
        let content_type = header(response.headers(), "content-type");
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| target.unreachable(e))? {
            if bytes.len() + chunk.len() > MANIFEST_MAX_BYTES {
                return Err(Error::SizeMismatch {
                    what: format!("the manifest of `{reference}`"),
                    expected: MANIFEST_MAX_BYTES as u64,
                    found: (bytes.len() + chunk.len()) as u64,
                });
            }
            bytes.extend_from_slice(&chunk);
        }
        for expected in reference.digest.iter().chain(&claimed) {
            let found = expected.same_of(&bytes);
            if *expected != found {
                let what = format!("the manifest of `{reference}`");
                return Err(Error::DigestMismatch { what, expected: expected.clone(), found });
            }
        }
        let media_type = media_type_of(content_type.as_deref(), &bytes);
        let digest = reference.digest.clone().or(claimed).unwrap_or_else(|| Digest::of(&bytes));
        Ok(RawManifest { digest, media_type, bytes: bytes.into() })
    }

    /// Stores a manifest under the reference's tag or digest.
    pub async fn put_manifest(&self, reference: &Reference, manifest: &RawManifest) -> Result<()> {
        let target = self.target(reference)?;
        let url = target.url(&format!("manifests/{}", reference.manifest_key()))?;
        let request = || {
            let request = self.inner.http.put(url.clone()).header(CONTENT_TYPE, manifest.media_type.as_str());
            Ok(request.body(manifest.bytes.clone()))
        };
        let response = self.send(&target, Grant::Push, request).await?;
        let response = check(&target, response).await?;
        // Nothing in the request says what its body must be, where the reference is a tag.
        let took =
            header(response.headers(), "docker-content-digest").and_then(|text| text.parse::<Digest>().ok());
        match took.filter(|took| *took != took.same_of(&manifest.bytes)) {
            None => Ok(()),
            Some(found) => {
                let what = format!("the manifest of `{reference}`, as the registry took it,");
                Err(Error::DigestMismatch { what, expected: manifest.digest.clone(), found })
            }
        }
    }

    /// All tags of the reference's repository.
    pub async fn list_tags(&self, reference: &Reference) -> Result<Vec<String>> {
        self.tag_pages(reference, TAG_PAGES_MAX).await
    }

    /// The first of them, 1,000 at most.
    pub(crate) async fn first_tags(&self, reference: &Reference) -> Result<Vec<String>> {
        self.tag_pages(reference, 1).await
    }

    async fn tag_pages(&self, reference: &Reference, pages: usize) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            tags: Option<Vec<String>>,
        }
        let target = self.target(reference)?;
        let mut url = target.url("tags/list?n=1000")?;
        let mut tags = Vec::new();
        for _ in 0..pages {
            let request = || Ok(self.inner.http.get(url.clone()).timeout(ANSWER_TIMEOUT));
            let response = self.send(&target, Grant::Pull, request).await?;
            if response.status() == StatusCode::NOT_FOUND {
                return Err(target.not_found(reference));
            }
            let response = check(&target, response).await?;
            let next = header(response.headers(), LINK.as_str())
                .and_then(|link| Some(link.split_once('<')?.1.split_once('>')?.0.to_owned()));
            let page: Page = response.json().await.map_err(|e| target.unreachable(e))?;
            tags.extend(page.tags.unwrap_or_default());
            match next.map(|next| url.join(&next)) {
                // Never follow a list to another host: the credentials would go there.
                Some(Ok(next)) if next.origin() == url.origin() => url = next,
                _ => break,
            }
        }
        Ok(tags)
    }

    fn target(&self, reference: &Reference) -> Result<Target> {
        let own = authority(&self.inner.base);
        let Some(host) = reference.registry.as_deref().filter(|host| *host != own) else {
            return Ok(Target {
                base: self.inner.base.clone(),
                repository: reference.repository.clone(),
                credentials: self.inner.credentials.clone(),
            });
        };
        let mut repository = reference.repository.clone();
        let url = if host == "docker.io" {
            if !repository.contains('/') {
                repository = format!("library/{repository}");
            }
            "https://registry-1.docker.io".to_owned()
        } else {
            format!("{}://{host}", if is_loopback(host) { "http" } else { "https" })
        };
        let base = Url::parse(&url).map_err(|e| Error::InvalidReference {
            text: reference.to_string(),
            reason: format!("its registry makes no URL ({e})"),
        })?;
        let login = self.inner.login.as_ref().filter(|(at, _)| at == host);
        Ok(Target { base, repository, credentials: login.map(|(_, credentials)| credentials.clone()) })
    }
}

impl Target {
    fn url(&self, rest: &str) -> Result<Url> {
        let path = format!("/v2/{}/{rest}", self.repository);
        self.base.join(&path).map_err(|e| Error::InvalidRegistry {
            what: format!("registry {}", self.base),
            reason: format!("`{path}` makes no URL ({e})"),
        })
    }

    fn name(&self) -> String {
        self.base.as_str().trim_end_matches('/').to_owned()
    }

    fn unreachable(&self, source: reqwest::Error) -> Error {
        Error::RegistryUnreachable { url: self.name(), source: source.without_url() }
    }

    fn not_found(&self, reference: &Reference) -> Error {
        Error::RepositoryOrTagNotFound { reference: reference.to_string(), url: self.name() }
    }
}

/// Turns any other status than success into an error, with the registry's own words.
async fn check(target: &Target, response: Response) -> Result<Response> {
    #[derive(Deserialize)]
    struct Body {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        code: String,
        #[serde(default)]
        message: Option<String>,
        #[serde(default)]
        detail: Option<serde_json::Value>,
    }
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body = response.bytes().await.unwrap_or_default();
    let entry = serde_json::from_slice::<Body>(&body).ok().and_then(|body| body.errors.into_iter().next());
    let (code, message) = match entry {
        Some(Entry { code, message, detail }) => {
            let detail = detail.map(|detail| format!(" ({detail})")).unwrap_or_default();
            (code, format!("{}{detail}", message.unwrap_or_default()))
        }
        None => (String::new(), String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned()),
    };
    let url = target.name();
    if status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN {
        let knows_who = status == StatusCode::FORBIDDEN && !message.is_empty();
        let check = "check the user and password in the registry's credentials file";
        let reason = if knows_who { message } else { check.to_owned() };
        let repository = target.repository.clone();
        return Err(Error::Unauthorized { url, repository, status: status.as_u16(), reason });
    }
    Err(Error::Registry { url, status: status.as_u16(), code, message })
}

fn authority(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (host, _) => host.unwrap_or_default().to_owned(),
    }
}

/// Whether this host, with or without a port, is this machine by its very name.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    name == "localhost" || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn accepted() -> String {
    MANIFEST_TYPES.join(", ")
}

fn header(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// The manifest's own media type where it has one, since some servers send `text/plain`.
fn media_type_of(content_type: Option<&str>, bytes: &[u8]) -> String {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Own {
        media_type: Option<String>,
    }
    let own = serde_json::from_slice::<Own>(bytes).ok().and_then(|own| own.media_type);
    let sent = content_type.and_then(|t| t.split(';').next()).map(str::trim).filter(|t| !t.is_empty());
    own.or(sent.map(str::to_owned)).unwrap_or_else(|| OCI_MANIFEST.to_owned())
}

/// reqwest panics where the process has no TLS provider: make sure of one before building a client.
fn install_crypto_provider() {
    if rustls::crypto::CryptoProvider::get_default().is_none() {
        // An error means that another thread was first, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
    }
}

#[cfg(test)]
mod tests;
