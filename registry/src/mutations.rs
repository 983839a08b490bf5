//! Feeds the parsers of what clients send with the inputs in `tests/corpus`, and with random changes of them. What they
//! accept is judged by rules of its own here, simpler than the parsers'.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyplace_images::Digest;
use anyplace_registry_core::access::{Grant, Scope};
use anyplace_seed::{Seed, corpus, corpus_lines, mutate, rounds};
use axum::http::{HeaderMap, HeaderValue, header};
use serde_json::Value;

use crate::conditions::{Asked, asked_range};
use crate::uploads::{Plan, Step};
use crate::{references, uploads};

/// Changed inputs for each that is kept, usually and in a whole campaign.
const MUTATIONS: (usize, usize) = (2_000, 100_000);

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name)
}

/// Each kept line, and its changes.
fn lines(name: &str, mut judge: impl FnMut(&[u8])) {
    let mut random = Seed::from_env();
    for line in corpus_lines(&kept(name)) {
        judge(&line);
        (0..rounds(MUTATIONS.0, MUTATIONS.1)).for_each(|_| judge(&mutate(&line, &mut random)));
    }
}

/// All digests in a list of descriptors, or in one.
fn digests(value: Option<&Value>) -> Vec<String> {
    match value {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(all)) => all.iter().flat_map(|one| digests(Some(one))).collect(),
        Some(one) => vec![one["digest"].as_str().unwrap().to_owned()],
    }
}

fn texts(digests: &[Digest]) -> Vec<String> {
    digests.iter().map(ToString::to_string).collect()
}

#[test]
fn manifests() {
    let mut random = Seed::from_env();
    for (name, bytes) in corpus(&kept("manifests")) {
        assert!(references::read(None, &bytes).is_ok(), "{name}");
        let mut accepted = 0;
        for _ in 0..rounds(MUTATIONS.0, MUTATIONS.1) {
            let changed = mutate(&bytes, &mut random);
            let names = references::names(&changed);
            let Ok(manifest) = references::read(None, &changed) else { continue };
            accepted += 1;
            let names = names.unwrap();
            let text = std::str::from_utf8(&changed).unwrap();
            // Numbers without end, which nobody reads, are JSON too.
            let Ok(value) = serde_json::from_str::<Value>(text) else { continue };
            // A collector must find all that the manifest says.
            let fields = ["config", "layers", "blobs"].into_iter();
            let blobs: Vec<String> = fields.flat_map(|field| digests(value.get(field))).collect();
            assert_eq!(texts(&names.blobs), blobs);
            assert_eq!(texts(&names.manifests), digests(value.get("manifests")));
            let subject: Vec<Digest> = names.subject.into_iter().collect();
            assert_eq!(texts(&subject), digests(value.get("subject")));
            let all: BTreeSet<&Digest> = names.blobs.iter().collect();
            assert!(manifest.blobs.iter().all(|blob| all.contains(blob)));
            assert_eq!(manifest.manifests, names.manifests);
            assert!(manifest.media_type.bytes().all(|byte| byte > b' ' && byte < 127));
            for digest in blobs {
                let (algorithm, hex) = digest.split_once(':').unwrap();
                let length = if algorithm == "sha256" { 64 } else { 128 };
                assert!(["sha256", "sha512"].contains(&algorithm) && hex.len() == length, "{digest}");
                assert!(hex.bytes().all(|byte| b"0123456789abcdef".contains(&byte)), "{digest}");
            }
        }
        println!("{name}: {accepted} changed manifests were accepted");
    }
}

/// `FIRST-LAST`, either of which may be missing; digits and nothing else.
fn plain_range(text: &str) -> Option<(Option<u128>, Option<u128>)> {
    let (first, last) = text.split_once('-')?;
    let number = |text: &str| -> Option<Option<u128>> {
        let text = text.trim();
        match text.bytes().all(|byte| byte.is_ascii_digit()) {
            true if text.is_empty() => Some(None),
            true => text.parse().ok().map(Some),
            false => None,
        }
    };
    Some((number(first)?, number(last)?))
}

