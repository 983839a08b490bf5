//! The audit record: who pushed and deleted what, one JSON object a line in `audit.log` of the data folder.
//!
//! What people and machines do is under the name of their account; what retention rules delete, under [`RETENTION`].
//!
//! A full file becomes `audit.log.1`, that `audit.log.2`, and so on up to a bound. A line that can't be written is
//! counted and said in the log: the registry goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context as _;
use anyplace_registry_core::pattern::Pattern;
use serde::{Deserialize, Serialize};

use crate::storage::{Room, is_full};

/// A file of this size is closed: some 250,000 events.
const FILE_MAX_BYTES: u64 = 64 << 20;
/// Closed files that are kept.
const FILES_KEPT: u32 = 8;
/// Most events that are read at once.
pub const TAIL_MAX: usize = 10_000;

/// Who deletes by the rules of `[retention]`. No account can have this name.
pub(crate) const RETENTION: &str = "(retention)";

/// Something that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When: RFC 3339 in UTC with milliseconds, so that texts are in the order of their times.
    pub at: String,
    /// Account.
    pub account: String,
    /// Its team.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// `push-manifest`, `push-blob`, `delete-manifest`, `delete-blob`, `set-account`, `delete-account`, ...
    pub action: String,
    /// Repository, or name of what was changed.
    pub subject: String,
    /// Tag or digest as the request named it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Digest of the content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

impl Event {
    /// Whether it is about the content of a repository, and not about an account or a team.
    fn is_about_content(&self) -> bool {
        !(self.action.ends_with("-account") || self.action.ends_with("-team"))
    }
}

/// Which events are asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// None before it; written as [`Event::at`] is.
    pub(crate) since: Option<String>,
    /// Only of these repositories.
    pub(crate) repositories: Option<Pattern>,
}

impl Wanted {
    fn has(&self, event: &Event) -> bool {
        !self.is_too_old(event)
            && self
                .repositories
                .as_ref()
                .is_none_or(|pattern| event.is_about_content() && pattern.matches(&event.subject))
    }

    fn is_too_old(&self, event: &Event) -> bool {
        self.since.as_ref().is_some_and(|since| event.at < *since)
    }
}

/// The record.
pub(crate) struct Audit {
    path: PathBuf,
    open: Mutex<Open>,
    /// Events that couldn't be written.
    pub(crate) lost: AtomicU64,
    room: Arc<Room>,
}

struct Open {
    file: File,
    size: u64,
    /// Its last line has no end: a crash or a full disk cut it off.
    torn: bool,
}

impl Audit {
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Audit> {
        let path = folder.join("audit.log");
        let open = reopen(&path).with_context(|| format!("can't open {}", path.display()))?;
        let room = Arc::new(Room::elsewhere());
        Ok(Audit { path, open: Mutex::new(open), lost: AtomicU64::new(0), room })
    }

    /// The same, which writes down on a full disk too what frees room there.
    pub(crate) fn with_room(self, room: Arc<Room>) -> Audit {
        Audit { room, ..self }
    }

    /// Writes an event.
    pub(crate) fn record(&self, event: &Event) {
        if let Err(error) = self.write(event) {
            self.lost.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%error, ?event, "an event is missing in the audit record");
        }
    }

    fn write(&self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.torn {
            line.insert(0, b'\n');
        }
        if open.size + line.len() as u64 > FILE_MAX_BYTES {
            for number in (1..FILES_KEPT).rev() {
                let _ = std::fs::rename(self.numbered(number), self.numbered(number + 1));
            }
            std::fs::rename(&self.path, self.numbered(1))?;
            *open = reopen(&self.path)?;
        }
        // One write for each line, so that a reader sees whole lines.
        let mut written = open.file.write_all(&line);
        if written.as_ref().is_err_and(is_full) && self.room.give() {
            // After what of it was written.
            line.insert(0, b'\n');
            written = open.file.write_all(&line);
        }
        open.torn = written.is_err();
        written?;
        open.size += line.len() as u64;
        Ok(())
    }

    fn numbered(&self, number: u32) -> PathBuf {
        self.path.with_extension(format!("log.{number}"))
    }

    /// The last of the wanted events, oldest first.
    pub(crate) fn tail(&self, count: usize, of: &Wanted) -> io::Result<Vec<Event>> {
        let count = count.min(TAIL_MAX);
        let mut events: Vec<Event> = Vec::new();
        let files =
            std::iter::once(self.path.clone()).chain((1..=FILES_KEPT).map(|number| self.numbered(number)));
        for path in files {
            if events.len() >= count {
                break;
            }
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            };
            let wanted = count - events.len();
            let mut last = std::collections::VecDeque::new();
            let mut goes_back_far_enough = false;
            for line in BufReader::new(file).split(b'\n') {
                // A line that a crash cut off, perhaps within a character, says nothing.
                let Ok(event) = serde_json::from_slice::<Event>(&line?) else { continue };
                goes_back_far_enough |= of.is_too_old(&event);
                if !of.has(&event) {
                    continue;
                }
                last.push_back(event);
                if last.len() > wanted {
                    last.pop_front();
                }
            }
            events.splice(0..0, last);
            // Files before this one are older still.
            if goes_back_far_enough {
                break;
            }
        }
        Ok(events)
    }
}

