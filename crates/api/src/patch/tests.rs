use anyplace_seed::Seed;

use super::*;

const MAX: usize = 1 << 20;

fn text(seed: &mut Seed, length: u64) -> Vec<u8> {
    // Few letters, so that texts are alike by chance too.
    (0..seed.below(length + 1)).map(|_| b"ab:1,"[seed.index(5)]).collect()
}

/// A text with some pieces dropped, added and changed.
fn edited(seed: &mut Seed, text: &[u8]) -> Vec<u8> {
    let mut edited = text.to_vec();
    for _ in 0..seed.below(5) {
        let at = seed.index(edited.len() + 1);
        let end = (at + seed.index(40)).min(edited.len());
        let piece = self::text(seed, 40);
        edited.splice(at..end, piece);
    }
    edited
}

#[test]
fn a_patch_makes_the_next_text_of_the_one_before_and_of_no_other() {
    let mut seed = Seed::from_env();
    for round in 0..3_000 {
        let before = text(&mut seed, 600);
        let after = edited(&mut seed, &before);
        let splices = splices(&before, &after);
        let patch = Patch { revision: round, key: "k".into(), digest: digest(&after), splices };
        assert_eq!(patch.apply(&before).as_deref(), Some(after.as_slice()), "round {round}");
        assert_eq!(patch.apply(&after).as_deref(), Some(after.as_slice()), "twice is once");
        let other = edited(&mut seed, &before);
        let found = patch.apply(&other);
        assert!(
            found.is_none_or(|found| found == after),
            "round {round}: whatever comes of it is right or nothing"
        );
    }
}

#[test]
fn frames_are_read_as_they_were_written_wherever_they_are_cut() {
    let mut seed = Seed::from_env();
    let mut frames = Vec::new();
    for revision in 0..200 {
        let before = text(&mut seed, 400);
        let after = edited(&mut seed, &before);
        frames.push(match Patch::between(revision << seed.below(50), "vips/203.0.113.1", &before, &after) {
            Some(patch) => Frame::Patch(patch, seed.one_in(2)),
            None => Frame::Event(after),
        });
    }
    let mut bytes = Vec::new();
    frames.iter().for_each(|frame| frame.write(&mut bytes));
    let (mut read, mut buffer, mut rest) = (Vec::new(), Vec::new(), bytes.as_slice());
    while read.len() < frames.len() {
        match Frame::read(&buffer, MAX).unwrap() {
            Some((frame, length)) => {
                buffer.drain(..length);
                read.push(frame);
            }
            None => {
                let (piece, later) = rest.split_at(rest.len().min(1 + seed.index(30)));
                buffer.extend_from_slice(piece);
                rest = later;
            }
        }
    }
    assert!(buffer.is_empty() && rest.is_empty());
    assert_eq!(read, frames);
}

#[test]
fn what_is_no_frame_is_refused_and_nothing_panics() {
    assert!(Frame::read(&[0x80; 10], MAX).is_err(), "a length without an end");
    assert_eq!(Frame::read(&[0x80; 9], MAX), Ok(None));
    assert!(Frame::read(&[0xff, 0xff, 0xff, 0x7f], MAX).unwrap_err().contains("more than"));
    assert!(Frame::read(&[1, 3], MAX).unwrap_err().contains("unknown form"));
    let mut seed = Seed::from_env();
    for _ in 0..20_000 {
        let mut bytes: Vec<u8> = (0..seed.below(60)).map(|_| seed.below(256) as u8).collect();
        if let Some(first) = bytes.first_mut() {
            *first %= 60;
        }
        if let Ok(Some((Frame::Patch(patch, _), _))) = Frame::read(&bytes, MAX) {
            let _ = patch.apply(b"some text that was there before");
        }
    }
}

/// Of what routes' changes need most: an instance that stops, and one less in another location.
#[test]
fn a_change_of_a_route_takes_a_few_dozen_bytes() {
    let endpoint = |index: u32, ready: bool, stopped_ms: u64| {
        format!(
            "{{\"instance\":\"web-{index}\",\"machine\":\"ams-{index}\",\"address\":\"10.1.{index}.65\",\"ready\":{ready},\
             \"draining\":false,\"began_ms\":{},\"stopped_ms\":{stopped_ms},\"slot\":{index},\"weight\":100}}",
            1_764_460_000_000_u64 + u64::from(index)
        )
    };
    let route = |stopped: Option<u32>, there: u32| {
        let local: Vec<String> = (0..16)
            .map(|index| match stopped {
                Some(it) if it == index => endpoint(index, false, 1_764_460_123_456),
                _ => endpoint(index, true, 0),
            })
            .collect();
        let text = format!(
            "{{\"vip\":{{\"vip\":\"203.0.113.1\",\"local\":[{}],\"remote\":[{{\"location\":\"nrt\",\"ready\":{there}}}]}}}}",
            local.join(",")
        );
        text.into_bytes()
    };
    let size = |before: &[u8], after: &[u8]| {
        let patch = Patch::between(123_456, "vips/203.0.113.1", before, after).unwrap();
        let mut bytes = Vec::new();
        Frame::Patch(patch, true).write(&mut bytes);
        bytes.len()
    };
    assert!(size(&route(None, 16), &route(Some(7), 16)) <= 54);
    assert!(size(&route(Some(7), 16), &route(None, 16)) <= 54);
    assert!(size(&route(None, 16), &route(None, 15)) <= 36);
}
