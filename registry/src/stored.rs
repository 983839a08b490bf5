//! What is stored, for the metrics: counted now and then, so that a scrape asks the store for nothing.
//!
//! By team, since anyone may read the metrics, and names of repositories are not for anyone: `anyplace registry du` has
//! them. The [`TEAMS_MAX`] teams with most bytes have lines of their own, so labels are bounded.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyplace_images::Digest;
use futures_util::TryStreamExt as _;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::access::accounts::{Accounts, Known};
use crate::storage::{Note, Result, Storage};
use crate::uploads::{Unfinished, Uploads};

/// How often it is counted in a folder, where that is a few listings.
const COUNT_EVERY: Duration = Duration::from_secs(3600);
/// How often in a bucket, where it takes a request for each content, and one for each 1,000 links.
const COUNT_BUCKET_EVERY: Duration = Duration::from_secs(24 * 3600);
/// When it is counted first, in peace after the start.
const COUNT_FIRST: Duration = Duration::from_secs(5);
/// Teams with lines of their own.
const TEAMS_MAX: usize = 50;
/// Most contents whose sizes are kept while they are counted, about 40 MiB; with more, teams are left out.
const CONTENTS_MAX: usize = 1 << 20;
/// The label of repositories that belong to no team, and that of the teams without a line: no team has such names.
const NO_TEAM: &str = "(none)";
const OTHER_TEAMS: &str = "(others)";

/// What one, or all, have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Amount {
    /// Of content and unfinished uploads.
    bytes: u64,
    /// Blobs and manifests.
    contents: u64,
    manifests: u64,
    /// Unfinished ones.
    uploads: u64,
}

impl Amount {
    fn add(&mut self, other: Amount) {
        self.bytes += other.bytes;
        self.contents += other.contents;
        self.manifests += other.manifests;
        self.uploads += other.uploads;
    }
}

/// One count.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Count {
    total: Amount,
    /// By name. Content that several repositories of a team have counts once, as it does for quotas.
    teams: BTreeMap<String, Amount>,
}

/// The last count.
#[derive(Default)]
pub(crate) struct Stored(Mutex<Option<Count>>);

impl Stored {
    /// Counts now and then, until the registry stops.
    pub(crate) async fn run_by_itself(
        &self,
        storage: &Storage,
        uploads: &Uploads,
        accounts: &Accounts,
        stop: &CancellationToken,
    ) {
        let mut pause = COUNT_FIRST;
        while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
            match stop.run_until_cancelled(latest(storage, uploads, &accounts.known())).await {
                None => return,
                Some(Ok((count, good_for))) => {
                    *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(count);
                    pause = good_for;
                }
                Some(Err(error)) => {
                    pause = COUNT_EVERY;
                    tracing::warn!(%error, "what is stored can't be counted; the metrics have the last count");
                }
            }
        }
    }

    /// As Prometheus reads it; nothing before the first count.
    pub(crate) fn render(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Count::render).unwrap_or_default()
    }
}

/// The latest count, and for how long it is good. That of a bucket is kept there, also for those that serve the same one,
/// and a restart takes none anew.
async fn latest(storage: &Storage, uploads: &Uploads, known: &Known) -> Result<(Count, Duration)> {
    let counting = count(storage, uploads, known, CONTENTS_MAX);
    if storage.is_in_folder() {
        return Ok((counting.await?, COUNT_EVERY));
    }
    let kept = match storage.note::<Count>(Note::LastCount).await {
        Err(error) if error.is_damage() => None,
        kept => kept?,
    };
    if let Some((count, counted)) = kept {
        let age = storage.ages().await?.of(counted).unwrap_or_default();
        if age < COUNT_BUCKET_EVERY {
            return Ok((count, COUNT_BUCKET_EVERY - age));
        }
    }
    let count = counting.await?;
    if let Err(error) = storage.put_note(Note::LastCount, &count).await {
        tracing::warn!(%error, "the count of what is stored can't be kept; the next process counts anew");
    }
    Ok((count, COUNT_BUCKET_EVERY))
}

