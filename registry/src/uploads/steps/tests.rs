//! What is read as one, and what steps are refused.

use super::*;

fn plan(steps: &[&[u64]]) -> Answer<Plan> {
    let blobs = [Digest::of(b"a"), Digest::of(b"b")];
    Plan::parse(json!({ "blobs": blobs, "steps": steps }).to_string().as_bytes())
}

#[test]
fn steps_are_read_and_wrong_ones_refused() {
    let read = plan(&[&[120], &[0, 4_096, 100], &[1, 0, 1]]).unwrap();
    assert_eq!(read.steps, [Step::Take(120), Step::Copy(0, 4_096..4_196), Step::Copy(1, 0..1)]);
    assert_eq!((read.bytes(), read.copied_bytes()), (221, 101));
    let most = u64::MAX;
    for bad in [
        &[&[][..]][..],
        &[&[0]],
        &[&[0, 0]],
        &[&[0, 5, 0]],
        &[&[2, 0, 1]],
        &[&[0, most, 1]],
        &[&[0, 0, 1, 2]],
        &[&[most], &[1]],
    ] {
        assert!(plan(bad).is_err(), "{bad:?}");
    }
    let many = vec![&[1][..]; STEPS_MAX + 1];
    assert!(plan(&many).is_err() && plan(&many[1..]).is_ok());
    for bad in ["", "{}", "[]", r#"{"blobs":[],"steps":[],"more":1}"#, r#"{"blobs":["x"],"steps":[]}"#] {
        assert!(Plan::parse(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn ranges_that_lie_close_together_are_read_as_one() {
    let window = |steps: &[&[u64]]| {
        let plan = plan(steps).unwrap();
        let Step::Copy(blob, range) = plan.steps[0].clone() else { panic!("not a copy") };
        plan.window_end(0, blob, &range)
    };
    let far = APART_MAX_BYTES;
    for (steps, end) in [
        (&[&[0, 0, 10][..]][..], 10),
        (&[&[0, 0, 10], &[0, 10, 10]], 20),
        (&[&[0, 0, 10], &[7], &[0, 12, 10], &[8], &[0, 30, 1]], 31),
        (&[&[0, 0, 10], &[0, 10 + far, 10]], 20 + far),
        (&[&[0, 0, 10], &[0, 11 + far, 10]], 10),
        (&[&[0, 0, 10], &[far + 1], &[0, 11, 10]], 10),
        (&[&[0, 0, 10], &[1, 11, 10], &[0, 11, 10]], 10),
        (&[&[0, 5, 10], &[0, 0, 5]], 15),
    ] {
        assert_eq!(window(steps), end, "{steps:?}");
    }
}
