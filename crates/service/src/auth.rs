//! Bearer tokens: how they are made, kept and compared. Servers keep hashes only.

use std::path::{Path, PathBuf};

use axum::http::{HeaderMap, header::AUTHORIZATION};
use sha2::{Digest, Sha256};

use crate::write_atomically;

/// Bytes of randomness in a token.
const TOKEN_BYTES: usize = 32;

/// SHA-256 of a token. Tokens are random, so a plain hash can't be guessed back; comparing hashes of secrets
/// leaks nothing useful through timing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenHash(String);

impl TokenHash {
    /// The hash of a token.
    pub fn of(token: &str) -> Self {
        Self(hex::encode(Sha256::digest(token.as_bytes())))
    }

    /// In hexadecimal, as a storage key.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A new random token: `ap_` and 64 hexadecimal digits.
pub fn generate_token() -> String {
    let bytes: [u8; TOKEN_BYTES] = rand::random();
    format!("ap_{}", hex::encode(bytes))
}

/// The token in the `Authorization: Bearer` header.
pub fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Why a token file can't be used.
#[derive(Debug, thiserror::Error)]
#[error("the token file {path} can't be used ({reason}); {fix}", path = path.display())]
pub struct TokenFileError {
    path: PathBuf,
    reason: String,
    fix: &'static str,
}

/// Reads a token from a file.
///
/// # Errors
/// The file can't be read, or is empty.
pub fn read_token(path: &Path) -> Result<String, TokenFileError> {
    let failed = |reason: String| TokenFileError {
        path: path.into(),
        reason,
        fix: "make one with `anyplace token create`, or copy the one that the server made at its first start",
    };
    let text = std::fs::read_to_string(path).map_err(|error| failed(error.to_string()))?;
    match text.trim() {
        "" => Err(failed("it is empty".into())),
        token => Ok(token.to_string()),
    }
}

/// Reads the token file, or makes it (mode 0600) with a new token where it doesn't exist.
///
/// # Errors
/// The file can't be read or written.
pub fn load_or_create_token(path: &Path) -> Result<String, TokenFileError> {
    if path.exists() {
        return read_token(path);
    }
    let token = generate_token();
    write_atomically(path, format!("{token}\n").as_bytes(), 0o600).map_err(|error| TokenFileError {
        path: path.into(),
        reason: error.to_string(),
        fix: "check that data_dir exists and can be written",
    })?;
    Ok(token)
}
