//! Serves a local file without reading it: parts of it are mapped, and the socket copies from the page cache.
//!
//! That is one copy, as with `sendfile`, where reading into a buffer makes two; on loopback and fast networks the
//! copies are most of what a download costs. Each part is brought into the page cache and the page table on a
//! blocking thread while the part before it is sent, so neither a slow disk nor a page fault holds an async thread.
//!
//! A disk that fails, or a file that was cut, shows when the part is brought in (`MADV_POPULATE_READ`, Linux 5.14) or
//! as `EFAULT` from the socket, since only the kernel reads the mapped bytes: the connection breaks off.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, stream};
use tokio::task::JoinHandle;

/// Bytes of a part. Three of one connection's parts are in memory at once: sent, ready, and the next to be.
const PART_BYTES: u64 = 1 << 20;
/// Less than this is read; a mapping costs more than the copy.
const MAP_MIN_BYTES: u64 = 64 << 10;

/// The bytes of `range`, which must lie within the file; for the kernel only.
pub(super) fn stream(file: File, range: Range<u64>) -> impl Stream<Item = io::Result<Bytes>> {
    parts(file, range, load)
}

/// The same for who looks at them: where a disk fails, touching what is mapped would be a signal that ends the process.
pub(super) fn read(file: File, range: Range<u64>) -> impl Stream<Item = io::Result<Bytes>> {
    parts(file, range, read_part)
}

type Load = fn(&File, Range<u64>) -> io::Result<Bytes>;

fn parts(file: File, range: Range<u64>, load: Load) -> impl Stream<Item = io::Result<Bytes>> {
    let mut parts = Parts { file: Arc::new(file), rest: range, load, ready: None };
    parts.ready = parts.begin_next();
    stream::try_unfold(parts, async |mut parts| {
        let Some(ready) = parts.ready.take() else { return Ok(None) };
        parts.ready = parts.begin_next();
        let bytes = ready.await.map_err(io::Error::other)??;
        Ok(Some((bytes, parts)))
    })
}

struct Parts {
    file: Arc<File>,
    rest: Range<u64>,
    load: Load,
    ready: Option<JoinHandle<io::Result<Bytes>>>,
}

impl Parts {
    fn begin_next(&mut self) -> Option<JoinHandle<io::Result<Bytes>>> {
        if self.rest.is_empty() {
            return None;
        }
        // Parts end at multiples of their size, so only the first can begin within a page.
        let end = (self.rest.start / PART_BYTES + 1).saturating_mul(PART_BYTES).min(self.rest.end);
        let part = self.rest.start..end;
        self.rest.start = end;
        let (file, load) = (self.file.clone(), self.load);
        Some(tokio::task::spawn_blocking(move || load(&file, part)))
    }
}

/// Blocking: a part's bytes, in memory.
fn load(file: &File, part: Range<u64>) -> io::Result<Bytes> {
    if part.end - part.start >= MAP_MIN_BYTES {
        match map(file, &part) {
            // A file system that can't map files.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            result => return result,
        }
    }
    read_part(file, part)
}

fn read_part(file: &File, part: Range<u64>) -> io::Result<Bytes> {
    let mut bytes = vec![0; length(&part)?];
    file.read_exact_at(&mut bytes, part.start)?;
    Ok(bytes.into())
}

fn length(part: &Range<u64>) -> io::Result<usize> {
    usize::try_from(part.end - part.start).map_err(io::Error::other)
}

fn map(file: &File, part: &Range<u64>) -> io::Result<Bytes> {
    let page = page_bytes();
    let before = part.start % page;
    let (offset, len) =
        (part.start - before, length(part)? + usize::try_from(before).map_err(io::Error::other)?);
    let mapped = Mapped::new(file, offset, len)?;
    mapped.populate()?;
    let skip = len - length(part)?;
    Ok(Bytes::from_owner(mapped).slice(skip..))
}

fn page_bytes() -> u64 {
    // SAFETY: takes and gives numbers only.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4_096)
}

/// A read-only mapping of a part of a file.
struct Mapped {
    address: NonNull<libc::c_void>,
    len: usize,
}

// SAFETY: the mapping is read-only and belongs to no thread.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    fn new(file: &File, offset: u64, len: usize) -> io::Result<Mapped> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address that the kernel chooses touches no memory of ours.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let address = NonNull::new(address).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Mapped { address, len })
    }

    /// Blocking: brings all of it into memory, or says why not.
    fn populate(&self) -> io::Result<()> {
        // SAFETY: the range is exactly this mapping.
        let result = unsafe { libc::madvise(self.address.as_ptr(), self.len, libc::MADV_POPULATE_READ) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        // Older kernels don't know it: the socket's copy brings the pages in.
        if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) }
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the mapping has `len` readable bytes until it is dropped, and content is never changed in place:
        // files are written under another name and renamed when they are complete.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr().cast(), self.len) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the range is exactly this mapping, and nothing borrows from it any more.
        if unsafe { libc::munmap(self.address.as_ptr(), self.len) } != 0 {
            tracing::error!(error = %io::Error::last_os_error(), "a mapping can't be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use futures_util::TryStreamExt as _;

    use super::*;

    #[tokio::test]
    async fn any_range_is_what_the_file_has() {
        let bytes: Vec<u8> =
            (0..2_500_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        for range in
            [0..2_500_000, 0..1, 4_095..4_097, 1_048_575..1_048_577, 1_000..1_200_000, 2_499_999..2_500_000]
        {
            let expected = &bytes[range.start as usize..range.end as usize];
            for load in [load as Load, read_part] {
                let parts = parts(file.try_clone().unwrap(), range.clone(), load);
                let parts: Vec<Bytes> = parts.try_collect().await.unwrap();
                assert!(parts.concat() == expected, "{range:?}");
            }
        }
    }

    #[tokio::test]
    async fn a_file_that_was_cut_is_an_error_and_not_a_signal() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100_000).unwrap();
        let result: io::Result<Vec<Bytes>> = stream(file, 0..500_000).try_collect().await;
        assert!(result.is_err());
    }
}
