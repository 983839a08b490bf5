//! Content digests: `sha256:` and 64, or `sha512:` and 128 lower-case hexadecimal digits.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::digest::common::hazmat::{SerializableState, SerializedState};
use sha2::{Digest as _, Sha256, Sha512};

use crate::error::Error;

/// The algorithms that the OCI image specification registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// What everything uses unless it is asked for another.
    #[default]
    Sha256,
    /// Optional in the specification.
    Sha512,
}

impl Algorithm {
    /// All of them.
    pub const ALL: [Algorithm; 2] = [Algorithm::Sha256, Algorithm::Sha512];

    /// Its name, the part of a digest before the colon.
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::Sha256 => "sha256",
            Algorithm::Sha512 => "sha512",
        }
    }

    /// Hexadecimal digits of its digests.
    pub fn hex_len(self) -> usize {
        match self {
            Algorithm::Sha256 => 64,
            Algorithm::Sha512 => 128,
        }
    }

    /// A hasher of this algorithm.
    pub fn hasher(self) -> Hasher {
        match self {
            Algorithm::Sha256 => Hasher(State::Sha256(Sha256::new())),
            Algorithm::Sha512 => Hasher(State::Sha512(Box::new(Sha512::new()))),
        }
    }

    /// The digest of `bytes` by this algorithm.
    pub fn digest(self, bytes: &[u8]) -> Digest {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finish()
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Algorithm {
    type Err = Error;

    fn from_str(text: &str) -> Result<Algorithm, Error> {
        Algorithm::ALL.into_iter().find(|algorithm| algorithm.as_str() == text).ok_or_else(|| {
            let reason = "the algorithm is neither sha256 nor sha512".to_owned();
            Error::InvalidDigest { text: text.to_owned(), reason }
        })
    }
}

/// The digest of some content, known to be well formed.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The sha256 digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Digest {
        Algorithm::Sha256.digest(bytes)
    }

    /// The sha256 digest with these bytes.
    pub(crate) fn from_sha256(bytes: [u8; 32]) -> Digest {
        Digest(format!("sha256:{}", hex::encode(bytes)))
    }

    /// The algorithm's name, the part before the colon.
    pub fn algorithm(&self) -> &str {
        self.kind().as_str()
    }

    /// The algorithm.
    pub fn kind(&self) -> Algorithm {
        if self.0.starts_with("sha512:") { Algorithm::Sha512 } else { Algorithm::Sha256 }
    }

    /// The hexadecimal part, after the colon.
    pub fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, hex)| hex)
    }

    /// The first twelve hexadecimal digits, for people.
    pub fn short(&self) -> &str {
        &self.hex()[..12]
    }

    /// The digest as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// A hasher of this digest's algorithm, to verify content while it streams by.
    pub fn hasher(&self) -> Hasher {
        self.kind().hasher()
    }

    /// The digest of `bytes` by this digest's algorithm: equal to this one if they are its content.
    pub fn same_of(&self, bytes: &[u8]) -> Digest {
        self.kind().digest(bytes)
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Digest, Error> {
        let invalid = |reason: String| Error::InvalidDigest { text: text.to_owned(), reason };
        let (algorithm, hex) =
            text.split_once(':').ok_or_else(|| invalid("no `:` after the algorithm".to_owned()))?;
        let algorithm: Algorithm = algorithm
            .parse()
            .map_err(|_| invalid("the algorithm is neither sha256 nor sha512".to_owned()))?;
        let len = algorithm.hex_len();
        if hex.len() != len || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(invalid(format!("expected {len} lower-case hexadecimal digits")));
        }
        Ok(Digest(text.to_owned()))
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Digest, Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Computes a digest over content that streams by.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(Sha256),
    Sha512(Box<Sha512>),
}

impl Hasher {
    /// A sha256 hasher.
    pub fn sha256() -> Hasher {
        Algorithm::Sha256.hasher()
    }

    /// Takes the next bytes of the content.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(bytes),
            State::Sha512(state) => state.update(bytes),
        }
    }

    /// The algorithm.
    pub fn algorithm(&self) -> Algorithm {
        match &self.0 {
            State::Sha256(_) => Algorithm::Sha256,
            State::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// What it has taken so far, in a form that [`Hasher::restore`] goes on from. It gives the content's last bytes
    /// away, and is no digest.
    pub fn save(&self) -> Vec<u8> {
        match &self.0 {
            State::Sha256(state) => state.serialize().to_vec(),
            State::Sha512(state) => state.serialize().to_vec(),
        }
    }

    /// The hasher that was saved, unless it isn't one of this algorithm.
    pub fn restore(algorithm: Algorithm, saved: &[u8]) -> Option<Hasher> {
        Some(Hasher(match algorithm {
            Algorithm::Sha256 => State::Sha256(restored(saved)?),
            Algorithm::Sha512 => State::Sha512(Box::new(restored(saved)?)),
        }))
    }

    /// The digest of all that was taken.
    pub fn finish(self) -> Digest {
        Digest(match self.0 {
            State::Sha256(state) => format!("sha256:{}", hex::encode(state.finalize())),
            State::Sha512(state) => format!("sha512:{}", hex::encode(state.finalize())),
        })
    }
}

fn restored<H: SerializableState>(saved: &[u8]) -> Option<H> {
    H::deserialize(&SerializedState::<H>::try_from(saved).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_saved_hasher_goes_on_where_it_was() {
        let bytes: Vec<u8> = (0..1000_u32).map(|n| n as u8).collect();
        for algorithm in Algorithm::ALL {
            for at in [0, 1, 63, 64, 65, 127, 128, 999] {
                let mut hasher = algorithm.hasher();
                hasher.update(&bytes[..at]);
                let mut restored = Hasher::restore(algorithm, &hasher.save()).unwrap();
                restored.update(&bytes[at..]);
                assert_eq!(restored.finish(), algorithm.digest(&bytes));
            }
            assert!(Hasher::restore(algorithm, b"x").is_none());
        }
    }

    #[test]
    fn digest_of_nothing_is_the_published_one() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").as_str(), empty);
        assert_eq!(empty.parse::<Digest>().unwrap().short(), "e3b0c44298fc");
        let empty = Algorithm::Sha512.digest(b"");
        assert_eq!(empty.hex().len(), 128);
        assert!(
            empty
                .as_str()
                .starts_with("sha512:cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce")
        );
        assert_eq!(empty.as_str().parse::<Digest>().unwrap(), empty);
        assert_eq!((empty.algorithm(), empty.same_of(b"") == empty), ("sha512", true));
    }

    #[test]
    fn malformed_digests_are_refused() {
        for bad in ["", "sha256", "sha256:", "sha256:00", "sha512:00", "md5:d41d8cd98f00b204e9800998ecf8427e"]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        let upper = "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855";
        assert!(upper.parse::<Digest>().is_err());
    }
}
