//! Bearer tokens: what an account may do, for some minutes, signed by the registry's own key.
//!
//! Layout: `<payload>.<signature>`, both base64url without padding; the payload is JSON ([`Claims`]), the signature
//! HMAC-SHA256 over the encoded payload. Clients take a token as it is. All processes on one store share the key, so
//! that a token of one is good at the others.

use anyplace_registry_core::access::Scope;
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

/// Longer ones are none of ours.
const TOKEN_MAX_BYTES: usize = 16 << 10;
/// How far the clocks of registries on one store may differ, in seconds.
const AHEAD_MAX_S: u64 = 120;

/// What a token says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claims {
    /// Name of the account; empty for anyone.
    pub(crate) account: String,
    /// Its team.
    pub(crate) team: Option<String>,
    /// What it allows.
    pub(crate) scopes: Vec<Scope>,
    /// When it was made, in seconds since 1970.
    pub(crate) issued_s: u64,
    /// Until when, in seconds since 1970.
    pub(crate) expires_s: u64,
}

/// Why a token is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    Foreign,
    Expired,
    /// It is to be made yet: a clock was set back since, or another registry's is ahead.
    Early,
}

/// Signs and reads tokens.
pub(crate) struct Signer(Hmac<Sha256>);

impl Signer {
    pub(crate) fn new(key: &[u8; 64]) -> Signer {
        Signer(Hmac::new(key.into()))
    }

    pub(crate) fn sign(&self, claims: &Claims) -> Result<String, serde_json::Error> {
        let payload = BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(claims)?);
        let signature = self.0.clone().chain_update(&payload).finalize().into_bytes();
        Ok(format!("{payload}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature)))
    }

    pub(crate) fn read(&self, token: &str, now_s: u64) -> Result<Claims, Bad> {
        if token.len() > TOKEN_MAX_BYTES {
            return Err(Bad::Foreign);
        }
        let (payload, signature) = token.split_once('.').ok_or(Bad::Foreign)?;
        let decode = |text: &str| BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| Bad::Foreign);
        // Compares in constant time.
        self.0.clone().chain_update(payload).verify_slice(&decode(signature)?).map_err(|_| Bad::Foreign)?;
        let claims: Claims = serde_json::from_slice(&decode(payload)?).map_err(|_| Bad::Foreign)?;
        if claims.issued_s > now_s.saturating_add(AHEAD_MAX_S) {
            // It would be good for longer than tokens are.
            return Err(Bad::Early);
        }
        if claims.expires_s <= now_s { Err(Bad::Expired) } else { Ok(claims) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_own_tokens_are_read_and_only_while_they_are_good() {
        let signer = Signer::new(&[7; 64]);
        let claims = Claims {
            account: "ana".into(),
            team: None,
            scopes: vec!["repository:a:pull".parse().unwrap()],
            issued_s: 1_000,
            expires_s: 1_300,
        };
        let token = signer.sign(&claims).unwrap();
        assert_eq!(signer.read(&token, 1_299), Ok(claims.clone()));
        assert_eq!(signer.read(&token, 1_300), Err(Bad::Expired));
        assert_eq!(signer.read(&token, 1_000 - AHEAD_MAX_S), Ok(claims));
        assert_eq!(signer.read(&token, 999 - AHEAD_MAX_S), Err(Bad::Early));
        assert_eq!(Signer::new(&[8; 64]).read(&token, 1_000), Err(Bad::Foreign));
        for at in 0..token.len() {
            let mut bytes = token.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            // The last character of each part may carry bits that mean nothing; the decoder refuses those.
            assert_eq!(signer.read(&changed, 1_000), Err(Bad::Foreign), "byte {at}");
        }
        for text in ["", ".", "a.b", &"x".repeat(TOKEN_MAX_BYTES + 1)] {
            assert_eq!(signer.read(text, 0), Err(Bad::Foreign));
        }
    }
}