/// Counts everything.
async fn count(storage: &Storage, uploads: &Uploads, known: &Known, contents_max: usize) -> Result<Count> {
    let team_of = |repository: &str| known.owner(repository).map_or(NO_TEAM, |team| team.name.as_str());
    let mut count = Count::default();
    let mut sizes: HashMap<u64, u64> = HashMap::new();
    let mut contents = storage.contents();
    while let Some(content) = contents.try_next().await? {
        count.total.add(Amount { bytes: content.size, contents: 1, ..Amount::default() });
        if sizes.len() <= contents_max {
            sizes.insert(fingerprint(&content.digest), content.size);
        }
    }
    let with_teams = sizes.len() <= contents_max;
    let mut counted: HashMap<&str, HashSet<u64>> = HashMap::new();
    let mut links = storage.links();
    while with_teams && let Some(link) = links.try_next().await? {
        let (content, team) = (fingerprint(&link.digest), team_of(&link.repository));
        // A link comes before its content.
        if let Some(bytes) = sizes.get(&content)
            && counted.entry(team).or_default().insert(content)
        {
            let one = Amount { bytes: *bytes, contents: 1, ..Amount::default() };
            count.teams.entry(team.to_owned()).or_default().add(one);
        }
    }
    let mut add = |repository: &str, amount: Amount| {
        count.total.add(amount);
        if with_teams {
            count.teams.entry(team_of(repository).to_owned()).or_default().add(amount);
        }
    };
    for repository in storage.repositories().await? {
        let infos = storage.manifests(&repository).await?;
        let manifests = infos.iter().filter(|info| info.pending.is_none()).count() as u64;
        add(&repository, Amount { manifests, ..Amount::default() });
    }
    for Unfinished { repository, bytes, .. } in uploads.unfinished().await? {
        add(&repository, Amount { bytes, uploads: 1, ..Amount::default() });
    }
    Ok(count)
}

/// Names a digest in 8 bytes; two may have the same, which takes a lot of them.
pub(crate) fn fingerprint(digest: &Digest) -> u64 {
    let mut hasher = DefaultHasher::new();
    digest.as_str().hash(&mut hasher);
    hasher.finish()
}

impl Count {
    fn render(&self) -> String {
        let mut teams: Vec<(&str, Amount)> =
            self.teams.iter().map(|(name, amount)| (name.as_str(), *amount)).collect();
        teams.sort_by_key(|(name, amount)| (Reverse(amount.bytes), *name));
        let rest = teams.split_off(teams.len().min(TEAMS_MAX));
        if !rest.is_empty() {
            let mut others = Amount::default();
            rest.into_iter().for_each(|(_, amount)| others.add(amount));
            teams.push((OTHER_TEAMS, others));
        }
        let mut text = String::new();
        type Value = fn(&Amount) -> u64;
        let kinds: [(&str, &str, Value); 4] = [
            ("bytes", "Bytes of content and unfinished uploads", |amount| amount.bytes),
            ("contents", "Blobs and manifests as content", |amount| amount.contents),
            ("manifests", "Manifests of repositories", |amount| amount.manifests),
            ("uploads", "Unfinished uploads", |amount| amount.uploads),
        ];
        for (kind, help, value) in kinds {
            let name = format!("anyplace_registry_stored_{kind}");
            // Writing to a string can't fail.
            let _ = write!(
                text,
                "# HELP {name} {help}, counted hourly.\n# TYPE {name} gauge\n{name} {}\n",
                value(&self.total)
            );
            if teams.is_empty() {
                continue;
            }
            let name = format!("anyplace_registry_team_{kind}");
            let _ = write!(text, "# HELP {name} {help} by team, counted hourly.\n# TYPE {name} gauge\n");
            for (team, amount) in &teams {
                let _ = writeln!(text, "{name}{{team=\"{team}\"}} {}", value(amount));
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn there_are_lines_for_the_largest_teams_and_one_for_the_others() {
        let amount = |bytes| Amount { bytes, contents: 1, manifests: 2, uploads: 0 };
        let teams = (0..TEAMS_MAX as u64 + 10).map(|i| (format!("t{i}"), amount(i))).collect();
        let text = Count { total: amount(1_000), teams }.render();
        let value = |line: &str| {
            let found = text.lines().find_map(|it| it.strip_prefix(line)?.strip_prefix(' '));
            found.unwrap_or_else(|| panic!("{line} is missing: {text}")).parse::<u64>().unwrap()
        };
        assert_eq!(value("anyplace_registry_stored_bytes"), 1_000);
        assert_eq!(value("anyplace_registry_team_bytes{team=\"t59\"}"), 59);
        assert_eq!(value("anyplace_registry_team_bytes{team=\"(others)\"}"), (0..10).sum::<u64>());
        assert_eq!(value("anyplace_registry_team_manifests{team=\"(others)\"}"), 20);
        assert_eq!(text.lines().filter(|line| line.contains("team_bytes{")).count(), TEAMS_MAX + 1);
    }

    #[tokio::test]
    async fn with_too_much_there_are_only_totals() {
        let dir = tempfile::tempdir().unwrap();
        let storage = Storage::open(&Config::new(dir.path())).await.unwrap();
        let uploads = Uploads::open(storage.clone()).unwrap();
        for text in ["one", "two", "three"] {
            let digest = Digest::of(text.as_bytes());
            storage.put_link("a", &digest).await.unwrap();
            storage.put_content(&digest, text.into()).await.unwrap();
        }
        let total = Amount { bytes: 11, contents: 3, ..Amount::default() };
        for (contents_max, teams) in [(3, 1), (2, 0)] {
            let count = count(&storage, &uploads, &Known::default(), contents_max).await.unwrap();
            assert_eq!((count.total, count.teams.len()), (total, teams));
        }
    }
}
