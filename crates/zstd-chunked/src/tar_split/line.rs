//! One line of the tar-split.

use std::{borrow::Cow, io::Write};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// What a line stands for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LineKind {
    /// A member's content.
    File,
    /// Raw bytes of the archive.
    Segment,
}

/// A line.
pub(crate) struct Line {
    pub(crate) kind: LineKind,
    pub(crate) size: u64,
    /// Raw bytes, or a CRC-64 (big-endian) of the content.
    pub(crate) payload: Vec<u8>,
    name: String,
    name_raw: Option<Vec<u8>>,
}

/// As JSON, in the order of fields that Go writes.
#[derive(Serialize, Deserialize)]
struct Json<'a> {
    #[serde(rename = "type")]
    kind: u8,
    #[serde(default, borrow, skip_serializing_if = "str::is_empty")]
    name: Cow<'a, str>,
    #[serde(default, borrow, skip_serializing_if = "Option::is_none")]
    name_raw: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "is_zero")]
    size: u64,
    #[serde(default, borrow)]
    payload: Option<Cow<'a, str>>,
    position: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Line {
    pub(super) fn parse(text: &[u8]) -> Result<Self> {
        let wrong = |why: String| Error::invalid("a line of the tar-split", why);
        let json: Json<'_> = serde_json::from_slice(text).map_err(|error| wrong(error.to_string()))?;
        let kind = match json.kind {
            1 => LineKind::File,
            2 => LineKind::Segment,
            other => return Err(wrong(format!("type {other}, expected 1 or 2"))),
        };
        let decode = |text: &str| STANDARD.decode(text).map_err(|error| wrong(error.to_string()));
        Ok(Self {
            kind,
            size: json.size,
            payload: json.payload.as_deref().map(decode).transpose()?.unwrap_or_default(),
            name: json.name.into_owned(),
            name_raw: json.name_raw.as_deref().map(decode).transpose()?.filter(|raw| !raw.is_empty()),
        })
    }

    /// The name, of which there may be a form for what isn't UTF-8.
    pub(super) fn name_bytes(&self) -> &[u8] {
        self.name_raw.as_deref().unwrap_or(self.name.as_bytes())
    }

    pub(super) fn name(&self) -> Result<&str> {
        std::str::from_utf8(self.name_bytes())
            .map_err(|_| Error::invalid("a line of the tar-split", format!("name {:?}", self.name_lossy())))
    }

    pub(super) fn name_lossy(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(self.name_bytes())
    }
}

/// Writes a line of raw bytes.
pub(crate) fn write_segment(out: &mut impl Write, position: u64, bytes: &[u8]) -> std::io::Result<()> {
    let payload = Some(STANDARD.encode(bytes).into());
    write(out, &Json { kind: 2, name: "".into(), name_raw: None, size: 0, payload, position })
}

/// Writes a line for a member's content.
pub(crate) fn write_file(
    out: &mut impl Write,
    position: u64,
    name: &str,
    size: u64,
    crc: u64,
) -> std::io::Result<()> {
    let payload = (size > 0).then(|| STANDARD.encode(crc.to_be_bytes()).into());
    write(out, &Json { kind: 1, name: name.into(), name_raw: None, size, payload, position })
}

fn write(out: &mut impl Write, line: &Json<'_>) -> std::io::Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    out.write_all(b"\n")
}
