//! The routes as last seen, on disk: a log of changes, and in memory only where each VIP's newest line stands.
//!
//! ```text
//! {"key":"vips/203.0.113.1","value":{"vip":{...}}}     a line for each change, as the watch names it
//! {"key":"vips/203.0.113.1"}                           gone
//! ```
//!
//! A location may have a hundred thousand VIPs with dozens of instances each; their records would take a few hundred
//! megabytes, and are needed once for each change. A line that was cut off by a crash is left out at the next start:
//! the location scheduler sends it again. Nothing is synced, since the log saves only time.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    hash::{DefaultHasher, Hasher as _},
    io::{self, BufRead as _, BufReader, BufWriter, Read as _, Seek as _, SeekFrom, Write as _},
    net::IpAddr,
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

use anyplace_api::WatchEvent;
use anyplace_model::{Announcement, Route, RouteRecord};
use serde::{Deserialize, Serialize};

use crate::plane::Change;

/// The log is written anew when more than half of it, and more than this, is out of date.
const GARBAGE_BYTES: u64 = 1 << 20;
/// Longest line that is read back; a VIP with a thousand instances has less.
const MAX_LINE_BYTES: u64 = 4 << 20;
const ANNOUNCEMENT_KEY: &str = "announcement";
const VIP_KEY: &str = "vips/";

/// The routes of the location. What a snapshot leaves out goes away only once the snapshot is complete.
#[derive(Debug)]
pub struct Routes {
    path: PathBuf,
    /// `None` after a failure, until the log is written anew.
    file: Option<File>,
    length: u64,
    vips: HashMap<IpAddr, Place>,
    announcement: Option<Announcement>,
    /// Snapshots that began.
    snapshots: u32,
    /// A snapshot being received.
    incoming: Option<Incoming>,
}

/// A VIP's newest line. Packed: beside an address of 17 bytes, alignment would take seven more for each of many VIPs.
#[derive(Debug, Clone, Copy)]
#[repr(Rust, packed)]
struct Place {
    offset: u64,
    length: u32,
    /// Which snapshot, or what came after it, named the VIP last.
    snapshot: u32,
    /// Of the record as JSON: tells a repetition from a change.
    hash: u64,
}

#[derive(Debug, Default)]
struct Incoming {
    announcement: Option<Announcement>,
}

#[derive(Serialize, Deserialize)]
struct Line<V> {
    key: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<V>,
}

impl Routes {
    /// The routes of the last run; none where there was none or the file can't be read.
    pub fn load(path: PathBuf) -> Self {
        let (vips, file, announcement, incoming) = Default::default();
        let mut routes = Self { path, file, length: 0, vips, announcement, snapshots: 0, incoming };
        if let Err(error) = routes.read_log() {
            tracing::warn!(path = %routes.path.display(), %error, "the log of the routes can't be used");
        }
        routes
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.vips.is_empty() && self.announcement.is_none()
    }

    /// Whether a snapshot is being received, so that more events follow at once.
    pub fn receives(&self) -> bool {
        self.incoming.is_some()
    }

    /// Whether the VIP has a route.
    pub fn contains(&self, vip: IpAddr) -> bool {
        self.vips.contains_key(&vip)
    }

    /// The JSON text of the record that a key of the watch has.
    pub fn text(&self, key: &str) -> Option<Vec<u8>> {
        if key == ANNOUNCEMENT_KEY {
            return serde_json::to_vec(&RouteRecord::Announcement(self.announcement.clone()?)).ok();
        }
        let place = self.vips.get(&vip_of(key)?)?;
        let mut line = vec![0; place.length as usize];
        self.file.as_ref()?.read_exact_at(&mut line, place.offset).ok()?;
        // As `to_line` writes it.
        let head = format!("{{\"key\":\"{key}\",\"value\":");
        Some(line.strip_prefix(head.as_bytes())?.strip_suffix(b"}\n")?.to_vec())
    }

    /// A virtual IP's route.
    pub fn get(&self, vip: IpAddr) -> Option<Route> {
        match serde_json::from_slice(&self.text(&format!("{VIP_KEY}{vip}"))?) {
            Ok(RouteRecord::Vip(route)) => Some(route),
            _ => None,
        }
    }

