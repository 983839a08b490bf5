//! The tar-split: what is needed beside the files' content to rebuild the exact archive.
//!
//! JSON lines in the form of github.com/vbatts/tar-split. Type 2 is raw bytes of the archive (padding of the member
//! before and the headers of the next, or the end); type 1 stands for a member's content, with its size and a CRC-64.
//! A layer's diff id is the digest of the archive, so a puller that took files from elsewhere proves with it that it has
//! exactly the layer that the image's config names.

mod line;
mod spans;

use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Read, Write},
};

use line::{Line, LineKind};
pub(crate) use line::{write_file, write_segment};
pub use spans::{Span, SpanKind};

use crate::{
    Annotations, Digest, Entry, EntryType, Error, Limits, Result, Toc,
    tar::{Member, next_member},
};

const WHAT: &str = "tar-split";
/// Longest line in bytes: base64 of the largest raw segment (extension headers of up to 1 MiB each, or 1 MiB of the
/// archive's end).
const LINE_MAX: u64 = 8 << 20;
/// Bytes copied at once.
const COPY_BUFFER: usize = 128 << 10;

/// A verified tar-split; kept compressed, as it is larger than the table of contents.
#[derive(Clone, Debug)]
pub struct TarSplit {
    compressed: Vec<u8>,
    raw_length: u64,
}

/// Takes the tar-split: the bytes of the blob at `annotations.positions.tar_split.range()`, verified by the digest in the
/// table of contents.
///
/// # Errors
///
/// A wrong digest, a table without digest (an older dialect: pull the layer whole), more than the limits.
pub fn read_tar_split(
    compressed: Vec<u8>,
    toc: &Toc,
    annotations: &Annotations,
    limits: &Limits,
) -> Result<TarSplit> {
    annotations.positions.check(limits)?;
    let expected = toc.tar_split_digest.ok_or_else(|| {
        Error::invalid(
            WHAT,
            "the table of contents has no digest of it: an older dialect, pull the whole layer",
        )
    })?;
    let found = Digest::of(&compressed);
    if found != expected {
        return Err(Error::Digest { what: "the tar-split".into(), found, expected });
    }
    Ok(TarSplit { compressed, raw_length: annotations.positions.tar_split.raw_length })
}

impl TarSplit {
    /// The bytes of the blob's section, as they were read.
    pub fn compressed(&self) -> &[u8] {
        &self.compressed
    }

    /// Checks that it tells of exactly the members of the table of contents: the same names, kinds, sizes, owners, modes,
    /// times, link targets, devices and attributes. Otherwise a reader of the archive and a reader of the table would see
    /// different layers.
    pub fn check(&self, toc: &Toc) -> Result<()> {
        let mut pending = HashMap::with_capacity(toc.entries.len());
        for entry in toc.entries.iter().filter(|entry| entry.kind != EntryType::Chunk) {
            pending.insert(&*entry.name, entry);
        }
        let mut padding = 0;
        let mut open: Option<Member> = None;
        let mut raw = Vec::new();
        self.each(|line| match line.kind {
            LineKind::Segment => {
                if let Some(member) = &open {
                    return wrong(format!("no content of {:?} after its header", member.entry.name));
                }
                let mut rest = line.payload.get(padding..).ok_or_else(|| {
                    Error::invalid(WHAT, format!("{padding} bytes of padding, and a segment of fewer"))
                })?;
                // The archive's end, which may be cut into segments anywhere.
                if rest.iter().all(|&byte| byte == 0) {
                    padding = 0;
                    return Ok(());
                }
                raw.clear();
                let Some(member) = next_member(&mut rest, &mut raw)? else {
                    padding = 0;
                    return Ok(());
                };
                if !rest.is_empty() {
                    return wrong(format!(
                        "{} bytes after the header of {:?}",
                        rest.len(),
                        member.entry.name
                    ));
                }
                if let Some(odd) = member.odd {
                    return wrong(odd);
                }
                let Some(entry) = pending.remove(&*member.entry.name) else {
                    return wrong(format!(
                        "{:?} is not in the table of contents, or twice",
                        member.entry.name
                    ));
                };
                compare(entry, &member.entry)?;
                padding = member.padding();
                open = Some(member);
                Ok(())
            }
            LineKind::File => {
                let Some(member) = open.take() else {
                    return wrong(format!("content of {:?} without a header", line.name_lossy()));
                };
                if line.name_bytes() != member.entry.name.as_bytes() || line.size != member.payload {
                    let name = line.name_lossy();
                    let why = format!(
                        "{} bytes of {name:?}, the header says {} of {:?}",
                        line.size, member.payload, member.entry.name
                    );
                    return wrong(why);
                }
                Ok(())
            }
        })?;
        if let Some(member) = open {
            return wrong(format!("no content of {:?} after its header", member.entry.name));
        }
        match pending.keys().min() {
            None => Ok(()),
            Some(name) => {
                wrong(format!("{} entries of the table are missing, such as {name:?}", pending.len()))
            }
        }
    }

