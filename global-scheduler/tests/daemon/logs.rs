//! Logs, fetched from a location scheduler that serves them here.

use anyplace_api::{ErrorCode, LogQuery};
use anyplace_model::JobPhase;
use axum::{
    Router,
    extract::{Path, RawQuery},
    http::{HeaderMap, StatusCode},
    routing::get,
};
use serde_json::json;

use crate::support::{Bed, FakeLocation, deployment, eventually, job};

/// Serves a log of two lines for each instance to whoever has the location's log token.
async fn serve_logs(location: &FakeLocation) {
    let log =
        async |headers: HeaderMap, Path(instance): Path<String>, RawQuery(query): RawQuery| match headers
            .get("authorization")
            .and_then(|value| value.to_str().ok())
        {
            Some("Bearer secret-of-the-location") => {
                Ok(format!("{instance} starts with {}\nand ends", query.unwrap_or_default()))
            }
            _ => Err(StatusCode::UNAUTHORIZED),
        };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/v1/instances/{instance}/logs", get(log));
    tokio::spawn(async move { axum::serve(listener, router).await });
    location.script.lock().unwrap().advertise = Some(format!("http://{address}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_come_from_all_instances_or_from_one() {
    let bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    serve_logs(&ams).await;
    bed.admin.apply_deployment(&deployment(json!({"instances": {"min": 2}}))).await.unwrap();
    let name = "hello".parse().unwrap();
    eventually("both run", || async {
        let here = bed.admin.location(&"ams".parse().unwrap()).await.unwrap();
        here.advertise.unwrap() != "http://127.0.0.1:9"
            && bed.admin.deployment(&name).await.unwrap().ready == 2
    })
    .await;
    let query = |instance: Option<&str>| LogQuery {
        instance: instance.map(Into::into),
        follow: false,
        tail: Some(7),
    };
    let text = async |instance: Option<&str>| {
        bed.admin.deployment_logs(&name, &query(instance)).await.unwrap().text().await.unwrap()
    };
    // One location doesn't answer: its instance says so, and the other's log is there.
    let all = text(None).await;
    assert!(all.contains("hello-ams-0 hello-ams-0 starts with follow=false&tail=7\n"), "{all}");
    assert!(all.contains("hello-ams-0 and ends\n"), "{all}");
    assert!(
        all.contains("hello-nrt-0 (no log: http://127.0.0.1:9/v1/instances/hello-nrt-0/logs does not answer")
    );
    assert_eq!(text(Some("hello-ams-0")).await, "hello-ams-0 starts with follow=false&tail=7\nand ends");
    let error = bed.admin.deployment_logs(&name, &query(Some("other"))).await.unwrap_err();
    assert!(error.to_string().contains("choose one of hello-ams-0, hello-nrt-0"), "{error}");
    let error = bed.admin.deployment_logs(&name, &query(Some("hello-nrt-0"))).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::Unavailable));
    drop(nrt);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_job_is_there_after_its_end() {
    let bed = Bed::start().await;
    let ams = bed.location("ams").await;
    serve_logs(&ams).await;
    let spec = job(json!({}));
    bed.admin.submit_job(&spec).await.unwrap();
    eventually("it runs", || async { ams.attempts() == ["work/1"] }).await;
    ams.script.lock().unwrap().exit_code = Some(0);
    eventually("it ends", || async {
        bed.admin.job(&spec.name).await.unwrap().phase == JobPhase::Succeeded && ams.attempts().is_empty()
    })
    .await;
    let log = bed.admin.job_logs(&spec.name, &LogQuery::default()).await.unwrap().text().await.unwrap();
    assert_eq!(log, "work-1 starts with follow=false\nand ends");
}
