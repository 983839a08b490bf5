//! Requests to a registry's admin API.

use anyhow::{Context as _, bail};
use anyplace_images::Credentials;
use reqwest::{Client, Method, RequestBuilder, Url};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::context::Session;

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
        let (url, credentials) = (session.registry()?.registry().clone(), session.registry_credentials()?);
        Ok(Admin { client: Client::builder().build()?, url, credentials })
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

    fn request(&self, method: Method, path: &str) -> anyhow::Result<RequestBuilder> {
        let request = self.client.request(method, self.url.join(path)?);
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
        let answer = request.send().await.with_context(|| {
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
