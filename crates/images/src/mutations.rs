//! Feeds the parsers of what registries, archives and users send with the inputs in `tests/corpus`, and with random changes
//! of them. What they accept is judged by rules of its own here, simpler than the parsers'.

use std::path::{Path, PathBuf};

use anyplace_seed::{Seed, corpus, corpus_lines, mutate, rounds};

use crate::Reference;

/// Changed inputs for each that is kept, usually and in a whole campaign.
const MUTATIONS: (usize, usize) = (2_000, 100_000);

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(name)
}

/// Each kept line, and its changes.
pub(crate) fn lines(name: &str, mut judge: impl FnMut(&str)) {
    let mut random = Seed::from_env();
    let mut judge = |line: &[u8]| {
        if let Ok(line) = std::str::from_utf8(line) {
            judge(line);
        }
    };
    for line in corpus_lines(&kept(name)) {
        judge(&line);
        (0..rounds(MUTATIONS.0, MUTATIONS.1)).for_each(|_| judge(&mutate(&line, &mut random)));
    }
}

/// Each kept file, and its changes; `judge` hears which are kept. Says how many it accepted.
pub(crate) fn files(folder: &str, mut judge: impl FnMut(bool, &[u8]) -> bool) {
    let mut random = Seed::from_env();
    for (name, bytes) in corpus(&kept(folder)) {
        assert!(judge(true, &bytes), "{name}");
        let mut accepted = 0;
        for _ in 0..rounds(MUTATIONS.0, MUTATIONS.1) {
            let mut changed = mutate(&bytes, &mut random);
            // A flipped bit in a header is found by its checksum, so correct that most of the time.
            if random.index(4) > 0 {
                anyplace_seed::correct_checksums(&mut changed);
            }
            accepted += usize::from(judge(false, &changed));
        }
        println!("{name}: {accepted} changed files were accepted");
    }
}

#[test]
fn references() {
    lines("references.txt", |text| {
        let Ok(reference) = text.parse::<Reference>() else { return };
        // Whatever is accepted is written as it was.
        assert_eq!(reference.to_string(), text);
        let name = &reference.repository;
        assert!(!name.is_empty() && name.len() <= 255, "{text}");
        let is_good =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-/".contains(&byte);
        assert!(name.bytes().all(is_good) && !name.contains("..") && !name.contains("//"), "{text}");
        if let Some(host) = &reference.registry {
            let (name, port) = host.split_once(':').unwrap_or((host, "0"));
            assert!(port.bytes().all(|byte| byte.is_ascii_digit()) && !port.is_empty(), "{text}");
            assert!(name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte)), "{text}");
        }
        if let Some(tag) = &reference.tag {
            assert!(!tag.is_empty() && tag.len() <= 128 && !tag.starts_with(['.', '-']), "{text}");
        }
    });
}
