//! Requests to a registry's admin API.

use std::time::Duration;

use anyhow::{Context as _, bail};
use anyplace_images::Credentials;
use reqwest::{Client, Method, RequestBuilder, Url};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{context::Session, wait};

/// How long to wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The same for what a large registry has to read a lot for.
const SLOW_TIMEOUT: Duration = Duration::from_secs(300);
const SLOW: [&str; 4] = ["/v1/du", "/v1/tags", "/v1/trash", "/v1/uploads"];

/// A registry, and who asks it.
pub(super) struct Admin {
    client: Client,
    url: Url,
    credentials: Option<Credentials>,
}

/// Errors as registries write them.
#[derive(Deserialize)]
struct Refused {
    errors: Vec<Reason>,
}

#[derive(Deserialize)]
struct Reason {
    message: String,
    #[serde(default)]
    detail: serde_json::Value,
}

impl Reason {
    /// The message, after the field that it is about.
    fn text(self) -> String {
        match self.detail.get("field").and_then(serde_json::Value::as_str) {
            Some(field) => format!("{field}: {}", self.message),
            None => self.message,
        }
    }
}

impl Admin {
    pub(super) fn new(session: &Session) -> anyhow::Result<Admin> {
        Admin::to(session.registry()?.registry().clone(), session.registry_credentials()?)
    }

    fn to(url: Url, credentials: Option<Credentials>) -> anyhow::Result<Admin> {
        let client = Client::builder().connect_timeout(CONNECT_TIMEOUT).build()?;
        Ok(Admin { client, url, credentials })
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> anyhow::Result<T> {
        self.send(self.request(Method::GET, path)?.query(query)).await
    }

    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.send(self.request(Method::POST, path)?.json(body)).await
    }

    pub(super) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        self.send(self.request(Method::PUT, path)?.json(body)).await
    }

    /// The answer has no content.
    pub(super) async fn delete(&self, path: &str) -> anyhow::Result<()> {
        self.bytes(self.request(Method::DELETE, path)?).await.map(drop)
    }

    /// Of some, for which the answer says what became of them.
    pub(super) async fn delete_and_tell<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
    ) -> anyhow::Result<T> {
        self.send(self.request(Method::DELETE, path)?.query(query)).await
    }

    fn request(&self, method: Method, path: &str) -> anyhow::Result<RequestBuilder> {
        let limit = if SLOW.contains(&path) { SLOW_TIMEOUT } else { ANSWER_TIMEOUT };
        let request = self.client.request(method, self.url.join(path)?).timeout(limit);
        Ok(match &self.credentials {
            Some(Credentials { user, password }) => request.basic_auth(user, Some(password)),
            None => request,
        })
    }

    async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> anyhow::Result<T> {
        let bytes = self.bytes(request).await?;
        serde_json::from_slice(&bytes)
            .with_context(|| format!("the registry {} answered something else than expected", self.url))
    }

    async fn bytes(&self, request: RequestBuilder) -> anyhow::Result<Vec<u8>> {
        let url = &self.url;
        let answer = wait::answer(url, request.send(), || true).await.with_context(|| {
            format!("the registry {url} can't be asked; check that it runs, and --registry or the context")
        })?;
        let status = answer.status();
        let bytes = answer.bytes().await.with_context(|| format!("the registry {url} broke off"))?;
        if status.is_success() {
            return Ok(bytes.into());
        }
        let reasons = serde_json::from_slice::<Refused>(&bytes).map(|refused| refused.errors);
        let reasons: Vec<String> = reasons.unwrap_or_default().into_iter().map(Reason::text).collect();
        let reason = if reasons.is_empty() { "no reason given".to_owned() } else { reasons.join("; ") };
        match status.as_u16() {
            401 | 403 => bail!(
                "{url}: {reason}; give an operator's credentials by --registry-credentials-file or the context"
            ),
            404 if reasons.is_empty() => {
                bail!("{url} has no admin API; is it a registry of another make, or an earlier version?")
            }
            code => bail!("{url} refused ({code}): {reason}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Time passes at once where nothing happens.
    #[tokio::test(start_paused = true)]
    async fn a_silent_registry_is_given_up() {
        anyplace_service::install_crypto_provider();
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap()).parse().unwrap();
        let admin = Admin::to(url, None).unwrap();
        let begun = tokio::time::Instant::now();
        let error = admin.get::<serde_json::Value>("/v1/gc", &[]).await.unwrap_err();
        assert!(error.to_string().contains("can't be asked; check that it runs"), "{error:#}");
        assert!(begun.elapsed() < 2 * ANSWER_TIMEOUT, "{:?}", begun.elapsed());
    }
}