    /// Writes the archive. `open` gives the content of a regular file by its name in the table (asked for in the archive's
    /// order, for files that aren't empty); it must have exactly the file's size.
    ///
    /// Nothing here verifies the content: hash the output and compare with the layer's diff id.
    pub fn write_tar<R: Read>(
        &self,
        mut open: impl FnMut(&str) -> std::io::Result<R>,
        mut out: impl Write,
    ) -> Result<()> {
        let mut buffer = vec![0; COPY_BUFFER];
        self.each(|line| {
            if line.kind == LineKind::Segment {
                return out.write_all(&line.payload).map_err(Error::io("writing the archive"));
            }
            if line.size == 0 {
                return Ok(());
            }
            let name = line.name()?;
            let mut content = open(name).map_err(Error::io("opening a file of the layer"))?;
            let mut left = line.size;
            loop {
                let read =
                    content.read(&mut buffer).map_err(Error::io("reading a file of the layer"))? as u64;
                if read > left || (read == 0 && left > 0) {
                    return wrong(format!("{name:?} has not the expected {} bytes", line.size));
                }
                if read == 0 {
                    return Ok(());
                }
                left -= read;
                out.write_all(&buffer[..read as usize]).map_err(Error::io("writing the archive"))?;
            }
        })
    }

    /// Calls `each` for every line.
    fn each(&self, mut each: impl FnMut(Line) -> Result<()>) -> Result<()> {
        let decoder = zstd::stream::read::Decoder::new(&self.compressed[..])
            .map_err(Error::io("creating a zstd context"))?;
        let mut input = BufReader::new(decoder.take(self.raw_length.saturating_add(1)));
        let (mut text, mut total) = (Vec::new(), 0);
        loop {
            text.clear();
            let read = (&mut input)
                .take(LINE_MAX)
                .read_until(b'\n', &mut text)
                .map_err(Error::io("decoding the tar-split"))? as u64;
            total += read;
            if total > self.raw_length || (read == 0 && total != self.raw_length) {
                return wrong(format!("it has not the {} bytes that the annotation says", self.raw_length));
            }
            if read == 0 {
                return Ok(());
            }
            each(Line::parse(&text)?)?;
        }
    }
}

/// Requires that entry and header agree in what a reader of either would see.
fn compare(entry: &Entry, header: &Entry) -> Result<()> {
    let meaningful = |entry: &Entry| {
        [entry.mod_time, entry.access_time, entry.change_time]
            .map(|time| time.and_then(|time| time.meaningful()))
    };
    let field = if entry.kind != header.kind {
        "type"
    } else if entry.link_name != header.link_name {
        "link target"
    } else if entry.mode != header.mode {
        "mode"
    } else if entry.size != header.size {
        "size"
    } else if (entry.uid, entry.gid) != (header.uid, header.gid) {
        "owner"
    } else if meaningful(entry) != meaningful(header) {
        "times"
    } else if (entry.dev_major, entry.dev_minor) != (header.dev_major, header.dev_minor) {
        "device"
    } else if entry.xattrs != header.xattrs {
        "attributes"
    } else {
        return Ok(());
    };
    wrong(format!(
        "the {field} of {:?} differ between the archive's header and the table of contents",
        entry.name
    ))
}

fn wrong<T>(why: impl Into<String>) -> Result<T> {
    Err(Error::invalid(WHAT, why))
}
