//! The typed client, for the command line and between the daemons.

mod global;
mod location;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use reqwest::{Method, RequestBuilder, Response};
use serde::{Serialize, de::DeserializeOwned};

pub use self::global::IDEMPOTENCY_KEY;
use crate::{ErrorCode, LogQuery, Problem};

/// How long a request may take; watches and logs are streams and have their own bounds.
const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// What to read of a log.
pub type LogOptions = LogQuery;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No answer.
    #[error("{url} does not answer ({reason}); check that it runs, and the address in the context or --url")]
    Unreachable {
        /// What was asked.
        url: String,
        /// What the network said.
        reason: String,
    },
    /// The server refused.
    #[error("{0}")]
    Refused(Problem),
    /// The answer isn't of the API.
    #[error(
        "{url} answered something that is not of this API ({reason}); check the address, and that both ends have the same version"
    )]
    Unexpected {
        /// What was asked.
        url: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// The address isn't a URL.
    #[error("`{url}` is not a URL; write one such as http://127.0.0.1:7600")]
    InvalidUrl {
        /// What was given.
        url: String,
    },
}

impl ClientError {
    /// The server's code, where it answered with a problem.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Refused(problem) => Some(problem.code),
            _ => None,
        }
    }
}

/// A client of one server, or of several of which one leads. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    bases: Arc<Bases>,
    token: Option<String>,
}

/// Servers of which one leads.
#[derive(Debug)]
struct Bases {
    urls: Vec<String>,
    /// The one that answered last.
    current: AtomicUsize,
}

impl Bases {
    /// Splits what is written with commas.
    fn parse(text: &str) -> Result<Self, ClientError> {
        let mut urls = Vec::new();
        for base in text.split(',').map(str::trim) {
            let invalid = || ClientError::InvalidUrl { url: base.into() };
            let url = reqwest::Url::parse(base).map_err(|_| invalid())?;
            if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
                return Err(invalid());
            }
            urls.push(base.trim_end_matches('/').to_owned());
        }
        Ok(Self { urls, current: AtomicUsize::new(0) })
    }

    fn current(&self) -> (usize, &str) {
        let index = self.current.load(Ordering::Relaxed) % self.urls.len();
        (index, &self.urls[index])
    }

    /// The next one is asked from now on, unless another request found that already.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.urls.len();
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

impl Client {
    /// A client of the server at `base`, such as `http://127.0.0.1:7600`, with a bearer token. Several servers are
    /// written with commas: the one that leads is found.
    ///
    /// # Errors
    /// `base` isn't an http or https URL.
    pub fn new(base: &str, token: Option<String>) -> Result<Self, ClientError> {
        let bases = Arc::new(Bases::parse(base)?);
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .map_err(|_| ClientError::InvalidUrl { url: base.into() })?;
        Ok(Self { http, bases, token })
    }

    /// The server's address; of several, of the one that answered last.
    pub fn base(&self) -> &str {
        self.bases.current().1
    }

    /// The same connection pool towards another server with another token.
    ///
    /// # Errors
    /// `base` isn't an http or https URL.
    pub fn with_base(&self, base: &str, token: Option<String>) -> Result<Self, ClientError> {
        Ok(Self { http: self.http.clone(), bases: Arc::new(Bases::parse(base)?), token })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base()));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends a request; of several servers, to the next one where this one surely did nothing.
    async fn send(&self, request: RequestBuilder, path: &str) -> Result<Response, ClientError> {
        let mut request = request.build().map_err(|error| self.broken(path, error.to_string()))?;
        let mut left = self.bases.urls.len();
        loop {
            let (index, base) = self.bases.current();
            let mut url = reqwest::Url::parse(&format!("{base}{path}"))
                .map_err(|_| ClientError::InvalidUrl { url: base.into() })?;
            url.set_query(request.url().query());
            *request.url_mut() = url;
            left -= 1;
            let again = if left > 0 { request.try_clone() } else { None };
            let (error, undone) = match self.http.execute(request).await {
                Ok(response) => match self.accept(response, path).await {
                    Ok(response) => return Ok(response),
                    Err(error) => {
                        let undone = error.code() == Some(ErrorCode::NotLeading);
                        if !undone && !matches!(error, ClientError::Unreachable { .. }) {
                            return Err(error);
                        }
                        (error, undone)
                    }
                },
                Err(error) => (self.unreachable(path, &error), error.is_connect()),
            };
            self.bases.leave(index);
            match again.filter(|_| undone) {
                Some(again) => request = again,
                None => return Err(error),
            }
        }
    }

    /// The response, where it is no refusal.
    async fn accept(&self, response: Response, path: &str) -> Result<Response, ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.map_err(|error| self.unreachable(path, &error))?;
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(ClientError::Refused(problem)),
            Err(_) => Err(self.broken(path, format!("status {status}"))),
        }
    }

    /// Sends a request with an optional JSON body and reads a JSON answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn json<B: Serialize, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<T, ClientError> {
        let response = self.send(with_body(self.request(method, path), body).timeout(TIMEOUT), path).await?;
        response.json().await.map_err(|error| self.broken(path, error.to_string()))
    }

    /// Asks something that may take its time, and reads a JSON answer.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn slow<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        query: &[(&str, &str)],
    ) -> Result<T, ClientError> {
        let response = self.send(self.request(method, path).query(query), path).await?;
        response.json().await.map_err(|error| self.broken(path, error.to_string()))
    }

    async fn no_content<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
    ) -> Result<(), ClientError> {
        self.send(with_body(self.request(method, path), body).timeout(TIMEOUT), path).await.map(|_| ())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json::<(), T>(Method::GET, path, None).await
    }

    /// Opens a stream: a watch or a log.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open<Q: Serialize>(&self, path: &str, query: &Q) -> Result<Response, ClientError> {
        self.send(self.request(Method::GET, path).query(query), path).await
    }

    /// The error of a server that is connected and says nothing; of several, the next one is asked from now on.
    pub(crate) fn silent(&self, path: &str) -> ClientError {
        let (index, base) = self.bases.current();
        let url = format!("{base}{path}");
        self.bases.leave(index);
        ClientError::Unreachable { url, reason: "it fell silent".into() }
    }

    pub(crate) fn broken(&self, path: &str, reason: String) -> ClientError {
        ClientError::Unexpected { url: format!("{}{path}", self.base()), reason }
    }

    fn unreachable(&self, path: &str, error: &reqwest::Error) -> ClientError {
        // The outermost message only repeats the URL; the innermost one says what happened.
        let mut reason: &dyn std::error::Error = error;
        while let Some(source) = reason.source() {
            reason = source;
        }
        let reason = if error.is_timeout() { "no answer in time".into() } else { reason.to_string() };
        ClientError::Unreachable { url: format!("{}{path}", self.base()), reason }
    }
}

fn with_body<B: Serialize>(request: RequestBuilder, body: Option<&B>) -> RequestBuilder {
    match body {
        Some(body) => request.json(body),
        None => request,
    }
}
