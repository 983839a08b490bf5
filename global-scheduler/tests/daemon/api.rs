//! Tokens, errors and the OpenAPI document.

use std::{os::unix::fs::PermissionsExt as _, time::Duration};

use anyplace_api::{ErrorCode, Problem, Role, TokenRequest, TokenScope};
use anyplace_model::DurationMs;
use axum::http::Method;
use serde_json::{Value, json};

use crate::support::{Bed, deployment};

async fn document(bed: &Bed) -> Value {
    bed.client(None).open("/openapi.json", &()).await.unwrap().json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_openapi_document_lists_every_path() {
    let bed = Bed::start().await;
    let document = document(&bed).await;
    assert_eq!((&document["openapi"], &document["info"]["title"]), (&json!("3.1.0"), &json!("anyplace")));
    let operations: Vec<String> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| {
            item.as_object().unwrap().keys().map(move |method| format!("{} {path}", method.to_uppercase()))
        })
        .collect();
    let mut expected = vec![
        "PUT /v1/deployments/{name}",
        "GET /v1/deployments",
        "GET /v1/deployments/{name}",
        "DELETE /v1/deployments/{name}",
        "POST /v1/jobs",
        "GET /v1/jobs",
        "GET /v1/jobs/{name}",
        "POST /v1/jobs/{name}/cancel",
        "DELETE /v1/jobs/{name}",
        "GET /v1/deployments/{name}/why",
        "GET /v1/jobs/{name}/why",
        "GET /v1/deployments/{name}/logs",
        "GET /v1/jobs/{name}/logs",
        "GET /v1/deployments/{name}/routes",
        "GET /v1/instances",
        "GET /v1/teams",
        "GET /v1/teams/{name}",
        "PUT /v1/teams/{name}",
        "GET /v1/locations",
        "GET /v1/locations/{name}",
        "PATCH /v1/locations/{name}",
        "GET /v1/capacity",
        "GET /v1/latency",
        "GET /v1/export",
        "PUT /v1/prewarm",
        "GET /v1/prewarm",
        "DELETE /v1/prewarm",
        "GET /v1/images/in-use",
        "GET /v1/events",
        "POST /v1/tokens",
        "GET /v1/watch/deployments",
        "GET /v1/watch/jobs",
        "GET /v1/watch/locations/{name}/desired",
        "PUT /v1/locations/{name}/report",
    ];
    expected.sort_unstable();
    let mut operations: Vec<&str> = operations.iter().map(String::as_str).collect();
    operations.sort_unstable();
    assert_eq!(operations, expected);
    // Every schema that is referred to is there.
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1) {
        let name = reference.split('"').next().unwrap();
        assert!(document["components"]["schemas"].get(name).is_some(), "{name} is missing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_asks_for_a_token_and_its_role() {
    let bed = Bed::start().await;
    let viewer = bed.client(Some(bed.token(Role::Viewer, None).await));
    let deployer = bed.client(Some(bed.token(Role::Deployer, None).await));
    let other = bed.client(Some(bed.token(Role::Location, Some("nrt")).await));
    let code = async |client: &anyplace_api::Client, method: &Method, path: &str| {
        client.json::<Value, Value>(method.clone(), path, Some(&json!({}))).await.unwrap_err().code()
    };
    for (path, item) in document(&bed).await["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "ams");
        for method in item.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let context = format!("{method} {path}");
            let none = code(&bed.client(None), &method, &path).await;
            assert_eq!(none, Some(ErrorCode::Unauthenticated), "{context}");
            let wrong = code(&bed.client(Some("ap_wrong".into())), &method, &path).await;
            assert_eq!(wrong, Some(ErrorCode::Unauthenticated), "{context}");
            assert_eq!(code(&other, &method, &path).await, Some(ErrorCode::Forbidden), "{context}");
            if method != Method::GET {
                assert_eq!(code(&viewer, &method, &path).await, Some(ErrorCode::Forbidden), "{context}");
            }
            if path.contains("report") || path.contains("desired") || path.contains("tokens") {
                assert_eq!(code(&deployer, &method, &path).await, Some(ErrorCode::Forbidden), "{context}");
            }
        }
    }
    assert!(viewer.deployments().await.unwrap().is_empty());
    deployer.apply_deployment(&deployment(json!({}))).await.unwrap();
    assert_eq!(
        std::fs::metadata(bed.path().join("admin.token")).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_says_that_it_expired_and_what_to_do() {
    let bed = Bed::start().await;
    let request =
        TokenRequest { role: Role::Viewer, scope: TokenScope::default(), ttl: Some(DurationMs(50)) };
    let token = bed.admin.create_token(&request).await.unwrap();
    assert!(token.expires_at.is_some());
    tokio::time::sleep(Duration::from_millis(60)).await;
    let error = bed.client(Some(token.token)).deployments().await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::TokenExpired));
    assert!(error.to_string().contains("ask for a new one: `anyplace token create`"), "{error}");

    let endless = TokenRequest { ttl: Some(DurationMs(u64::MAX)), ..request.clone() };
    let error = bed.admin.create_token(&endless).await.unwrap_err();
    assert_eq!(error.code(), Some(ErrorCode::InvalidRequest));
    let everywhere = TokenRequest { role: Role::Location, ..request };
    let error = bed.admin.create_token(&everywhere).await.unwrap_err();
    assert!(error.to_string().contains("--location NAME"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn impossible_requests_name_the_field_and_the_fix() {
    let bed = Bed::start().await;
    let put = async |path: &str, body: &Value| -> Problem {
        match bed.admin.json::<Value, Value>(Method::PUT, path, Some(body)).await.unwrap_err() {
            anyplace_api::ClientError::Refused(problem) => problem,
            error => panic!("{error}"),
        }
    };
    let good = serde_json::to_value(deployment(json!({}))).unwrap();
    let mut bad = good.clone();
    bad["instances"] = json!({"min": 5, "max": 2});
    let problem = put("/v1/deployments/hello", &bad).await;
    assert_eq!((problem.status, problem.field.as_deref()), (400, Some("instances.max")));
    assert!(problem.fix.is_some());
    let problem = put("/v1/deployments/other", &good).await;
    assert_eq!((problem.status, problem.field.as_deref()), (400, Some("name")));
    let problem = put("/v1/deployments/Not_a_name", &good).await;
    assert_eq!((problem.status, problem.field.as_deref()), (400, Some("name")));
    bad["replicas"] = json!(3);
    let problem = put("/v1/deployments/hello", &bad).await;
    assert!(problem.code == ErrorCode::InvalidRequest && problem.detail.contains("replicas"), "{problem}");
    let problem = put("/v1/nothing", &good).await;
    assert_eq!(problem.code, ErrorCode::NotFound);
    let missing = bed.admin.location(&"ams".parse().unwrap()).await.unwrap_err();
    assert_eq!(missing.code(), Some(ErrorCode::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_shows_the_secret_of_a_location() {
    let bed = Bed::start().await;
    let _ams = bed.location("ams").await;
    bed.admin.apply_deployment(&deployment(json!({}))).await.unwrap();
    for path in [
        "/v1/locations",
        "/v1/locations/ams",
        "/v1/capacity",
        "/v1/deployments",
        "/v1/instances",
        "/v1/events",
    ] {
        let text = bed.admin.open(path, &()).await.unwrap().text().await.unwrap();
        assert!(!text.contains("secret-of-the-location"), "{path}: {text}");
    }
}
