//! JSON of the table of contents, with a bound on its entries: each takes more memory than its text.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Entry, Toc};
use crate::{Digest, Error, Result};

/// The only version there is.
const VERSION: u32 = 1;

pub(super) fn parse(json: &[u8], max_entries: usize) -> Result<Toc> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let toc = deserializer
        .deserialize_map(TocVisitor { max_entries })
        .and_then(|toc| deserializer.end().map(|()| toc))
        .map_err(|error| Error::invalid("table of contents", error.to_string()))?;
    if toc.version != VERSION {
        let why = format!("version {}, expected {VERSION}", toc.version);
        return Err(Error::invalid("table of contents", why));
    }
    Ok(toc)
}

struct TocVisitor {
    max_entries: usize,
}

impl<'de> Visitor<'de> for TocVisitor {
    type Value = Toc;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of contents")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Toc, A::Error> {
        use serde::de::Error as _;
        let (mut version, mut entries, mut tar_split_digest) = (None, None, None);
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            match &*key {
                "version" if version.is_none() => version = Some(map.next_value::<u32>()?),
                "entries" if entries.is_none() => {
                    entries = Some(map.next_value_seed(Entries(self.max_entries))?)
                }
                "tarSplitDigest" if tar_split_digest.is_none() => {
                    tar_split_digest = Some(map.next_value::<Digest>()?);
                }
                "version" | "entries" | "tarSplitDigest" => {
                    return Err(A::Error::custom(format!("{key} twice")));
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(Toc {
            version: version.ok_or_else(|| A::Error::missing_field("version"))?,
            entries: entries.ok_or_else(|| A::Error::missing_field("entries"))?,
            tar_split_digest,
        })
    }
}

struct Entries(usize);

impl<'de> DeserializeSeed<'de> for Entries {
    type Value = Vec<Entry>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<Entry>, D::Error> {
        // Go writes an empty list as null.
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<Entry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_unit<E>(self) -> Result<Vec<Entry>, E> {
        Ok(Vec::new())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<Entry>, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = sequence.next_element()? {
            if entries.len() == self.0 {
                return Err(serde::de::Error::custom(format!("more than the limit of {} entries", self.0)));
            }
            entries.push(entry);
        }
        Ok(entries)
    }
}

/// A map whose values are base64 in JSON.
pub(super) mod base64_values {
    use std::collections::BTreeMap;

    use base64::{Engine as _, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    pub(crate) fn serialize<S: Serializer>(
        values: &BTreeMap<String, Vec<u8>>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(values.iter().map(|(key, value)| (key, STANDARD.encode(value))))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<String, Vec<u8>>, D::Error> {
        let texts = Option::<BTreeMap<String, String>>::deserialize(deserializer)?.unwrap_or_default();
        texts
            .into_iter()
            .map(|(key, text)| match STANDARD.decode(&text) {
                Ok(value) => Ok((key, value)),
                Err(error) => Err(D::Error::custom(format!("attribute {key:?} is no base64: {error}"))),
            })
            .collect()
    }
}
