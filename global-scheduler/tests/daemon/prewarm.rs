//! Wishes for warm images: who may make them, where they go, and what is seen of them.

use std::collections::BTreeMap;

use anyplace_api::{ErrorCode, Role};
use anyplace_model::{ImageState, LocationSettings, MachineId, Prewarm};
use serde_json::json;

use crate::{
    jobs::window,
    support::{Bed, deployment, eventually, job},
};

fn wish(value: serde_json::Value) -> Prewarm {
    serde_json::from_value(value).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wish_goes_to_its_locations_and_shows_each_machine() {
    let mut bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    let deployer = bed.client(Some(bed.token(Role::Deployer, None).await));
    let view = deployer.set_prewarm(&wish(json!({"image": "app:v1", "locations": ["ams"]}))).await.unwrap();
    assert_eq!((view.warm, view.machines), (0, 0));
    eventually("ams is told", || async { ams.prewarms() == ["app:v1"] }).await;
    assert!(nrt.prewarms().is_empty());
    let states: BTreeMap<MachineId, ImageState> = [
        ("ams-1".parse().unwrap(), ImageState::Warm),
        ("ams-2".parse().unwrap(), ImageState::Pulling { done: 1, total: 4 }),
    ]
    .into();
    ams.script.lock().unwrap().prewarms = [("app:v1".to_owned(), states.clone())].into();
    eventually("its machines are seen", || async {
        let views = bed.admin.prewarms().await.unwrap();
        views.len() == 1
            && (views[0].warm, views[0].machines) == (1, 2)
            && views[0].locations[0].machines == states
    })
    .await;
    // It is kept over a restart, and taken back when asked.
    bed.restart().await;
    assert_eq!(bed.admin.prewarms().await.unwrap().len(), 1);
    bed.admin.delete_prewarm("app:v1").await.unwrap();
    eventually("ams is told again", || async { ams.prewarms().is_empty() }).await;
    let error = bed.admin.delete_prewarm("app:v1").await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_wishes_are_refused_with_their_field() {
    let bed = Bed::start().await;
    let _ams = bed.location("ams").await;
    for (value, part) in [
        (json!({"image": ""}), "image"),
        (json!({"image": "a", "machines": 0}), "machines"),
        (json!({"image": "a", "priority": 200}), "priority"),
        (json!({"image": "a", "locations": ["mars"]}), "no location mars has joined"),
    ] {
        let error = bed.admin.set_prewarm(&wish(value.clone())).await.unwrap_err();
        assert_eq!(error.code(), Some(ErrorCode::InvalidRequest), "{value}");
        assert!(error.to_string().contains(part), "{value}: {error}");
    }
    let viewer = bed.client(Some(bed.token(Role::Viewer, None).await));
    let error = viewer.set_prewarm(&wish(json!({"image": "a"}))).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Forbidden));
}

#[tokio::test(flavor = "multi_thread")]
async fn images_of_queued_jobs_are_fetched_before_the_window_opens() {
    let bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    let off_peak = Some(window(1_800).parse().unwrap());
    let settings = LocationSettings { off_peak, ..LocationSettings::default() };
    bed.admin.set_location(&"ams".parse().unwrap(), &settings).await.unwrap();
    let spec = job(json!({"scheduling_policy": "off-peak"}));
    bed.admin.submit_job(&spec).await.unwrap();
    eventually("ams is told", || async { ams.prewarms() == [spec.image.as_str()] }).await;
    assert!(nrt.prewarms().is_empty());
    bed.admin.cancel_job(&spec.name).await.unwrap();
    eventually("ams is told again", || async { ams.prewarms().is_empty() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_are_told_which_images_are_in_use() {
    let bed = Bed::start().await;
    let viewer = bed.client(Some(bed.token(Role::Viewer, None).await));
    let in_use = async || -> Vec<String> {
        viewer.open("/v1/images/in-use", &()).await.unwrap().json().await.unwrap()
    };
    assert_eq!(in_use().await, Vec::<String>::new());
    bed.admin.set_prewarm(&wish(json!({"image": "warm:v1"}))).await.unwrap();
    bed.admin.apply_deployment(&deployment(json!({"image": "app:v2"}))).await.unwrap();
    let queued = job(json!({"image": "work:v3"}));
    bed.admin.submit_job(&queued).await.unwrap();
    assert_eq!(in_use().await, ["app:v2", "warm:v1", "work:v3"]);
    bed.admin.cancel_job(&queued.name).await.unwrap();
    bed.admin.delete_prewarm("warm:v1").await.unwrap();
    assert_eq!(in_use().await, ["app:v2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_in_use_until_an_update_has_reached_all_instances() {
    let mut bed = Bed::start().await;
    let ams = bed.location("ams").await;
    let viewer = bed.client(Some(bed.token(Role::Viewer, None).await));
    let in_use = async || -> Vec<String> {
        viewer.open("/v1/images/in-use", &()).await.unwrap().json().await.unwrap()
    };
    ams.script.lock().unwrap().lags_at = Some(1);
    for image in ["app:v1", "app:v2", "app:v3"] {
        bed.admin.apply_deployment(&deployment(json!({ "image": image }))).await.unwrap();
        eventually("it is placed", || async { ams.count("hello") > 0 }).await;
    }
    assert_eq!(in_use().await, ["app:v1", "app:v2", "app:v3"]);
    bed.restart().await;
    assert_eq!(in_use().await, ["app:v1", "app:v2", "app:v3"]);
    ams.script.lock().unwrap().lags_at = Some(2);
    eventually("the first is gone", || async { in_use().await == ["app:v2", "app:v3"] }).await;
    ams.script.lock().unwrap().lags_at = None;
    eventually("all have the new one", || async { in_use().await == ["app:v3"] }).await;
}
