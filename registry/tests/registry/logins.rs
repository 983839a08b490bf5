//! Who guesses passwords is held up, and asking for tokens counts as a request.

use std::net::{IpAddr, Ipv4Addr};

use reqwest::Method;
use serde_json::json;

use crate::access::{account, team};
use crate::support::{Registry, code, header};

/// More than are ever let through while a test runs.
const TRIES_MAX: usize = 5_000;

#[tokio::test]
async fn wrong_passwords_are_refused_unseen_after_some_and_nobody_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    let right = account(&registry, "ana", json!({ "grants": ["**:pull"] })).await;
    let basic = async |name: &str, secret: &str| {
        let request = registry.anonymous(Method::GET, "/v2/").basic_auth(name, Some(secret));
        request.send().await.unwrap()
    };
    let form = async |secret: &str| {
        let form = format!("grant_type=password&username=ana&password={secret}");
        let request = registry.anonymous(Method::POST, "/auth/token").body(form);
        request.header("content-type", "application/x-www-form-urlencoded").send().await.unwrap()
    };
    // However they are asked for.
    let (mut refused, mut wrong) = (0, 0);
    for number in 0..TRIES_MAX {
        let answer = match number % 2 {
            0 => basic("ana", &format!("wrong{number}")).await,
            _ => form(&format!("wrong{number}")).await,
        };
        match answer.status().as_u16() {
            401 => wrong += 1,
            status => {
                assert!((1..=6).contains(&header(&answer, "retry-after").parse::<u64>().unwrap()));
                assert_eq!((status, code(answer).await), (429, (429, "TOOMANYREQUESTS".into())));
                refused += 1;
            }
        }
        if refused == 2 {
            break;
        }
    }
    assert!(wrong >= 10 && refused == 2, "{wrong} {refused}");
    // Others at the same address, and the same one elsewhere.
    assert_eq!(basic("anyplace", &registry.credentials().password).await.status(), 200);
    let elsewhere = reqwest::Client::builder().no_proxy();
    let elsewhere = elsewhere.local_address(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 2))).build().unwrap();
    let answer = elsewhere.get(format!("{}/v2/", registry.url())).basic_auth("ana", Some(&right));
    assert_eq!(answer.send().await.unwrap().status(), 200);
    let metrics = registry.anonymous(Method::GET, "/metrics").send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("logins_refused"), "{metrics}");
    registry.stop().await;
}

#[tokio::test]
async fn tokens_count_for_the_rate_of_a_team() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(dir.path()).await;
    team(&registry, "slow", json!({ "requests_per_s": 2 })).await;
    let secret = account(&registry, "slow-1", json!({ "grants": ["**:pull"], "team": "slow" })).await;
    let mut refused = false;
    for _ in 0..TRIES_MAX {
        let token = registry.anonymous(Method::GET, "/auth/token").basic_auth("slow-1", Some(&secret));
        let token = token.send().await.unwrap();
        if token.status() == 429 {
            assert_eq!(code(token).await, (429, "TOOMANYREQUESTS".into()));
            refused = true;
            break;
        }
        assert_eq!(token.status(), 200);
    }
    assert!(refused);
    registry.stop().await;
}
