//! The flow log: what the eBPF programs tell of flows, as lines of JSON in files that are bounded in size and number.
//!
//! ```text
//! {"time":"2026-11-29T18:00:00.123456789Z","outcome":"established","client":"198.51.100.9:4000",
//!  "vip":"203.0.113.1:80","protocol":"tcp","instance":"web-ams-1","address":"10.1.1.65"}
//! ```
//!
//! While the disk takes nothing, nothing is read: the ring buffer in the kernel fills, and what finds no room there is
//! counted as lost. So events wait in one place only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use anyplace_ebpf::{FlowEvent, FlowEvents};
use anyplace_model::InstanceId;
use jiff::Timestamp;
use serde::Serialize;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use crate::{FlowLogConfig, plane::Names};

/// How soon a disk that took nothing is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Events of one write: bounds what is in memory.
const BATCH: usize = 256;
/// Writes at the end: all that the ring buffer can hold. What comes meanwhile is the next router's.
const LAST_BATCHES: usize = 16;

/// A line.
#[derive(Serialize)]
struct Line<'a> {
    time: Timestamp,
    outcome: &'static str,
    client: SocketAddr,
    vip: SocketAddr,
    protocol: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance: Option<&'a InstanceId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<Ipv4Addr>,
}

/// Writes what is told until the shutdown, and what was told before it.
pub async fn run(events: FlowEvents, mut log: Log, names: Names, shutdown: CancellationToken) {
    // SAFETY: it owns its descriptor, and never replaces it.
    let mut events = match unsafe { AsyncFd::register(events) }.map_err(io::Error::from) {
        Ok(events) => events,
        Err(error) => return tracing::warn!(%error, "no flow log: its events can't be waited for"),
    };
    let mut ends = false;
    while !ends {
        let ready = tokio::select! {
            ready = events.readable_mut() => Some(ready),
            () = shutdown.cancelled() => None,
        };
        ends = !matches!(ready, Some(Ok(_)));
        if let Some(Ok(mut ready)) = ready {
            // Before reading: what comes meanwhile is told again.
            ready.clear_ready();
        }
        for _ in 0..if ends { LAST_BATCHES } else { usize::MAX } {
            // Events that come faster than they are written don't keep the router from ending.
            if !ends && shutdown.is_cancelled() {
                break;
            }
            let lines = lines(events.get_mut(), &names);
            if lines.is_empty() {
                break;
            }
            match write(log, lines, &shutdown).await {
                Some(kept) => log = kept,
                None => return,
            }
        }
    }
}

/// Some events as lines; none if there are none.
fn lines(events: &mut FlowEvents, names: &Names) -> Vec<Vec<u8>> {
    let names = names.get();
    events
        .take(BATCH)
        .filter_map(|event| line(&event, event.instance.and_then(|it| names.get(&it))))
        .collect()
}

fn line(event: &FlowEvent, instance: Option<&InstanceId>) -> Option<Vec<u8>> {
    let line = Line {
        time: Timestamp::try_from(event.time).ok()?,
        outcome: event.outcome.name(),
        client: event.client,
        vip: SocketAddr::new(event.vip.address, event.vip.port),
        protocol: event.vip.protocol.to_string(),
        instance,
        address: event.instance,
    };
    let mut text = serde_json::to_vec(&line).ok()?;
    text.push(b'\n');
    Some(text)
}

