//! Where etcd is, and who is asking.

use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use serde::Deserialize;

use crate::{Error, Result};

const CONNECT: Duration = Duration::from_secs(2);
/// A connection that answers no ping for so long is given up.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(3));
/// What a transaction's size allows for the framing of each key leaves room for so much.
const PREFIX_MAX: usize = 32;

/// The `[etcd]` table of a role's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EtcdConfig {
    /// URLs of the members, all `http://` or all `https://`.
    pub endpoints: Vec<String>,
    /// Start of all keys, at most 32 bytes, such as `anyplace/global`. Each global scheduler's and each location
    /// scheduler's store needs its own.
    pub prefix: String,
    /// Certificates (PEM) of the authorities that sign the members'. Needed for `https://`.
    #[serde(default)]
    pub ca_file: Option<PathBuf>,
    /// Our own certificate (PEM), where etcd asks for one; with `key_file`.
    #[serde(default)]
    pub cert_file: Option<PathBuf>,
    /// Key (PEM) of `cert_file`.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
}

impl EtcdConfig {
    /// Checks what can be checked without asking anybody.
    ///
    /// # Errors
    /// [`Error::Config`] names the field.
    pub fn validate(&self) -> Result<()> {
        let wrong = |field, reason: String| Err(Error::Config { field, reason });
        if self.endpoints.is_empty() {
            return wrong(
                "etcd.endpoints",
                "is empty; write the members' URLs, such as \"https://10.0.0.1:2379\"".into(),
            );
        }
        for endpoint in &self.endpoints {
            if !endpoint.starts_with("http://") && !endpoint.starts_with("https://") {
                return wrong("etcd.endpoints", format!("{endpoint} has no http:// or https://; write one"));
            }
            if self.is_tls() != endpoint.starts_with("https://") {
                return wrong(
                    "etcd.endpoints",
                    "are http:// and https://; write one of them everywhere".into(),
                );
            }
        }
        let prefix = &self.prefix;
        if prefix.is_empty() || prefix.len() > PREFIX_MAX || prefix.starts_with('/') || prefix.ends_with('/')
        {
            return wrong(
                "etcd.prefix",
                format!("is {prefix:?}; write 1 to {PREFIX_MAX} bytes without a slash at either end"),
            );
        }
        if self.cert_file.is_some() != self.key_file.is_some() {
            return wrong("etcd.cert_file", "and key_file belong together; write both or none".into());
        }
        match (self.is_tls(), &self.ca_file, &self.cert_file) {
            (true, None, _) => {
                wrong("etcd.ca_file", "is missing, and the endpoints are https://; write it".into())
            }
            (false, Some(_), _) | (false, _, Some(_)) => {
                wrong("etcd.ca_file", "and certificates need https:// endpoints".into())
            }
            _ => Ok(()),
        }
    }

    fn is_tls(&self) -> bool {
        self.endpoints.first().is_some_and(|endpoint| endpoint.starts_with("https://"))
    }

    /// A client for each endpoint; connections are made when they are needed.
    pub(super) async fn connect(&self) -> Result<Vec<Client>> {
        self.validate()?;
        let mut options = ConnectOptions::new()
            .with_connect_timeout(CONNECT)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if let Some(ca_file) = &self.ca_file {
            let mut tls =
                TlsOptions::new().ca_certificate(Certificate::from_pem(read("etcd.ca_file", ca_file)?));
            if let (Some(cert), Some(key)) = (&self.cert_file, &self.key_file) {
                tls = tls
                    .identity(Identity::from_pem(read("etcd.cert_file", cert)?, read("etcd.key_file", key)?));
            }
            options = options.with_tls(tls);
        }
        let mut clients = Vec::new();
        for endpoint in &self.endpoints {
            let wrong =
                |error| Error::Config { field: "etcd.endpoints", reason: format!("{endpoint}: {error}") };
            clients.push(Client::connect([endpoint], Some(options.clone())).await.map_err(wrong)?);
        }
        Ok(clients)
    }
}

fn read(field: &'static str, path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path)
        .map_err(|error| Error::Config { field, reason: format!("{}: {error}", path.display()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_named() {
        let problem = |toml: &str| {
            let config: EtcdConfig = serde_json::from_str(toml).unwrap();
            config.validate().err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(problem(r#"{"endpoints": ["http://a:1", "http://b:1"], "prefix": "a/b"}"#), "");
        assert_eq!(problem(r#"{"endpoints": ["https://a:1"], "prefix": "a", "ca_file": "/x"}"#), "");
        for (config, words) in [
            (r#"{"endpoints": [], "prefix": "a"}"#, "etcd.endpoints is empty"),
            (
                r#"{"endpoints": ["10.0.0.1:2379"], "prefix": "a"}"#,
                "etcd.endpoints 10.0.0.1:2379 has no http://",
            ),
            (
                r#"{"endpoints": ["http://a", "https://b"], "prefix": "a"}"#,
                "etcd.endpoints are http:// and https://",
            ),
            (r#"{"endpoints": ["http://a"], "prefix": ""}"#, "etcd.prefix is \"\""),
            (r#"{"endpoints": ["http://a"], "prefix": "/a"}"#, "etcd.prefix is \"/a\""),
            (
                r#"{"endpoints": ["http://a"], "prefix": "123456789012345678901234567890123"}"#,
                "1 to 32 bytes",
            ),
            (r#"{"endpoints": ["https://a"], "prefix": "a"}"#, "etcd.ca_file is missing"),
            (
                r#"{"endpoints": ["http://a"], "prefix": "a", "ca_file": "/x"}"#,
                "etcd.ca_file and certificates need",
            ),
            (
                r#"{"endpoints": ["https://a"], "prefix": "a", "ca_file": "/x", "cert_file": "/y"}"#,
                "etcd.cert_file and key_file belong together",
            ),
        ] {
            assert!(problem(config).contains(words), "{config}: {}", problem(config));
        }
    }
}