fn reopen(path: &Path) -> io::Result<Open> {
    use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
    let file = OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)?;
    let size = file.metadata()?.len();
    let mut end = *b"\n";
    if let Some(last) = size.checked_sub(1) {
        file.read_exact_at(&mut end, last)?;
    }
    Ok(Open { file, size, torn: end != *b"\n" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(number: usize) -> Event {
        Event {
            at: "2026-11-24T00:00:00Z".into(),
            account: "ana".into(),
            team: None,
            action: "push-manifest".into(),
            subject: format!("app-{number}"),
            reference: None,
            digest: None,
        }
    }

    #[test]
    fn events_are_read_back_over_a_restart_and_a_cut_line() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        (0..3).for_each(|number| audit.record(&event(number)));
        drop(audit);
        let mut file = OpenOptions::new().append(true).open(dir.path().join("audit.log")).unwrap();
        file.write_all(b"{\"at\":\"20\xc3").unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        audit.record(&event(3));
        let subjects = |count| {
            audit
                .tail(count, &Wanted::default())
                .unwrap()
                .into_iter()
                .map(|it| it.subject)
                .collect::<Vec<_>>()
        };
        assert_eq!(subjects(2), ["app-2", "app-3"]);
        assert_eq!(subjects(100).len(), 4);
    }

    #[test]
    fn a_line_that_a_full_disk_cut_off_doesnt_hide_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        audit.record(&event(0));
        {
            // As if the disk had been full after some bytes; then a write fails whole.
            let mut open = audit.open.lock().unwrap();
            open.file.write_all(b"{\"at\":\"20").unwrap();
            open.file = OpenOptions::new().append(true).open("/dev/full").unwrap();
        }
        audit.record(&event(1));
        assert_eq!(audit.lost.load(Ordering::Relaxed), 1);
        audit.open.lock().unwrap().file = reopen(&audit.path).unwrap().file;
        audit.record(&event(2));
        let subjects: Vec<_> =
            audit.tail(9, &Wanted::default()).unwrap().into_iter().map(|it| it.subject).collect();
        assert_eq!(subjects, ["app-0", "app-2"]);
    }

    #[test]
    fn a_full_file_is_closed_and_the_oldest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        for number in 0..12 {
            audit.open.lock().unwrap().size = FILE_MAX_BYTES;
            audit.record(&event(number));
        }
        let kept = audit.tail(100, &Wanted::default()).unwrap();
        assert_eq!(kept.len(), 1 + FILES_KEPT as usize);
        assert_eq!(kept.last().unwrap().subject, "app-11");
    }

    #[test]
    fn events_are_picked_by_time_and_repository_over_closed_files() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path()).unwrap();
        for number in 0..6 {
            audit.open.lock().unwrap().size = FILE_MAX_BYTES;
            audit.record(&Event { at: format!("2026-11-24T00:00:0{number}.000Z"), ..event(number) });
        }
        audit.record(&Event { at: "2026-11-24T00:00:06.000Z".into(), action: "set-team".into(), ..event(4) });
        let subjects = |count, since: Option<&str>, pattern: Option<&str>| {
            let repositories = pattern.map(|pattern| Pattern::try_from(pattern.to_owned()).unwrap());
            let wanted = Wanted { since: since.map(str::to_owned), repositories };
            audit.tail(count, &wanted).unwrap().into_iter().map(|it| it.subject).collect::<Vec<_>>()
        };
        assert_eq!(subjects(9, Some("2026-11-24T00:00:04.000Z"), None), ["app-4", "app-5", "app-4"]);
        assert_eq!(subjects(9, Some("2026-11-24T00:00:03.500Z"), Some("app-4")), ["app-4"]);
        assert_eq!(subjects(2, None, Some("app-?")), ["app-4", "app-5"]);
    }
}
