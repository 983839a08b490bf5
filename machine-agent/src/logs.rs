//! Reading the logs that shims write, also while they are being written and rotated.

use std::{
    io::{self, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use tokio::{
    fs::File,
    io::{AsyncReadExt as _, AsyncSeekExt as _},
    time::sleep,
};

use crate::shim::previous_log;

const CHUNK_BYTES: usize = 64 << 10;
/// How often a followed log is looked at.
const POLL: Duration = Duration::from_millis(50);

/// Streams a log: all of it, or its last `tail` lines; then what comes, while `follow` says so.
pub(crate) fn stream(
    path: PathBuf,
    tail: Option<u32>,
    follow: impl Fn() -> bool + Send + Sync + 'static,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let reader = Reader { path, parts: Vec::new(), begun: false, ended: false };
    futures_util::stream::unfold((reader, follow), move |(mut reader, follow)| async move {
        match reader.next(tail, &follow).await {
            Ok(Some(bytes)) => Some((Ok(bytes), (reader, follow))),
            Ok(None) => None,
            Err(error) => {
                reader.ended = true;
                Some((Err(error), (reader, follow)))
            }
        }
    })
}

struct Reader {
    path: PathBuf,
    /// Parts still to be read, the next one last.
    parts: Vec<File>,
    begun: bool,
    ended: bool,
}

impl Reader {
    async fn next(&mut self, tail: Option<u32>, follow: &impl Fn() -> bool) -> io::Result<Option<Bytes>> {
        if self.ended {
            return Ok(None);
        }
        if !self.begun {
            self.begun = true;
            self.parts = open_parts(&self.path).await?;
            if let Some(lines) = tail {
                skip_to_tail(&mut self.parts, lines).await?;
            }
        }
        loop {
            // Asked before reading: what was written before the end is then read after the question.
            let goes_on = follow();
            while let Some(part) = self.parts.last_mut() {
                let mut buffer = vec![0; CHUNK_BYTES];
                let count = part.read(&mut buffer).await?;
                if count > 0 {
                    buffer.truncate(count);
                    return Ok(Some(buffer.into()));
                }
                // The last part stays open: more may come.
                if self.parts.len() == 1 {
                    break;
                }
                self.parts.pop();
            }
            // Nothing there: not written yet, or between the two steps of a rotation.
            if let Some(newest) = open(&self.path).await? {
                let same = match self.parts.last() {
                    Some(part) => inode(part).await? == inode(&newest).await?,
                    None => false,
                };
                if !same {
                    // What the old part got last is read in the next round.
                    self.parts.insert(0, newest);
                    continue;
                }
            }
            if !goes_on {
                return Ok(None);
            }
            sleep(POLL).await;
        }
    }
}

/// The parts of a log, the newest first.
async fn open_parts(path: &Path) -> io::Result<Vec<File>> {
    let Some(newest) = open(path).await? else { return Ok(Vec::new()) };
    let mut parts = vec![newest];
    if let Some(before) = open(&previous_log(path)).await? {
        // The same file where a rotation came between the two.
        if inode(&before).await? != inode(&parts[0]).await? {
            parts.push(before);
        }
    }
    Ok(parts)
}

async fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path).await {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn inode(file: &File) -> io::Result<u64> {
    Ok(file.metadata().await?.ino())
}

/// Moves to where the last lines begin, and drops the parts before.
async fn skip_to_tail(parts: &mut Vec<File>, lines: u32) -> io::Result<()> {
    let mut missing = u64::from(lines);
    for index in 0..parts.len() {
        let part = &mut parts[index];
        let mut end = part.seek(SeekFrom::End(0)).await?;
        // The line end that closes the last line isn't one that begins it.
        let mut first = true;
        while end > 0 {
            let start = end.saturating_sub(CHUNK_BYTES as u64);
            part.seek(SeekFrom::Start(start)).await?;
            let mut chunk = vec![0; usize::try_from(end - start).unwrap_or(CHUNK_BYTES)];
            part.read_exact(&mut chunk).await?;
            for (offset, byte) in chunk.iter().enumerate().rev() {
                if *byte == b'\n' && !std::mem::take(&mut first) {
                    missing = missing.saturating_sub(1);
                }
                if missing == 0 {
                    let at = start + offset as u64 + u64::from(*byte == b'\n');
                    part.seek(SeekFrom::Start(at)).await?;
                    parts.truncate(index + 1);
                    return Ok(());
                }
            }
            end = start;
        }
        // This part is wholly wanted; its first line counts too.
        missing = missing.saturating_sub(u64::from(!first));
        part.seek(SeekFrom::Start(0)).await?;
        if missing == 0 {
            parts.truncate(index + 1);
            return Ok(());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
    };

    use futures_util::StreamExt as _;

    use super::*;

    fn read(path: &Path, tail: Option<u32>) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let parts = runtime.block_on(stream(path.into(), tail, || false).collect::<Vec<_>>());
        String::from_utf8(parts.into_iter().flat_map(|part| part.unwrap().to_vec()).collect()).unwrap()
    }

    #[test]
    fn the_whole_log_or_its_tail_over_both_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(read(&path, None), "");
        fs::write(&path, "3\n4\n").unwrap();
        assert_eq!(read(&path, Some(9)), "3\n4\n");
        fs::write(previous_log(&path), "1\n2\n").unwrap();
        assert_eq!(read(&path, None), "1\n2\n3\n4\n");
        for (lines, expected) in [(0, ""), (1, "4\n"), (2, "3\n4\n"), (3, "2\n3\n4\n"), (4, "1\n2\n3\n4\n")] {
            assert_eq!(read(&path, Some(lines)), expected, "{lines}");
        }
        assert_eq!(read(&path, Some(99)), "1\n2\n3\n4\n");
        fs::write(&path, format!("{}\nend\n", "x".repeat(3 * CHUNK_BYTES))).unwrap();
        assert_eq!(read(&path, Some(1)), "end\n");
        assert_eq!(read(&path, Some(2)).len(), 3 * CHUNK_BYTES + 5);
    }

    #[test]
    fn following_goes_over_a_rotation_and_ends_with_the_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let writing = Arc::new(AtomicBool::new(true));
            let follow = writing.clone();
            let log = stream(path.clone(), None, move || follow.load(Ordering::Relaxed));
            let mut log = std::pin::pin!(log);
            fs::write(&path, "1\n").unwrap();
            assert_eq!(log.next().await.unwrap().unwrap(), "1\n");
            fs::rename(&path, previous_log(&path)).unwrap();
            fs::write(&path, "2\n").unwrap();
            assert_eq!(log.next().await.unwrap().unwrap(), "2\n");
            fs::write(&path, "2\n3\n").unwrap();
            writing.store(false, Ordering::Relaxed);
            assert_eq!(log.next().await.unwrap().unwrap(), "3\n");
            assert!(log.next().await.is_none());
        });
    }
}
