//! `[storage]`: which store, and how to reach it.
//!
//! Secrets never stand in the settings: they come from a file of `NAME=value` lines, from the environment (the same
//! names: `AWS_ACCESS_KEY_ID`, `AZURE_STORAGE_ACCOUNT_KEY`, ...), or from the machine's own role in its cloud.

use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::multipart::MultipartStore;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use serde::Deserialize;

/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a store may say nothing when it is asked for something, or told little. A listing is made meanwhile.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(15);
/// How long it may say nothing about a part. One of 16 MiB is sent meanwhile, beside seven others.
const BULK_SILENCE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a request is tried again, after 500, 503, 429, or no answer. The last try begins within it, so clients have
/// their answer after this and one silence at most.
const RETRY_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest pause between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(2);
const RETRIES_MAX: usize = 10;

/// Where content is kept.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum StorageConfig {
    /// In `data_dir`, each write synced to the disk.
    #[default]
    Local,
    /// In Amazon S3, or anything that speaks its protocol.
    S3(Bucket),
    /// In Google Cloud Storage.
    Gcs(Bucket),
    /// In Azure Blob Storage.
    Azure(Container),
}

/// A bucket.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// The bucket's name.
    pub bucket: String,
    /// Put before all keys.
    #[serde(default)]
    pub prefix: String,
    /// Such as `https://s3.example.com`; by default the cloud's own.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Such as `eu-central-1`; S3 only.
    #[serde(default)]
    pub region: Option<String>,
    /// S3: lines of `NAME=value`. GCS: a service account's JSON.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// Whether the endpoint may be `http://`.
    #[serde(default)]
    pub allow_http: bool,
}

/// An Azure container.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// The storage account's name.
    pub account: String,
    /// The container's name.
    pub container: String,
    /// Put before all keys.
    #[serde(default)]
    pub prefix: String,
    /// By default the cloud's own.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// Lines of `NAME=value`.
    #[serde(default)]
    pub credentials_file: Option<PathBuf>,
    /// Whether the endpoint may be `http://`.
    #[serde(default)]
    pub allow_http: bool,
}

/// A store that isn't a folder.
pub(super) struct Remote {
    pub(super) objects: Arc<dyn ObjectStore>,
    /// The same for large objects.
    pub(super) bulk: Arc<dyn ObjectStore>,
    pub(super) parts: Arc<dyn MultipartStore>,
    /// How it is called in messages.
    pub(super) name: String,
}

impl Remote {
    /// The store of the settings; `None` for the local folder.
    pub(super) fn open(config: &StorageConfig) -> anyhow::Result<Option<Remote>> {
        anyplace_service::install_crypto_provider();
        Ok(Some(match config {
            StorageConfig::Local => return Ok(None),
            StorageConfig::S3(bucket) => {
                let name =
                    format!("the bucket {} at {}", bucket.bucket, place(&bucket.endpoint, "Amazon S3"));
                remote(|silence| s3(bucket, silence), &bucket.prefix, name)?
            }
            StorageConfig::Gcs(bucket) => {
                let name =
                    format!("the bucket {} at {}", bucket.bucket, place(&bucket.endpoint, "Google Cloud"));
                remote(|silence| gcs(bucket, silence), &bucket.prefix, name)?
            }
            StorageConfig::Azure(container) => {
                let place = place(&container.endpoint, "Azure");
                let name =
                    format!("the container {} of {} at {place}", container.container, container.account);
                remote(|silence| azure(container, silence), &container.prefix, name)?
            }
        }))
    }
}

/// Opens a store twice, for each patience once.
fn remote<T: ObjectStore + MultipartStore>(
    open: impl Fn(Duration) -> anyhow::Result<T>,
    prefix: &str,
    name: String,
) -> anyhow::Result<Remote> {
    let open = |silence| -> anyhow::Result<_> {
        let store = open(silence).with_context(|| format!("can't use {name}; check [storage]"))?;
        Ok(Arc::new(PrefixStore::new(store, prefix)))
    };
    let (objects, bulk) = (open(SILENCE_TIMEOUT)?, open(BULK_SILENCE_TIMEOUT)?);
    Ok(Remote { objects, bulk: bulk.clone(), parts: bulk, name })
}

fn place(endpoint: &Option<String>, default: &str) -> String {
    endpoint.clone().unwrap_or_else(|| default.to_owned())
}