/// Writes lines, however long it takes; nothing if the shutdown came first.
async fn write(mut log: Log, mut lines: Vec<Vec<u8>>, shutdown: &CancellationToken) -> Option<Log> {
    let mut failing = false;
    loop {
        let attempt = tokio::task::spawn_blocking(move || {
            let result = log.append(&mut lines);
            (log, lines, result)
        });
        let result;
        (log, lines, result) = attempt.await.ok()?;
        let Err(error) = result else { return Some(log) };
        if !std::mem::replace(&mut failing, true) {
            let path = log.path.display();
            tracing::warn!("flow log: can't write {path}: {error}; trying again, events may be lost");
        }
        tokio::select! {
            () = shutdown.cancelled() => return None,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Files of lines, of which the oldest go.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file_bytes: u64,
    files: u32,
    /// `None` after a failure.
    file: Option<(File, u64)>,
}

impl Log {
    /// Goes on with the file that is there.
    ///
    /// # Errors
    /// The file can't be opened, or a field is out of its range.
    pub fn open(config: &FlowLogConfig, data_dir: &Path) -> anyhow::Result<Self> {
        config.check()?;
        let path = config.path.clone().unwrap_or_else(|| data_dir.join("flows.jsonl"));
        let mut log = Self { path, file_bytes: config.file_size.0, files: config.files, file: None };
        log.file = Some(
            log.open_file()
                .with_context(|| format!("can't open {}; check flow_log.path", log.path.display()))?,
        );
        log.remove_beyond();
        Ok(log)
    }

    /// Appends lines and forgets those that were written; an error leaves the others.
    fn append(&mut self, lines: &mut Vec<Vec<u8>>) -> io::Result<()> {
        let mut done = 0;
        let result = lines.iter().try_for_each(|line| {
            self.append_line(line)?;
            done += 1;
            Ok(())
        });
        lines.drain(..done);
        result
    }

    fn append_line(&mut self, line: &[u8]) -> io::Result<()> {
        let (mut file, mut length) = match self.file.take() {
            Some(open) => open,
            None => self.open_file()?,
        };
        if length > 0 && length + line.len() as u64 > self.file_bytes {
            self.rotate()?;
            (file, length) = self.open_file()?;
        }
        if let Err(error) = file.write_all(line) {
            // No half of a line in front of the next.
            let _ = file.set_len(length);
            return Err(error);
        }
        self.file = Some((file, length + line.len() as u64));
        Ok(())
    }

    fn open_file(&self) -> io::Result<(File, u64)> {
        let file = OpenOptions::new().append(true).create(true).open(&self.path)?;
        let length = file.metadata()?.len();
        Ok((file, length))
    }

    /// Each file becomes the next older one; the oldest goes.
    fn rotate(&self) -> io::Result<()> {
        for number in (0..self.files - 1).rev() {
            match fs::rename(self.numbered(number), self.numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// What an earlier run with more files left.
    fn remove_beyond(&self) {
        (self.files..)
            .map(|number| self.numbered(number))
            .take_while(|path| fs::remove_file(path).is_ok())
            .count();
    }

    fn numbered(&self, number: u32) -> PathBuf {
        if number == 0 {
            return self.path.clone();
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{number}"));
        path.into()
    }
}

#[cfg(test)]
mod tests {
    use anyplace_model::Bytes;

    use super::*;

    fn config(text: &str) -> FlowLogConfig {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn files_are_bounded_in_size_and_number_and_the_newest_lines_stay() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(r#"{"file_size": "4Ki", "files": 3}"#);
        let line = |number: u32| format!("{number:0>99}\n").into_bytes();
        let mut written = 0;
        // Twice, as after a restart; more than all files take.
        for _ in 0..2 {
            let mut log = Log::open(&config, folder.path()).unwrap();
            for _ in 0..20 {
                let mut lines = (written..written + 7).map(line).collect();
                log.append(&mut lines).unwrap();
                assert!(lines.is_empty());
                written += 7;
            }
        }
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        let files = [read("flows.jsonl.2"), read("flows.jsonl.1"), read("flows.jsonl")];
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), files.len());
        assert!(files.iter().all(|file| file.len() <= 4_096), "{:?}", files.each_ref().map(Vec::len));
        let kept: Vec<u8> = files.concat();
        let first = written - kept.len() as u32 / 100;
        assert_eq!(kept, (first..written).flat_map(line).collect::<Vec<u8>>());
        assert!(kept.len() > 2 * 4_000, "two full files and a begun one: {}", kept.len());

        // With fewer files, the others go.
        let fewer = FlowLogConfig { files: 1, ..config };
        let mut log = Log::open(&fewer, folder.path()).unwrap();
        log.append(&mut (0..100).map(line).collect()).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_disk_that_takes_nothing_costs_no_line() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("there");
        let path = place.join("log");
        fs::create_dir(&place).unwrap();
        let config = FlowLogConfig { path: Some(path.clone()), ..config(r#"{"file_size": "4Ki"}"#) };
        let mut log = Log::open(&config, folder.path()).unwrap();
        let mut lines: Vec<Vec<u8>> =
            (0..100).map(|number| format!("{number:0>99}\n").into_bytes()).collect();
        let all = lines.concat();
        // Full after forty lines, and nowhere to open the next.
        fs::remove_dir_all(&place).unwrap();
        log.append(&mut lines).unwrap_err();
        let lost = 100 - lines.len();
        assert_eq!(lost, 40, "those in the file that was removed");
        log.append(&mut lines).unwrap_err();
        fs::create_dir(&place).unwrap();
        log.append(&mut lines).unwrap();
        assert!(lines.is_empty());
        let numbered = [fs::read(place.join("log.1")).unwrap(), fs::read(&path).unwrap()].concat();
        assert_eq!(numbered, all[lost * 100..]);
    }

    #[test]
    fn what_makes_no_log_is_refused_with_the_field() {
        let refused = |text| config(text).check().unwrap_err().to_string();
        assert!(refused(r#"{"file_size": "1Ki"}"#).starts_with("flow_log.file_size is 1Ki; set it to 4Ki"));
        assert!(refused(r#"{"files": 0}"#).starts_with("flow_log.files is 0; set it to 1 to"));
        assert!(serde_json::from_str::<FlowLogConfig>(r#"{"one_in": 0}"#).is_err());
        let default = config("{}");
        default.check().unwrap();
        assert_eq!((default.one_in.get(), default.file_size, default.files), (1_000, Bytes(16 << 20), 4));
    }
}
