//! Authorization: Basic, and the token flow of the distribution specification.
//!
//! A request is sent with whatever was accepted last for its registry, repository and actions. On 401 the
//! challenge decides: `Basic` sends the credentials, `Bearer` gets a token from the challenge's realm. Each request
//! is repeated once at most for that.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;

use super::retry::{Backoff, is_passing, retry_after};
use super::{ANSWER_TIMEOUT, Client, Credentials, Target, check};
use crate::error::{Error, Result};

/// Most authorizations that are remembered; all are dropped when there are more.
const REMEMBERED_MAX: usize = 4_096;

/// What a request does, and so what its authorization must allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Grant<'a> {
    /// Read the target's repository.
    Pull,
    /// Write to it.
    Push,
    /// Write to it what is read from this other repository.
    Mount(&'a str),
}

/// What an authorization is good for.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Scope {
    registry: String,
    /// In the token flow's words, separated by spaces: `repository:a/b:pull,push`.
    resources: String,
}

impl Scope {
    fn new(target: &Target, grant: Grant<'_>) -> Scope {
        let own = &target.repository;
        let resources = match grant {
            Grant::Pull => format!("repository:{own}:pull"),
            Grant::Push => format!("repository:{own}:pull,push"),
            Grant::Mount(from) => format!("repository:{own}:pull,push repository:{from}:pull"),
        };
        Scope { registry: target.name(), resources }
    }
}

/// The authorization of one scope. Requests that need a new token at once wait for one fetch.
#[derive(Default)]
pub(super) struct Slot {
    accepted: Mutex<Option<HeaderValue>>,
    fetching: tokio::sync::Mutex<()>,
}

impl Slot {
    fn get(&self) -> Option<HeaderValue> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, value: Option<HeaderValue>) {
        *self.accepted.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }
}

/// A parsed `WWW-Authenticate`.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

impl Client {
    /// Sends a request with what it needs to be allowed, and again while its failures are of a kind that passes.
    pub(super) async fn send(
        &self,
        target: &Target,
        grant: Grant<'_>,
        request: impl Fn() -> Result<RequestBuilder>,
    ) -> Result<Response> {
        let mut backoff = self.patience.backoff();
        loop {
            let outcome = self.send_once(target, grant, &request).await;
            let asked = match &outcome {
                Ok(response) if is_passing(response.status().as_u16()) => retry_after(response.headers()),
                Err(error) if error.is_passing() => None,
                _ => return outcome,
            };
            if !self.pause(&mut backoff, asked).await {
                return outcome;
            }
        }
    }

    /// Waits before a repetition; false, at once, when there were enough.
    pub(super) async fn pause(&self, backoff: &mut Backoff, asked: Option<Duration>) -> bool {
        let counters = &self.inner.counters;
        match backoff.next(asked) {
            Some(wait) => {
                counters.retries.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(wait).await;
                true
            }
            None => {
                counters.gave_up.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    /// Sends a request; twice where the registry wants another authorization.
    pub(super) async fn send_once(
        &self,
        target: &Target,
        grant: Grant<'_>,
        request: impl Fn() -> Result<RequestBuilder>,
    ) -> Result<Response> {
        let scope = Scope::new(target, grant);
        let slot = self.slot(&scope);
        let first = match (slot.get(), &target.credentials) {
            (Some(accepted), _) => Some(accepted),
            (None, Some(credentials)) => Some(basic(credentials)?),
            (None, None) => None,
        };
        let response = attempt(target, request()?, first.as_ref()).await?;
        self.inner.counters.answered.fetch_add(1, Ordering::Relaxed);
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = challenges.iter().find_map(|value| parse(value.to_str().ok()?));
        let second = match challenge {
            Some(Challenge::Bearer { realm, service, scope: asked }) => {
                let _only_one = slot.fetching.lock().await;
                match slot.get().filter(|accepted| Some(accepted) != first.as_ref()) {
                    // Another request was told the same, and has a new one already.
                    Some(new) => new,
                    None => {
                        let asked = union(&scope.resources, asked.as_deref().unwrap_or_default());
                        let new = self.token(target, &realm, service.as_deref(), &asked).await?;
                        slot.set(Some(new.clone()));
                        new
                    }
                }
            }
            Some(Challenge::Basic) => match &target.credentials {
                Some(credentials) => basic(credentials)?,
                None => return Ok(response),
            },
            None => return Ok(response),
        };
        if first.as_ref() == Some(&second) {
            return Ok(response);
        }
        let response = attempt(target, request()?, Some(&second)).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            slot.set(Some(second));
        } else if slot.get().as_ref() == Some(&second) {
            slot.set(None);
        }
        Ok(response)
    }

    fn slot(&self, scope: &Scope) -> Arc<Slot> {
        let mut slots = self.inner.authorizations.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= REMEMBERED_MAX && !slots.contains_key(scope) {
            slots.clear();
        }
        slots.entry(scope.clone()).or_default().clone()
    }

    async fn token(
        &self,
        target: &Target,
        realm: &str,
        service: Option<&str>,
        scope: &str,
    ) -> Result<HeaderValue> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let bad = |reason: String| Error::InvalidRegistry {
            what: format!("the token service that {} names", target.name()),
            reason,
        };
        let mut url = Url::parse(realm).map_err(|e| bad(format!("`{realm}` is no URL ({e})")))?;
        if target.base.scheme() == "https" && url.scheme() != "https" {
            return Err(bad(format!("`{realm}` would send the password in the clear")));
        }
        {
            let mut query = url.query_pairs_mut();
            if let Some(service) = service {
                query.append_pair("service", service);
            }
            for one in scope.split(' ').filter(|one| !one.is_empty()) {
                query.append_pair("scope", one);
            }
        }
        let mut request = self.inner.http.get(url).timeout(ANSWER_TIMEOUT);
        if let Some(credentials) = &target.credentials {
            request = request.header(AUTHORIZATION, basic(credentials)?);
        }
        let response = request.send().await.map_err(|e| target.unreachable(e))?;
        let token: Token = check(target, response)
            .await?
            .json()
            .await
            .map_err(|e| bad(format!("its answer has no token ({e})")))?;
        let token =
            token.token.or(token.access_token).ok_or_else(|| bad("its answer has no token".to_owned()))?;
        let mut value = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| bad("its token can't be sent in a header".to_owned()))?;
        value.set_sensitive(true);
        Ok(value)
    }
}