    /// What to announce, once that is known.
    pub fn announcement(&self) -> Option<&Announcement> {
        self.announcement.as_ref()
    }

    /// Takes one event of the watch in; returns what changed.
    pub fn apply(&mut self, event: WatchEvent<RouteRecord>) -> Vec<Change> {
        match event {
            WatchEvent::Reset { .. } => {
                self.snapshots = self.snapshots.wrapping_add(1);
                self.incoming = Some(Incoming::default());
                Vec::new()
            }
            WatchEvent::Put { key, value: RouteRecord::Vip(route), .. } => {
                self.put(key, route).into_iter().collect()
            }
            WatchEvent::Put { value: RouteRecord::Announcement(announcement), .. } => {
                match &mut self.incoming {
                    Some(incoming) => incoming.announcement = Some(announcement),
                    None => self.announce(Some(announcement)),
                }
                Vec::new()
            }
            WatchEvent::Delete { key, .. } if key == ANNOUNCEMENT_KEY => {
                self.announce(None);
                Vec::new()
            }
            WatchEvent::Delete { key, .. } => {
                let Some(vip) = vip_of(&key) else { return Vec::new() };
                self.remove(vip).into_iter().collect()
            }
            WatchEvent::Synced { .. } => {
                let Some(incoming) = self.incoming.take() else {
                    self.tidy();
                    return Vec::new();
                };
                self.announce(incoming.announcement);
                let gone = self.vips.iter().filter(|(_, place)| place.snapshot != self.snapshots);
                let gone: Vec<IpAddr> = gone.map(|(vip, _)| *vip).collect();
                let changes = gone.into_iter().filter_map(|vip| self.remove(vip)).collect();
                self.tidy();
                changes
            }
        }
    }

    /// Hands out all routes, in the order of their last change.
    ///
    /// # Errors
    /// The log can't be read.
    pub fn for_each(&self, mut take: impl FnMut(Route)) -> io::Result<()> {
        self.for_each_line(|line| {
            if let Ok(Line { value: Some(RouteRecord::Vip(route)), .. }) = serde_json::from_slice(line) {
                take(route);
            }
            Ok(())
        })
    }

    fn put(&mut self, key: String, route: Route) -> Option<Change> {
        let vip = route.vip;
        let line = Line { key, value: Some(RouteRecord::Vip(route)) };
        let text = to_line(&line)?;
        let hash = hash(&text);
        if let Some(place) = self.vips.get_mut(&vip).filter(|place| place.hash == hash) {
            place.snapshot = self.snapshots;
            return None;
        }
        let (offset, length) = self.append(&text);
        self.vips.insert(vip, Place { offset, length, snapshot: self.snapshots, hash });
        match line.value {
            Some(RouteRecord::Vip(route)) => Some(Change::Put(route)),
            _ => None,
        }
    }

    fn remove(&mut self, vip: IpAddr) -> Option<Change> {
        self.vips.remove(&vip)?;
        if let Some(text) = to_line(&Line::<RouteRecord> { key: format!("{VIP_KEY}{vip}"), value: None }) {
            self.append(&text);
        }
        Some(Change::Remove(vip))
    }

    fn announce(&mut self, announcement: Option<Announcement>) {
        if announcement == self.announcement {
            return;
        }
        let value = announcement.clone().map(RouteRecord::Announcement);
        if let Some(text) = to_line(&Line { key: ANNOUNCEMENT_KEY.into(), value }) {
            self.append(&text);
        }
        self.announcement = announcement;
    }

    /// Writes a line at the end; where it stands. A failure costs only the next run's early start.
    fn append(&mut self, line: &[u8]) -> (u64, u32) {
        let place = (self.length, line.len() as u32);
        if self.file.is_none() && self.length == 0 {
            self.file = self.create(&self.path).map_err(|error| self.warn(&error)).ok();
        }
        if let Some(file) = &mut self.file {
            match file.write_all(line) {
                Ok(()) => self.length += line.len() as u64,
                Err(error) => {
                    self.warn(&error);
                    self.file = None;
                }
            }
        }
        place
    }