#[test]
fn ranges() {
    let digest = Digest::of(b"content");
    let sizes = [0, 1, 10, 4_096, u64::MAX];
    lines("ranges.txt", |line| {
        let Ok(value) = HeaderValue::from_bytes(line) else { return };
        let text = value.to_str().unwrap_or_default().to_owned();
        let headers = HeaderMap::from_iter([(header::RANGE, value)]);
        for size in sizes {
            let asked = asked_range(&headers, &digest, size);
            let plain = text.trim().strip_prefix("bytes=").and_then(plain_range);
            let expected: Option<Range<u128>> = plain.and_then(|range| match range {
                (Some(first), last) => {
                    let end = last.map_or(u128::from(size), |last| (last + 1).min(size.into()));
                    Some(first..end)
                }
                (None, Some(count)) => Some(u128::from(size).saturating_sub(count)..size.into()),
                (None, None) => None,
            });
            match (asked, expected) {
                (Asked::All, _) => {}
                (Asked::Nothing, Some(range)) => assert!(range.is_empty(), "{text} of {size}"),
                (Asked::Part(part), Some(range)) => {
                    let part = u128::from(part.start)..u128::from(part.end);
                    assert_eq!(part, range, "{text} of {size}");
                    assert!(!part.is_empty() && part.end <= u128::from(size), "{text} of {size}");
                }
                (asked, None) => panic!("{asked:?} for `{text}` of {size}"),
            }
        }
    });
}

#[test]
fn content_ranges() {
    lines("content-ranges.txt", |line| {
        let Ok(text) = std::str::from_utf8(line) else { return };
        let Some((first, length)) = uploads::parse_range(text) else { return };
        let text = text.strip_prefix("bytes").map_or(text, |rest| &rest[1..]);
        let range = plain_range(text.split_once('/').map_or(text, |(range, _)| range));
        let Some((Some(from), Some(to))) = range else { panic!("{text} is no range") };
        assert_eq!((u128::from(first), u128::from(length)), (from, to + 1 - from), "{text}");
    });
}

#[test]
fn upload_steps() {
    lines("upload-steps.txt", |line| {
        let Ok(Plan { blobs, steps }) = Plan::parse(line) else { return };
        let Ok(value) = serde_json::from_slice::<Value>(line) else { panic!("accepted, and no JSON") };
        let text = String::from_utf8_lossy(line);
        assert_eq!(texts(&blobs), value["blobs"].as_array().unwrap().iter().map(plain).collect::<Vec<_>>());
        // Every step takes something, from a blob that is named, and nothing runs over.
        let mut bytes = 0_u128;
        for (step, written) in steps.iter().zip(value["steps"].as_array().unwrap()) {
            let numbers: Vec<u64> = written.as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
            let length = u128::from(*numbers.last().unwrap());
            bytes += length;
            assert!(length > 0 && u128::from(step.bytes()) == length, "{text}");
            if let [blob, offset, length] = numbers[..] {
                assert!(blob < blobs.len() as u64 && offset.checked_add(length).is_some(), "{text}");
                assert_eq!(*step, Step::Copy(blob as usize, offset..offset + length), "{text}");
            } else {
                assert_eq!(numbers.len(), 1, "{text}");
            }
        }
        assert!(bytes <= u128::from(u64::MAX) && steps.len() <= 10_000 && blobs.len() <= 64, "{text}");
    });
}

fn plain(text: &Value) -> String {
    text.as_str().unwrap().to_owned()
}

#[test]
fn scopes_and_grants() {
    lines("scopes.txt", |line| {
        let Some(scope) = std::str::from_utf8(line).ok().and_then(|text| text.parse::<Scope>().ok()) else {
            return;
        };
        let text = String::from_utf8_lossy(line);
        assert!(text.starts_with("repository") && text.contains(&scope.repository), "{text}");
        // Nothing is allowed that isn't said.
        assert!(
            scope.actions.iter().all(|action| text.contains(action.word()) || text.contains('*')),
            "{text}"
        );
        assert_eq!(scope.to_string().parse::<Scope>().unwrap(), scope, "{text}");
    });
    lines("grants.txt", |line| {
        let Some(grant) = std::str::from_utf8(line).ok().and_then(|text| text.parse::<Grant>().ok()) else {
            return;
        };
        assert_eq!(grant.to_string().parse::<Grant>().unwrap(), grant, "{}", String::from_utf8_lossy(line));
    });
}