async fn attempt(
    target: &Target,
    request: RequestBuilder,
    authorization: Option<&HeaderValue>,
) -> Result<Response> {
    let request = match authorization {
        Some(value) => request.header(AUTHORIZATION, value),
        None => request,
    };
    request.send().await.map_err(|e| target.unreachable(e))
}

fn basic(credentials: &Credentials) -> Result<HeaderValue> {
    let pair = format!("{}:{}", credentials.user, credentials.password);
    let mut value =
        HeaderValue::try_from(format!("Basic {}", BASE64_STANDARD.encode(pair))).map_err(|_| {
            Error::InvalidRegistry {
                what: "registry credentials".to_owned(),
                reason: "can't be sent in a header".to_owned(),
            }
        })?;
    value.set_sensitive(true);
    Ok(value)
}

/// What we need, and what the registry asks for beyond it.
fn union(own: &str, asked: &str) -> String {
    let mut all: Vec<&str> = own.split(' ').collect();
    all.extend(asked.split(' ').filter(|one| !one.is_empty() && !own.split(' ').any(|known| known == *one)));
    all.join(" ")
}

fn parse(header: &str) -> Option<Challenge> {
    let (scheme, mut rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    while let Some((key, after)) = rest.split_once('=') {
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(',').unwrap_or((after, "")),
        };
        match key.trim_matches([' ', ',']).to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value.to_owned()),
            "service" => service = Some(value.to_owned()),
            "scope" => scope = Some(value.to_owned()),
            _ => {}
        }
        rest = next;
    }
    Some(Challenge::Bearer { realm: realm?, service, scope })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_are_joined() {
        assert_eq!(union("repository:a:pull", ""), "repository:a:pull");
        assert_eq!(union("repository:a:pull", "repository:a:pull"), "repository:a:pull");
        assert_eq!(
            union("repository:a:pull,push repository:b:pull", "repository:a:pull,push registry:catalog:*"),
            "repository:a:pull,push repository:b:pull registry:catalog:*"
        );
    }

    #[test]
    fn challenges_are_parsed() {
        assert_eq!(parse("Basic realm=\"x\""), Some(Challenge::Basic));
        assert_eq!(parse("Negotiate"), None);
        assert_eq!(parse("Bearer service=\"x\""), None);
        let hub = "Bearer realm=\"https://auth.example/token\",service=\"reg\",\
                   scope=\"repository:a/b:pull,push\",error=insufficient_scope";
        assert_eq!(
            parse(hub),
            Some(Challenge::Bearer {
                realm: "https://auth.example/token".into(),
                service: Some("reg".into()),
                scope: Some("repository:a/b:pull,push".into()),
            })
        );
    }

    #[test]
    fn changed_challenges() {
        crate::mutations::lines("challenges.txt", |text| {
            let Some(Challenge::Bearer { realm, service, scope }) = parse(text) else { return };
            // Nothing is made up, and nothing ends in the middle of a quote.
            for value in [Some(realm), service, scope].into_iter().flatten() {
                assert!(
                    text.contains(&value)
                        && (!value.contains('"') || !text.contains(&format!("\"{value}\"")))
                );
            }
        });
    }
}