    fn warn(&self, error: &io::Error) {
        tracing::warn!(path = %self.path.display(), %error, "can't keep the routes for the next start");
    }

    fn create(&self, path: &std::path::Path) -> io::Result<File> {
        use std::os::unix::fs::OpenOptionsExt as _;
        OpenOptions::new().create(true).truncate(true).read(true).write(true).mode(0o600).open(path)
    }

    /// Writes the log anew if much of it is out of date.
    fn tidy(&mut self) {
        let live: u64 = self.vips.values().map(|place| u64::from(place.length)).sum();
        let garbage = self.length.saturating_sub(live);
        if garbage > GARBAGE_BYTES.max(live)
            && let Err(error) = self.rewrite()
        {
            self.warn(&error);
        }
    }

    fn rewrite(&mut self) -> io::Result<()> {
        let fresh_path = self.path.with_extension("new");
        let mut fresh = BufWriter::new(self.create(&fresh_path)?);
        let value = self.announcement.clone().map(RouteRecord::Announcement);
        fresh.write_all(&to_line(&Line { key: ANNOUNCEMENT_KEY.into(), value }).unwrap_or_default())?;
        self.for_each_line(|line| fresh.write_all(line))?;
        fresh.flush()?;
        std::fs::rename(&fresh_path, &self.path)?;
        self.read_log()
    }

    /// Each VIP's newest line, in the order of the log.
    fn for_each_line(&self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut places: Vec<Place> = self.vips.values().copied().collect();
        places.sort_unstable_by_key(|place| place.offset);
        let mut file = BufReader::with_capacity(1 << 20, File::open(&self.path)?);
        let (mut position, mut line) = (0, Vec::new());
        for place in places {
            file.seek_relative((place.offset - position) as i64)?;
            line.resize(place.length as usize, 0);
            file.read_exact(&mut line)?;
            take(&line)?;
            position = place.offset + u64::from(place.length);
        }
        Ok(())
    }

    /// Finds the newest line of each VIP; what follows a line that was cut off is left out.
    fn read_log(&mut self) -> io::Result<()> {
        let mut file = match OpenOptions::new().read(true).write(true).open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        self.vips.clear();
        self.length = 0;
        let mut reader = BufReader::with_capacity(1 << 20, &mut file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
            if read == 0 || line.last() != Some(&b'\n') {
                break;
            }
            let (length, snapshot) = (read as u32, self.snapshots);
            let place = Place { offset: self.length, length, snapshot, hash: hash(&line) };
            match serde_json::from_slice::<Line<serde::de::IgnoredAny>>(&line) {
                Ok(Line { key, .. }) if key == ANNOUNCEMENT_KEY => {
                    let record = serde_json::from_slice::<Line<RouteRecord>>(&line).ok();
                    self.announcement = match record.and_then(|line| line.value) {
                        Some(RouteRecord::Announcement(announcement)) => Some(announcement),
                        _ => None,
                    };
                }
                Ok(Line { key, value }) => match (vip_of(&key), value) {
                    (Some(vip), Some(_)) => drop(self.vips.insert(vip, place)),
                    (Some(vip), None) => drop(self.vips.remove(&vip)),
                    (None, _) => {}
                },
                Err(error) => {
                    tracing::warn!(path = %self.path.display(), offset = self.length, %error, "a line of the log is damaged");
                    break;
                }
            }
            self.length += read as u64;
        }
        file.set_len(self.length)?;
        file.seek(SeekFrom::Start(self.length))?;
        self.file = Some(file);
        Ok(())
    }
}

fn vip_of(key: &str) -> Option<IpAddr> {
    key.strip_prefix(VIP_KEY)?.parse().ok()
}

fn to_line<V: Serialize>(line: &Line<V>) -> Option<Vec<u8>> {
    // Of a value that came as JSON.
    let mut text = serde_json::to_vec(line).ok()?;
    text.push(b'\n');
    Some(text)
}

fn hash(line: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(line);
    hasher.finish()
}

#[cfg(test)]
mod tests;
