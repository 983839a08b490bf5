//! Configuration files: TOML into a typed value, with errors that name file, line and field.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("the configuration {path} can't be read ({reason}); check --config", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// The text is no configuration of this role.
    #[error("{path}:{line}: {message}; docs/configuration.md lists the fields of each role", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong, and with which field.
        message: String,
    },
}

/// Loads a role's configuration.
///
/// # Errors
/// The file can't be read, isn't TOML, or has an unknown, missing or impossible field.
pub fn load_config<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|reason| ConfigError::Unreadable { path: path.into(), reason })?;
    toml::from_str(&text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start.min(text.len()));
        ConfigError::Invalid {
            path: path.into(),
            line: 1 + text[..start].matches('\n').count(),
            message: error.message().trim().to_string(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Config {
        #[allow(dead_code, reason = "only parsed")]
        listen: String,
    }

    #[test]
    fn an_unknown_field_is_named_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("role.toml");
        std::fs::write(&path, "listen = 'x'\nlisten_on = 'y'\n").unwrap();
        let error = load_config::<Config>(&path).unwrap_err().to_string();
        assert!(error.contains("role.toml:2: unknown field `listen_on`"), "{error}");
        let error = load_config::<Config>(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("check --config"), "{error}");
    }
}
