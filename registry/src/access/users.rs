//! The users that may do everything: a file of `user:password` lines.
//!
//! The file is made at the first start with one user `anyplace` and a random password, mode 0600. Only hashes stay in
//! memory, and comparing hashes takes the same time wherever they differ in the password.

use std::collections::HashMap;
use std::path::Path;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

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

    /// Whether this is one of them, with the right password.
    pub(crate) fn knows(&self, user: &str, password: &str) -> bool {
        self.0.get(user).is_some_and(|known| *known == hash(password))
    }
}

/// What is kept of a password.
pub(crate) fn hash(password: &str) -> [u8; 32] {
    Sha256::digest(password.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_the_right_password_is_let_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        std::fs::write(&path, "# people\nana:secret:with:colons\n").unwrap();
        let users = Users::load_or_create(&path).unwrap();
        assert!(users.knows("ana", "secret:with:colons"));
        assert!(!users.knows("ana", "secret") && !users.knows("bob", "secret:with:colons"));
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
