//! How a registry's answers look to people.

use anyplace_model::Bytes;
use anyplace_registry::{
    CacheUsage, CachedRepository, Emptied, GcReport, GcStatus, RepositoryView, ScrubReport, ScrubStatus,
    TagView, TrashView, UploadView, UsageView,
};

use crate::output::{self, Table, age, moment, size, until};

pub(super) fn usage(usage: &UsageView) -> String {
    let mut table = Table::new(&["REPOSITORY", "CONTENTS", "SIZE", "ITS OWN"]);
    for it in &usage.repositories {
        let (bytes, own) = (size(Bytes(it.bytes)), size(Bytes(it.own_bytes)));
        table.row([it.repository.clone(), it.contents.to_string(), bytes, own]);
    }
    output::note(format_args!(
        "{} in {} contents, each counted once; {} of it nobody has, and the next collection takes",
        size(Bytes(usage.total_bytes)),
        usage.contents,
        size(Bytes(usage.unneeded_bytes)),
    ));
    match &usage.cache {
        None => table.to_string(),
        Some(cache) if table.is_empty() => cached(cache),
        Some(cache) => format!("{table}\n\n{}", cached(cache)),
    }
}

fn cached(usage: &CacheUsage) -> String {
    let mut table = Table::new(&["CACHED REPOSITORY", "TAGS", "MANIFESTS", "BLOBS", "ON DISK", "OF"]);
    for CachedRepository { repository, cached: it } in &usage.repositories {
        let counts = [it.tags, it.manifests, it.blobs].map(|count| count.to_string());
        let sizes = [it.disk_bytes, it.blob_bytes].map(|bytes| size(Bytes(bytes)));
        table.row([repository.clone()].into_iter().chain(counts).chain(sizes));
    }
    output::note(format_args!(
        "cached: {} on disk, each blob counted once, of at most {}; that is of {} blobs with {} in all; and {} of manifests, \
         tags and lists of pieces",
        size(Bytes(usage.disk_bytes)),
        size(Bytes(usage.disk_budget_bytes)),
        usage.blobs,
        size(Bytes(usage.blob_bytes)),
        size(Bytes(usage.record_bytes)),
    ));
    table.to_string()
}

pub(super) fn repositories(repositories: &[RepositoryView]) -> String {
    let is_cache = repositories.iter().any(|it| it.cached.is_some());
    let columns = ["REPOSITORY", "TAGS", "MANIFESTS", "PUSHED", "CACHED"];
    let mut table = Table::new(&columns[..if is_cache { 5 } else { 4 }]);
    for it in repositories {
        let pushed = it.pushed_at.map(age).unwrap_or_default();
        let cached = is_cache.then(|| match &it.cached {
            Some(it) => {
                format!("{} tags, {} manifests, {}", it.tags, it.manifests, size(Bytes(it.disk_bytes)))
            }
            None => String::new(),
        });
        let row = [it.name.clone(), it.tags.to_string(), it.manifests.to_string(), pushed];
        table.row(row.into_iter().chain(cached));
    }
    if table.is_empty() {
        output::note("the registry has no repositories yet; `anyplace push` makes one");
    }
    table.to_string()
}

pub(super) fn tags(tags: &[TagView]) -> String {
    let is_cache = tags.iter().any(|it| it.cached.is_some());
    let columns = ["TAG", "DIGEST", "SIZE", "PUSHED", "CACHED"];
    let mut table = Table::new(&columns[..if is_cache { 5 } else { 4 }]);
    for it in tags {
        let (bytes, pushed) = (size(Bytes(it.size_bytes)), it.pushed_at.map(age).unwrap_or_default());
        let cached = is_cache.then(|| match &it.cached {
            Some(it) => format!("{} from {}", size(Bytes(it.disk_bytes)), it.from),
            None => String::new(),
        });
        table.row([it.tag.clone(), it.digest.to_string(), bytes, pushed].into_iter().chain(cached));
    }
    table.to_string()
}

pub(super) fn trash(trash: &[TrashView]) -> String {
    let mut table = Table::new(&["REPOSITORY", "TAG", "DIGEST", "DELETED", "GONE"]);
    for it in trash {
        let (tag, digest) = (it.tag.clone().unwrap_or_default(), it.digest.to_string());
        table.row([it.repository.clone(), tag, digest, age(it.deleted_at), until(it.until)]);
    }
    if table.is_empty() {
        output::note("nothing was deleted lately");
    }
    table.to_string()
}

