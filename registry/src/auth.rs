//! Who may use the registry: Basic authentication against a file of `user:password` lines.
//!
//! The file is made at the first start with one user `anyplace` and a random password, mode 0600. Only hashes stay in
//! memory, and comparing hashes takes the same time wherever they differ in the password.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest as _, Sha256};

use crate::errors::Refusal;

/// Bytes of randomness in the first password.
const PASSWORD_BYTES: usize = 24;

/// The users that may do everything.
#[derive(Debug)]
pub(crate) struct Users(HashMap<String, [u8; 32]>);

impl Users {
    /// Reads the file, or makes it where it isn't.
    pub(crate) fn load_or_create(path: &Path) -> anyhow::Result<Users> {
        if !path.exists() {
            let password: [u8; PASSWORD_BYTES] = rand::random();
            let line = format!("anyplace:{}\n", hex::encode(password));
            anyplace_service::write_atomically(path, line.as_bytes(), 0o600)
                .with_context(|| format!("can't make the credentials file {}", path.display()))?;
            tracing::info!(path = %path.display(), "made a user `anyplace` with a random password");
        }
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("can't read the credentials file {}", path.display()))?;
        let mut users = HashMap::new();
        for (number, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (user, password) = line
                .split_once(':')
                .filter(|(u, p)| !u.is_empty() && !p.is_empty())
                .with_context(|| format!("{}:{}: expected `user:password`", path.display(), number + 1))?;
            users.insert(user.to_owned(), hash(password));
        }
        anyhow::ensure!(
            !users.is_empty(),
            "the credentials file {} has no user; add a line `user:password`, or remove it for a new one",
            path.display()
        );
        Ok(Users(users))
    }

    /// The user's name, or the refusal.
    pub(crate) fn check(&self, headers: &HeaderMap) -> Result<String, Refusal> {
        self.user(headers).ok_or_else(|| {
            let message = "a user and password are needed; see the registry's credentials file";
            Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message)
                .header(WWW_AUTHENTICATE, "Basic realm=\"anyplace registry\"")
        })
    }

    fn user(&self, headers: &HeaderMap) -> Option<String> {
        let (scheme, encoded) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let decoded = String::from_utf8(BASE64_STANDARD.decode(encoded.trim()).ok()?).ok()?;
        let (user, password) = decoded.split_once(':')?;
        (*self.0.get(user)? == hash(password)).then(|| user.to_owned())
    }
}

fn hash(password: &str) -> [u8; 32] {
    Sha256::digest(password.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn header(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn only_the_right_password_is_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        std::fs::write(&path, "# people\nana:secret:with:colons\n").unwrap();
        let users = Users::load_or_create(&path).unwrap();
        let good = BASE64_STANDARD.encode("ana:secret:with:colons");
        assert_eq!(users.check(&header(&format!("Basic {good}"))).unwrap(), "ana");
        for bad in [
            "Basic".to_owned(),
            "Basic !!".to_owned(),
            format!("Bearer {good}"),
            format!("Basic {}", BASE64_STANDARD.encode("ana:secret")),
            format!("Basic {}", BASE64_STANDARD.encode("bob:secret:with:colons")),
        ] {
            assert!(users.check(&header(&bad)).is_err(), "{bad}");
        }
        assert!(users.check(&HeaderMap::new()).is_err());
    }

    #[test]
    fn the_first_start_makes_a_private_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        Users::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let made = std::fs::read_to_string(&path).unwrap();
        Users::load_or_create(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), made);
        std::fs::write(&path, "nonsense\n").unwrap();
        assert!(
            Users::load_or_create(&path).unwrap_err().to_string().contains(":1: expected `user:password`")
        );
    }
}