fn s3(bucket: &Bucket, silence: Duration) -> anyhow::Result<object_store::aws::AmazonS3> {
    let mut builder = AmazonS3Builder::from_env()
        .with_bucket_name(&bucket.bucket)
        // What is stored is verified by its digest; over TLS, hashing it once more for the signature adds nothing.
        .with_unsigned_payload(!bucket.allow_http)
        .with_client_options(options(bucket.allow_http, silence))
        .with_allow_http(bucket.allow_http)
        .with_retry(retry());
    if let Some(endpoint) = &bucket.endpoint {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(region) = &bucket.region {
        builder = builder.with_region(region);
    }
    for (name, value) in pairs(bucket.credentials_file.as_deref())? {
        let key = name.to_ascii_lowercase().parse().map_err(|_| unknown(&name))?;
        builder = builder.with_config(key, value);
    }
    Ok(builder.build()?)
}

fn gcs(bucket: &Bucket, silence: Duration) -> anyhow::Result<object_store::gcp::GoogleCloudStorage> {
    let mut builder = GoogleCloudStorageBuilder::from_env()
        .with_bucket_name(&bucket.bucket)
        .with_client_options(options(bucket.allow_http, silence))
        .with_retry(retry());
    if let Some(endpoint) = &bucket.endpoint {
        builder = builder.with_base_url(endpoint);
    }
    if let Some(path) = &bucket.credentials_file {
        builder = builder.with_service_account_path(path.to_string_lossy());
    }
    Ok(builder.build()?)
}

fn azure(container: &Container, silence: Duration) -> anyhow::Result<object_store::azure::MicrosoftAzure> {
    let mut builder = MicrosoftAzureBuilder::from_env()
        .with_account(&container.account)
        .with_container_name(&container.container)
        .with_client_options(options(container.allow_http, silence))
        .with_allow_http(container.allow_http)
        .with_retry(retry());
    if let Some(endpoint) = &container.endpoint {
        builder = builder.with_endpoint(endpoint.clone());
    }
    for (name, value) in pairs(container.credentials_file.as_deref())? {
        let key = name.to_ascii_lowercase().parse().map_err(|_| unknown(&name))?;
        builder = builder.with_config(key, value);
    }
    Ok(builder.build()?)
}

fn options(allow_http: bool, silence: Duration) -> ClientOptions {
    ClientOptions::new()
        .with_allow_http(allow_http)
        .with_connect_timeout(CONNECT_TIMEOUT)
        // No limit on a whole download: a slow client makes it as long as it likes.
        .with_timeout_disabled()
        .with_read_timeout(silence)
}

fn retry() -> RetryConfig {
    let backoff = BackoffConfig {
        init_backoff: Duration::from_millis(100),
        max_backoff: PAUSE_MAX,
        ..BackoffConfig::default()
    };
    RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_TIMEOUT }
}

/// The `NAME=value` lines of a file.
fn pairs(path: Option<&FilePath>) -> anyhow::Result<Vec<(String, String)>> {
    let Some(path) = path else { return Ok(Vec::new()) };
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("can't read storage.credentials_file {}", path.display()))?;
    let lines = text.lines().enumerate().map(|(number, line)| (number + 1, line.trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(number, line)| {
            let pair =
                line.split_once('=').map(|(name, value)| (name.trim().to_owned(), value.trim().to_owned()));
            pair.with_context(|| format!("{}:{number}: expected `NAME=value`", path.display()))
        })
        .collect()
}

fn unknown(name: &str) -> anyhow::Error {
    anyhow::anyhow!("`{name}` in storage.credentials_file is not known; expected such as AWS_ACCESS_KEY_ID")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(toml: &str) -> anyhow::Result<Option<Remote>> {
        Remote::open(&toml::from_str(toml)?)
    }

    #[test]
    fn settings_of_each_kind() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        std::fs::write(&file, "# who\nAWS_ACCESS_KEY_ID = a\naws_secret_access_key=b=c\n").unwrap();
        let file = file.display();
        assert!(open("kind = \"local\"").unwrap().is_none());
        let s3 = format!(
            "kind = \"s3\"\nbucket = \"b\"\nregion = \"r\"\nendpoint = \"http://127.0.0.1:1\"\nallow_http = true\n\
             credentials_file = \"{file}\""
        );
        assert_eq!(open(&s3).unwrap().unwrap().name, "the bucket b at http://127.0.0.1:1");
        let azure = dir.path().join("azure");
        std::fs::write(&azure, "AZURE_STORAGE_ACCOUNT_KEY=a2V5\n").unwrap();
        let text = format!(
            "kind = \"azure\"\naccount = \"a\"\ncontainer = \"c\"\ncredentials_file = \"{}\"",
            azure.display()
        );
        assert_eq!(open(&text).unwrap().unwrap().name, "the container c of a at Azure");
        let gcs = dir.path().join("gcs.json");
        std::fs::write(
            &gcs,
            "{\"gcs_base_url\":\"http://127.0.0.1:1\",\"disable_oauth\":true,\
             \"client_email\":\"\",\"private_key\":\"\",\"private_key_id\":\"\"}",
        )
        .unwrap();
        let text = format!("kind = \"gcs\"\nbucket = \"b\"\ncredentials_file = \"{}\"", gcs.display());
        assert_eq!(open(&text).unwrap().unwrap().name, "the bucket b at Google Cloud");
        for bad in ["kind = \"ftp\"", "kind = \"s3\"", "kind = \"s3\"\nbucket = \"b\"\nsecret = \"x\""] {
            assert!(open(bad).is_err(), "{bad}");
        }
        std::fs::write(dir.path().join("bad"), "NONSENSE=1\n").unwrap();
        let bad =
            format!("kind = \"s3\"\nbucket = \"b\"\ncredentials_file = \"{}/bad\"", dir.path().display());
        assert!(format!("{:#}", open(&bad).err().unwrap()).contains("NONSENSE"));
    }
}