pub(super) fn emptied(emptied: Emptied) -> String {
    format!(
        "{} deletions can't be undone any more; `anyplace registry gc` takes what only they kept, once it is older than \
         the grace",
        emptied.deletions
    )
}

pub(super) fn uploads(uploads: &[UploadView], dropped: bool) -> String {
    let mut table = Table::new(&["REPOSITORY", "UPLOAD", "SIZE", "LAST WRITTEN"]);
    for it in uploads {
        table.row([it.repository.clone(), it.id.clone(), size(Bytes(it.bytes)), age(it.touched_at)]);
    }
    match (table.is_empty(), dropped) {
        (true, true) => output::note("none is as old; `anyplace registry uploads` lists them"),
        (true, false) => output::note("no upload is unfinished"),
        (false, true) => output::note("dropped"),
        (false, false) => {}
    }
    table.to_string()
}

/// Such as `reading manifests: 3 of 12 repositories`.
pub(super) fn gc_progress(report: &GcReport) -> String {
    let (seen, plan) = (&report.seen, &report.plan);
    format!(
        "{}: {} of {} repositories read, {} links and {} contents looked at, {} links and {} contents taken",
        report.phase,
        seen.repositories_read,
        seen.repositories,
        seen.links,
        seen.content,
        plan.links.count,
        plan.content.count
    )
}

pub(super) fn gc(report: &GcReport) -> String {
    let plan = &report.plan;
    let mut text = String::new();
    let mut table = Table::new(&["WHAT", "REPOSITORY", "NAME", "WHY"]);
    let mut unnamed = 0;
    let kinds = [
        ("tag", &plan.tags),
        ("manifest", &plan.manifests),
        ("link", &plan.links),
        ("content", &plan.content),
    ];
    for (what, list) in kinds {
        for it in &list.named {
            let repository = it.repository.clone().unwrap_or_default();
            table.row([what.to_owned(), repository, it.name.clone(), it.reason.clone()]);
        }
        unnamed += list.count - list.named.len() as u64;
    }
    if !table.is_empty() {
        text += &format!("{table}\n");
    }
    if unnamed > 0 {
        text += &format!("... and {unnamed} more\n");
    }
    let verb = if report.dry_run { "would go" } else { "gone" };
    text += &format!(
        "{}: {} tags, {} manifests, {} links, {} contents, {} {verb}\n",
        report.phase,
        plan.tags.count,
        plan.manifests.count,
        plan.links.count,
        plan.content.count,
        size(Bytes(plan.bytes)),
    );
    let spared = &report.spared;
    if spared.young > 0 {
        text += &format!("{} links stay that nothing needs yet: younger than the grace\n", spared.young);
    }
    if report.trash_emptied > 0 {
        text += &format!("{} deletions can't be undone any more\n", report.trash_emptied);
    }
    for problem in report.retention_skipped.iter().chain(&report.problems).chain(&report.error) {
        text += &format!("problem: {problem}\n");
    }
    text
}

pub(super) fn gc_status(status: &GcStatus) -> String {
    let mut text = String::new();
    if let Some(running) = &status.running {
        text += &format!("Running since {}: {}\n", moment(running.started), gc_progress(running));
    }
    match &status.last {
        Some(last) => text += &format!("Last: {}\n{}", moment(last.started), gc(last)),
        None => text += "Last: never\n",
    }
    text
}

pub(super) fn scrub_progress(report: &ScrubReport) -> String {
    let (bytes, wrong) = (size(Bytes(report.bytes)), report.wrong.count);
    format!("{}: {} contents, {bytes}, {wrong} damaged", report.phase, report.checked)
}

pub(super) fn scrub(report: &ScrubReport) -> String {
    let mut text = String::new();
    let mut table = Table::new(&["DAMAGED", "REPOSITORIES", "NOW", "WAS"]);
    for it in &report.wrong.named {
        let repositories = it.repositories.join(",");
        table.row([it.digest.clone(), repositories, it.outcome.to_string(), it.found.clone()]);
    }
    if !table.is_empty() {
        text += &format!("{table}\n");
    }
    text += &format!("{}\n", scrub_progress(report));
    for problem in report.problems.iter().chain(&report.error) {
        text += &format!("problem: {problem}\n");
    }
    text
}

pub(super) fn scrub_status(status: &ScrubStatus) -> String {
    let mut text = String::new();
    if let Some(running) = &status.running {
        text += &format!("Running since {}: {}\n", moment(running.started), scrub_progress(running));
    }
    match &status.last {
        Some(last) => text += &format!("Last: {}\n{}", moment(last.started), scrub(last)),
        None => text += "Last: never\n",
    }
    text
}
