//! Copies go on where they can, and parts give the new blob, whatever they are cut by.

use anyplace_seed::Seed;

use super::*;

/// Spans of these contents and lengths, one after the other.
fn spans(contents: &[(u8, u64)]) -> Vec<Span> {
    let mut at = 0;
    let span = |(content, len): &(u8, u64)| {
        let range = at..at + len;
        at += len;
        Span { range, kind: SpanKind::Chunk, digest: zstd_chunked::Digest([*content; 32]) }
    };
    contents.iter().map(span).collect()
}

fn known(new: &[(u8, u64)], old: &[&[(u8, u64)]]) -> Known {
    let mut known = Known::default();
    spans(new).iter().for_each(|span| known.want(span));
    for (number, old) in old.iter().enumerate() {
        let mut found = Found::default();
        spans(old).into_iter().for_each(|span| found.look(&known, span));
        known.add(&Digest::of(&[number as u8]), found);
    }
    known
}

fn recipe(known: &Known, new: &[(u8, u64)]) -> Option<Recipe> {
    let mut builder = known.recipe();
    spans(new).iter().for_each(|span| builder.add(span));
    builder.finish()
}

fn steps(new: &[(u8, u64)], old: &[&[(u8, u64)]]) -> Vec<Step> {
    let size = new.iter().map(|(_, len)| len).sum();
    match recipe(&known(new, old), new) {
        Some(recipe) => recipe.part(0..size, 10_000),
        None => vec![],
    }
}

fn copy(blob: usize, offset: u64, len: u64) -> Step {
    Step::Copy { blob, offset, len }
}

#[test]
fn neighbours_are_copied_together_and_short_ranges_sent() {
    let old: &[(u8, u64)] = &[(1, 5_000), (9, 100), (2, 3_000), (3, 3_000), (9, 100), (4, 5_000)];
    assert_eq!(steps(old, &[old]), [copy(0, 0, 16_200)]);
    // 9 is there twice: each time it is the one that goes on.
    let new = &[(1, 5_000), (9, 100), (7, 50), (3, 3_000), (9, 100), (4, 5_000)];
    assert_eq!(steps(new, &[old]), [copy(0, 0, 5_100), Step::Send(50), copy(0, 8_100, 8_100)]);
    // A single short range isn't worth a step.
    assert_eq!(steps(&[(7, 9_000), (2, 3_000), (8, 9_000)], &[old]), []);
    assert_eq!(
        steps(&[(7, 10), (2, 3_000), (8, 10), (4, 5_000)], &[old]),
        [Step::Send(3_020), copy(0, 11_200, 5_000)]
    );
}

#[test]
fn blobs_that_were_packed_otherwise_are_not_used() {
    let new: &[(u8, u64)] = &[(1, 5_000), (2, 6_000)];
    assert_eq!(steps(new, &[&[(1, 5_000), (2, 6_001)]]), []);
    assert_eq!(
        steps(new, &[&[(1, 5_001)], &[(2, 6_000)], &[(1, 5_000)]]),
        [copy(1, 0, 5_000), copy(0, 0, 6_000)]
    );
    assert!(known(new, &[new]).is_enough());
    assert!(!known(new, &[&[(2, 6_000)]]).is_enough());
}

#[test]
fn parts_make_the_new_blob_whatever_they_are_cut_by() {
    let mut seed = Seed::from_env();
    for _ in 0..30 {
        let list = |seed: &mut Seed| -> Vec<(u8, u64)> {
            // The same content always has the same length, as one packer gives it.
            let content = |seed: &mut Seed| seed.below(40) as u8;
            let len = |content: u8| 1 + u64::from(content) * u64::from(content) * 37;
            (0..1 + seed.below(60)).map(|_| content(seed)).map(|content| (content, len(content))).collect()
        };
        let bytes = |list: &[(u8, u64)]| -> Vec<u8> {
            list.iter()
                .flat_map(|(content, len)| (0..*len).map(move |at| (at % 251) as u8 ^ content))
                .collect()
        };
        let (new, old) = (list(&mut seed), [list(&mut seed), list(&mut seed)]);
        let known = known(&new, &[&old[0], &old[1]]);
        let Some(recipe) = recipe(&known, &new) else { continue };
        let (expected, blobs) = (bytes(&new), old.each_ref().map(|old| bytes(old)));
        let (mut made, mut copied, mut sent) = (Vec::new(), 0, 0);
        while made.len() < expected.len() {
            let (at, most) = (made.len(), 1 + seed.below(30_000) as usize);
            let range = at as u64..(at + most).min(expected.len()) as u64;
            let steps_max = 2 + seed.below(9) as usize;
            let part = recipe.part(range.clone(), steps_max);
            assert!(!part.is_empty() && part.len() <= steps_max, "{part:?}");
            assert!(part.iter().map(Step::bytes).sum::<u64>() <= range.end - range.start);
            for step in &part {
                match *step {
                    Step::Send(len) => {
                        made.extend_from_slice(&expected[made.len()..][..len as usize]);
                        sent += len;
                    }
                    Step::Copy { blob, offset, len } => {
                        let number = old
                            .iter()
                            .enumerate()
                            .position(|(number, _)| recipe.blobs()[blob] == Digest::of(&[number as u8]));
                        made.extend_from_slice(&blobs[number.unwrap()][offset as usize..][..len as usize]);
                        copied += len;
                    }
                }
            }
        }
        assert!(made == expected);
        assert_eq!(recipe.copied_bytes(0..expected.len() as u64), copied);
        assert_eq!(sent + copied, expected.len() as u64);
    }
}

#[test]
fn a_part_copies_no_more_than_a_slow_store_can() {
    let huge = &[(1, 3 * COPY_MAX_BYTES)];
    let recipe = recipe(&known(huge, &[huge]), huge).unwrap();
    let part = recipe.part(5..3 * COPY_MAX_BYTES, 100);
    assert_eq!(part, [copy(0, 5, COPY_MAX_BYTES)]);
}
