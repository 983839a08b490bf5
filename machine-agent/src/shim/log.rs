//! The log of a container: lines `<RFC 3339 time> <stream> <text>` in `log`, and, once that is full, the previous
//! part in `log.1`. Never more than two parts.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead as _, BufReader, Read, Write as _},
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use jiff::Timestamp;

/// Longer lines are broken; an app that writes no line ends must not fill the memory.
const MAX_LINE_BYTES: usize = 16 << 10;

/// A log that is being written.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl LogFile {
    pub(crate) fn open(path: &Path, limit: u64) -> anyhow::Result<Self> {
        let open = || {
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            let size = file.metadata()?.len();
            io::Result::Ok((file, size))
        };
        let (file, size) = open().with_context(|| format!("can't open the log {}", path.display()))?;
        Ok(Self { path: path.into(), file, size, limit })
    }

    pub(crate) fn write_line(&mut self, at: Timestamp, stream: &str, line: &[u8]) -> io::Result<()> {
        let mut bytes = format!("{at:.6} {stream} ").into_bytes();
        bytes.extend_from_slice(line);
        bytes.push(b'\n');
        let length = bytes.len() as u64;
        if self.size > 0 && self.size + length > self.limit {
            fs::rename(&self.path, previous(&self.path))?;
            self.file = OpenOptions::new().create(true).append(true).open(&self.path)?;
            self.size = 0;
        }
        // One write for each line: readers see whole lines.
        self.file.write_all(&bytes)?;
        self.size += length;
        Ok(())
    }
}

/// Where the part before the present one is.
pub(crate) fn previous(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Cuts a stream into lines until its end.
pub(crate) fn copy_lines(reader: impl Read, mut line: impl FnMut(&[u8])) {
    let mut reader = BufReader::new(reader);
    let mut buffer = Vec::new();
    loop {
        let chunk = match reader.fill_buf() {
            Ok([]) => break,
            Ok(chunk) => chunk,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        let room = MAX_LINE_BYTES - buffer.len();
        let window = &chunk[..chunk.len().min(room)];
        let (taken, complete) = match window.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end + 1, true),
            None => (window.len(), window.len() == room),
        };
        buffer.extend_from_slice(&chunk[..taken]);
        reader.consume(taken);
        if complete {
            line(buffer.strip_suffix(b"\n").unwrap_or(&buffer));
            buffer.clear();
        }
    }
    if !buffer.is_empty() {
        line(&buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_is_rotated_and_never_has_more_than_two_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/log");
        let mut log = LogFile::open(&path, 1_000).unwrap();
        for number in 0..100 {
            log.write_line(Timestamp::UNIX_EPOCH, "stdout", format!("line {number}").as_bytes()).unwrap();
        }
        drop(log);
        let (now, before) = (fs::read(&path).unwrap(), fs::read(previous(&path)).unwrap());
        assert!(now.len() <= 1_000 && before.len() <= 1_000 && before.len() > 900);
        let text = String::from_utf8([before, now].concat()).unwrap();
        let last: Vec<&str> = text.lines().collect();
        assert_eq!(last.last().unwrap(), &"1970-01-01T00:00:00.000000Z stdout line 99");
        for (line, number) in last.iter().rev().zip((0..100).rev()) {
            assert!(line.ends_with(&format!(" line {number}")), "{line}");
        }
        // A new shim goes on in the same file.
        let mut log = LogFile::open(&path, 1_000).unwrap();
        log.write_line(Timestamp::UNIX_EPOCH, "stderr", b"again").unwrap();
        assert!(
            fs::read_to_string(&path)
                .unwrap()
                .ends_with("line 99\n1970-01-01T00:00:00.000000Z stderr again\n")
        );
    }

    #[test]
    fn lines_are_cut_and_long_ones_broken() {
        let mut lines = Vec::new();
        let mut input = b"one\n\ntwo\n".to_vec();
        input.extend(vec![b'x'; MAX_LINE_BYTES + 5]);
        input.extend(b"\nlast");
        copy_lines(&input[..], |line| lines.push(line.to_vec()));
        let lengths: Vec<usize> = lines.iter().map(Vec::len).collect();
        assert_eq!(lengths, [3, 0, 3, MAX_LINE_BYTES, 5, 4]);
        assert_eq!(lines[5], b"last");
    }
}
