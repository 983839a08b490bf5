//! Generated archives: whatever their members, what goes in comes out.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "clippy only exempts functions marked as tests")]

#[path = "support/archive.rs"]
mod archive;
#[path = "support/layer.rs"]
mod layer;

use archive::{Archive, Member};
use layer::round_trip;
use proptest::{collection::vec, prelude::*};

/// Runs of equal bytes and of noise; zeros are frequent and long.
fn content() -> impl Strategy<Value = Vec<u8>> {
    let run = (prop_oneof![Just(0u8), any::<u8>()], 1usize..40_000, any::<bool>());
    prop_oneof![
        4 => vec(any::<u8>(), 0..2_000),
        1 => (vec(run, 0..30), 0u32..3).prop_map(|(runs, large)| {
            let mut bytes = Vec::new();
            for (byte, length, noisy) in runs {
                let length = length << (large * 2).min(3);
                let mut state = u32::from(byte) | 1;
                bytes.extend((0..length).map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    if noisy { (state >> 24) as u8 } else { byte }
                }));
            }
            bytes
        }),
    ]
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => "[a-e]{1,2}(/[a-e.]{1,3}){0,2}",
        1 => "(\\./)?[a-z\u{e4}\u{1f600}]{1,20}/?",
        1 => "[ -~]{1,40}",
    ]
}

/// A member to be.
#[derive(Clone, Debug)]
struct Generated {
    kind: u8,
    name: String,
    link: String,
    content: Vec<u8>,
    mode: u16,
    id: u16,
    time: u32,
}

fn member() -> impl Strategy<Value = Generated> {
    let kind = prop::sample::select(&b"00012563"[..]);
    (kind, name(), name(), content(), any::<(u16, u16, u32)>()).prop_map(
        |(kind, name, link, content, (mode, id, time))| Generated {
            kind,
            name,
            link,
            content,
            mode,
            id,
            time,
        },
    )
}

fn add(archive: &mut Archive, generated: &Generated) {
    let Generated { kind, name, link, content, mode, id, time } = generated;
    match id % 4 {
        0 => {
            let attribute = &content[..content.len().min(99)];
            archive.pax(b'x', &[("path", name.as_bytes()), ("SCHILY.xattr.user.x", attribute)]);
        }
        1 => {
            archive.long(b'L', name);
        }
        _ => {}
    }
    archive.add(&Member {
        kind: *kind,
        name: name.as_bytes(),
        link: if matches!(kind, b'1' | b'2') { link.as_bytes() } else { b"" },
        mode: u32::from(*mode),
        ids: (u32::from(*id), 0),
        time: u64::from(*time),
        content: if *kind == b'0' { content } else { b"" },
        ..Member::default()
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_archive_comes_back(members in vec(member(), 0..20)) {
        let mut archive = Archive::default();
        for member in &members {
            add(&mut archive, member);
        }
        round_trip(&archive.end());
    }
}
