//! Contexts, and what a command's connection comes to: flags, then variables, then the context, then loopback.
//!
//! File: `$XDG_CONFIG_HOME/anyplace/config.toml` or `~/.config/anyplace/config.toml`, mode 0600 because it may
//! hold tokens:
//!
//! ```toml
//! current = "demo"
//! [contexts.demo]
//! url = "http://10.0.0.10:7600"
//! token_file = "/var/lib/anyplace/global/admin.token"
//! registry = "http://10.1.0.10:5000"
//! registry_credentials_file = "/var/lib/anyplace/registry/credentials"
//! ```

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use anyplace_images::Credentials;
use serde::{Deserialize, Serialize};

use crate::args::Connection;

const DEFAULT_URL: &str = "http://127.0.0.1:7600";
const DEFAULT_REGISTRY: &str = "http://127.0.0.1:5000";

/// One platform's addresses and credentials.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Context {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) url: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) registry: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) registry_credentials_file: Option<PathBuf>,
}

/// The file of contexts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Contexts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<String>,
    pub(crate) contexts: BTreeMap<String, Context>,
}

impl Contexts {
    /// Reads the file; none is an empty one.
    pub(crate) fn load() -> anyhow::Result<Self> {
        match file() {
            Some(path) if path.exists() => {
                let text = std::fs::read_to_string(&path)
                    .with_context(|| format!("the contexts in {} can't be read", path.display()))?;
                toml::from_str(&text).with_context(|| {
                    format!("{} is not a file of contexts; mend it, or move it away", path.display())
                })
            }
            _ => Ok(Self::default()),
        }
    }

    /// Writes the file, for its owner's eyes only.
    pub(crate) fn save(&self) -> anyhow::Result<()> {
        let path = file().context("no place for contexts: set HOME or XDG_CONFIG_HOME")?;
        anyplace_service::write_atomically(&path, toml::to_string(self)?.as_bytes(), 0o600)
            .with_context(|| format!("the contexts in {} can't be written", path.display()))
    }

    /// A context by name.
    pub(crate) fn find(&self, name: &str) -> anyhow::Result<&Context> {
        self.contexts.get(name).with_context(|| {
            let known = self.contexts.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".into() } else { known };
            format!(
                "there is no context `{name}` (known: {known}); make it with `anyplace context set {name} --url URL`"
            )
        })
    }
}

fn file() -> Option<PathBuf> {
    let folder = variable("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".config")))?;
    Some(folder.join("anyplace/config.toml"))
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// What to talk to, and with which secrets.
#[derive(Debug, Clone)]
pub(crate) struct Session {
    url: String,
    token: Option<Secret>,
    registry: String,
    registry_credentials_file: Option<PathBuf>,
    /// Whether someone said where the registry is.
    pub(crate) registry_is_configured: bool,
}

#[derive(Debug, Clone)]
enum Secret {
    Text(String),
    File(PathBuf),
}

impl Session {
    /// Puts flags, variables and context together. A context's secrets go only to the context's own addresses.
    pub(crate) fn new(flags: &Connection) -> anyhow::Result<Self> {
        let contexts = Contexts::load()?;
        let name =
            flags.context.clone().or_else(|| variable("ANYPLACE_CONTEXT")).or(contexts.current.clone());
        let context = match &name {
            Some(name) => contexts.find(name)?.clone(),
            None => Context::default(),
        };

        let said = flags.url.clone().or_else(|| variable("ANYPLACE_URL"));
        let own = said.is_none() || said == context.url;
        let url = said.or(context.url).unwrap_or_else(|| DEFAULT_URL.into());
        let file = |path: PathBuf| Secret::File(path);
        let token = flags
            .token_file
            .clone()
            .map(file)
            .or_else(|| variable("ANYPLACE_TOKEN").map(Secret::Text))
            .or_else(|| variable("ANYPLACE_TOKEN_FILE").map(PathBuf::from).map(file))
            .or_else(|| context.token.map(Secret::Text).or(context.token_file.map(file)).filter(|_| own));

        let said = flags.registry.clone().or_else(|| variable("ANYPLACE_REGISTRY"));
        let own = said.is_none() || said == context.registry;
        let registry = said.or(context.registry);
        let registry_credentials_file = flags
            .registry_credentials_file
            .clone()
            .or_else(|| variable("ANYPLACE_REGISTRY_CREDENTIALS_FILE").map(PathBuf::from))
            .or(context.registry_credentials_file.filter(|_| own));
        Ok(Self {
            url,
            token,
            registry_is_configured: registry.is_some(),
            registry: registry.unwrap_or_else(|| DEFAULT_REGISTRY.into()),
            registry_credentials_file,
        })
    }

    /// A client of the global scheduler.
    pub(crate) fn api(&self) -> anyhow::Result<anyplace_api::Client> {
        let token = match &self.token {
            Some(Secret::Text(token)) => Some(token.trim().to_owned()),
            Some(Secret::File(path)) => Some(anyplace_service::read_token(path)?),
            None => None,
        };
        Ok(anyplace_api::Client::new(&self.url, token)?)
    }

    /// Whether requests carry a token.
    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// A client of the registry.
    pub(crate) fn registry(&self) -> anyhow::Result<anyplace_images::Client> {
        Ok(anyplace_images::Client::new(&self.registry, self.registry_credentials()?)?)
    }

    /// Name and password for the registry.
    pub(crate) fn registry_credentials(&self) -> anyhow::Result<Option<Credentials>> {
        self.registry_credentials_file.as_deref().map(Credentials::from_file).transpose().context(
            "the registry's credentials can't be used; check --registry-credentials-file or the context",
        )
    }
}

impl Context {
    /// Takes over what the flags say. Files are kept by absolute path, since commands run anywhere.
    pub(crate) fn update(&mut self, flags: &Connection, token: Option<String>) -> anyhow::Result<()> {
        let absolute = |path: &PathBuf| {
            std::path::absolute(path).with_context(|| format!("`{}` is no path", path.display()))
        };
        if let Some(url) = &flags.url {
            // A wrong address is better refused now than at each later command.
            anyplace_api::Client::new(url, None)?;
            self.url = Some(url.clone());
        }
        if let Some(path) = &flags.token_file {
            (self.token, self.token_file) = (None, Some(absolute(path)?));
        }
        if let Some(token) = token {
            if token.is_empty() {
                bail!("no token came on standard input");
            }
            (self.token, self.token_file) = (Some(token), None);
        }
        if let Some(registry) = &flags.registry {
            anyplace_images::Client::new(registry, None)?;
            self.registry = Some(registry.clone());
        }
        if let Some(path) = &flags.registry_credentials_file {
            self.registry_credentials_file = Some(absolute(path)?);
        }
        Ok(())
    }
}
