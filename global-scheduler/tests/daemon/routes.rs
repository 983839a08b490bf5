//! Routes, fetched from a location scheduler that serves them here.

use anyplace_api::ErrorCode;
use anyplace_model::Route;
use anyplace_service::Json;
use axum::{
    Router,
    extract::Path,
    http::{HeaderMap, StatusCode},
    routing::get,
};
use serde_json::json;

use crate::support::{Bed, FakeLocation, deployment, eventually};

fn route() -> Route {
    let remote = json!({"location": "nrt", "distance_km": 9_340.0, "ready": 1, "ingress": ["10.2.1.1"]});
    serde_json::from_value(
        json!({"vip": "203.0.113.1", "ports": [{"port": 80}], "local": [], "remote": [remote]}),
    )
    .unwrap()
}

/// Serves one virtual IP's route to whoever has the location's token.
async fn serve_routes(location: &FakeLocation) {
    let answer = async |headers: HeaderMap, Path(vip): Path<String>| {
        let token = headers.get("authorization").and_then(|value| value.to_str().ok());
        if token != Some("Bearer secret-of-the-location") || vip != "203.0.113.1" {
            return Err(StatusCode::UNAUTHORIZED);
        }
        Ok::<_, StatusCode>(Json(route()))
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().route("/v1/routes/{vip}", get(answer));
    tokio::spawn(async move { axum::serve(listener, router).await });
    location.script.lock().unwrap().advertise = Some(format!("http://{address}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_come_from_each_location_or_it_is_said_why_not() {
    let bed = Bed::start().await;
    let (ams, nrt) = (bed.location("ams").await, bed.location("nrt").await);
    serve_routes(&ams).await;
    let name = "hello".parse().unwrap();
    let error = bed.admin.routes(&name).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::NotFound), "{error}");
    bed.admin.apply_deployment(&deployment(json!({}))).await.unwrap();
    eventually("one location's routes are there", || async {
        let view = bed.admin.routes(&name).await.unwrap();
        view.locations.iter().any(|location| !location.routes.is_empty())
    })
    .await;
    let view = bed.admin.routes(&name).await.unwrap();
    assert_eq!(view.vips, [route().vip]);
    let names: Vec<&str> = view.locations.iter().map(|it| it.location.as_str()).collect();
    assert_eq!(names, ["ams", "nrt"]);
    assert_eq!((&view.locations[0].routes, &view.locations[0].problem), (&vec![route()], &None));
    let problem = view.locations[1].problem.as_ref().unwrap();
    assert!(problem.contains("http://127.0.0.1:9/v1/routes/203.0.113.1 does not answer"), "{problem}");
    assert!(view.locations[1].routes.is_empty());
    drop(nrt);
    eventually("a location that is lost isn't asked", || async {
        let view = bed.admin.routes(&name).await.unwrap();
        view.locations[1].problem.as_deref() == Some("its location scheduler has stopped reporting")
    })
    .await;
}
