//! Images on a machine: their budget, registries that are away, and a disk that spoils them.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyplace_images::Digest;
use anyplace_model::{ImageState, MachineDesired, ReasonCode};

use crate::{
    bed::{self, TOKEN},
    web,
};

#[test]
fn a_wish_goes_for_an_instance_and_what_has_no_room_is_refused_with_a_reason() {
    bed::with(|mut bed| async move {
        bed.settings += "image_budget = '9Mi'\n";
        for (name, bytes) in [("wish", 5_000_000), ("app", 4_000_000), ("other", 5_000_001)] {
            bed.add_image(name, bytes).await;
        }
        bed.start_agent();
        let wish = |name: &str| {
            let image = format!("{name}:v1");
            bed.feed.set(format!("images/{image}"), MachineDesired::Image { image, priority: 50 });
        };
        wish("wish");
        bed.until_image("wish:v1", "warm", |state| *state == ImageState::Warm).await;
        let known = bed.reports().len();
        let mut app = web("web-1", 65);
        app.image = "app:v1".into();
        bed.want(app);
        bed.until_ready("web-1", 0).await;
        let went = |report: &anyplace_model::MachineReport| report.images["wish:v1"] == ImageState::Cold;
        assert!(bed.reports()[known..].iter().any(went), "{:?}", bed.reports().last());
        // What is in use leaves no room for another.
        bed.feed.set("images/other:v1", MachineDesired::Image { image: "other:v1".into(), priority: 50 });
        let refused = |state: &ImageState| match state {
            ImageState::Failed(condition) => {
                assert!(condition.message.contains("raise `image_budget`"), "{condition:?}");
                condition.reason == ReasonCode::InsufficientDisk
            }
            _ => false,
        };
        bed.until_image("other:v1", "refused", refused).await;
        bed.unwant("web-1");
        bed.until_gone("web-1").await;
        bed.stop_agent().await;
    });
}

#[test]
fn the_next_registry_serves_where_the_first_is_away() {
    bed::with(|mut bed| async move {
        // Nobody listens there.
        bed.settings = bed.settings.replace("registry = ", "registry = 'http://127.0.0.1:1'\nregistries = [");
        bed.settings = bed.settings.trim_end().to_owned() + "]\n";
        bed.start_agent();
        bed.want(web("web-1", 65));
        bed.until_ready("web-1", 0).await;
        bed.unwant("web-1");
        bed.until_gone("web-1").await;
        bed.stop_agent().await;
    });
}

#[test]
fn what_the_disk_spoils_is_found_and_fetched_anew() {
    bed::with(|mut bed| async move {
        bed.settings += "scrub = { every = '1s', rate = '1GiB' }\n";
        let noise = bed.add_image("site", 300_000).await;
        bed.start_agent();
        let mut site = web("web-1", 65);
        site.image = "site:v1".into();
        bed.want(site);
        bed.until_ready("web-1", 0).await;
        let hex = Digest::of(&noise).hex().to_owned();
        let object: PathBuf = bed.data().join("images/objects").join(&hex[..2]).join(&hex[2..]);
        let mut spoilt = noise.clone();
        spoilt[123_456] ^= 1;
        fs::write(&object, &spoilt).unwrap();
        let begun = Instant::now();
        loop {
            let (status, _, body) = bed.agent_get("/v1/images/scrub", TOKEN).await;
            assert_eq!(status, 200, "{body}");
            let state: serde_json::Value = serde_json::from_str(&body).unwrap();
            if state["damaged"] == 1 && state["lacking"] == serde_json::json!([]) {
                assert_eq!(state["names"][0], format!("objects/{}/{}", &hex[..2], &hex[2..]), "{state}");
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "{state}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(fs::read(&object).unwrap() == noise, "the object is as it was");
        // The container, which ran on, sees it too, and the image is listed as before.
        bed.until_ready("web-1", 0).await;
        let inside = PathBuf::from(format!("/proc/{}/root/noise", bed.init_pid("web-1")));
        assert!(fs::read(inside).unwrap() == noise, "the container has the file as it was");
        let (_, _, listed) = bed.agent_get("/v1/images", TOKEN).await;
        assert!(listed.contains("site:v1"), "{listed}");
        bed.unwant("web-1");
        bed.until_gone("web-1").await;
        bed.stop_agent().await;
    });
}
