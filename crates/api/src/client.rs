//! The typed client, for the command line and between the daemons.

use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyplace_model::{
    DeploymentName, DeploymentSpec, Explanation, InstanceId, JobName, JobSpec, LocationId, LocationRecord,
    LocationReport, LocationSettings, MachineId, MachineRecord, MachineReport, Prewarm, Probes, Route,
    TrafficReport,
};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    ApplyOutcome, CapacityView, DeploymentView, ErrorCode, Event, JobView, LatencyView, LogQuery, NewToken,
    PrewarmQuery, PrewarmView, Problem, RoutesView, TokenRequest,
};

/// How long a request may take; watches and logs are streams and have their own bounds.
const TIMEOUT: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// The header with which a client names a submission, so that it can send it again.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// How often a submission with a key is sent where no answer comes: over the restart of a server.
const SUBMISSIONS: u32 = 3;
const SUBMIT_PAUSE: Duration = Duration::from_millis(500);

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

/// The global scheduler's API, for users. Errors: see [`ClientError`].
#[allow(clippy::missing_errors_doc, reason = "one type of error, said once above")]
impl Client {
    /// Creates or changes a deployment.
    pub async fn apply_deployment(&self, spec: &DeploymentSpec) -> Result<ApplyOutcome, ClientError> {
        self.json(Method::PUT, &format!("/v1/deployments/{}", spec.name), Some(spec)).await
    }

    /// All deployments, by name.
    pub async fn deployments(&self) -> Result<Vec<DeploymentView>, ClientError> {
        self.get("/v1/deployments").await
    }

    /// One deployment.
    pub async fn deployment(&self, name: &DeploymentName) -> Result<DeploymentView, ClientError> {
        self.get(&format!("/v1/deployments/{name}")).await
    }

    /// Ends a deployment and frees its virtual IP.
    pub async fn delete_deployment(&self, name: &DeploymentName) -> Result<(), ClientError> {
        self.no_content::<()>(Method::DELETE, &format!("/v1/deployments/{name}"), None).await
    }

    /// Submits a job.
    pub async fn submit_job(&self, spec: &JobSpec) -> Result<JobView, ClientError> {
        self.json(Method::POST, "/v1/jobs", Some(spec)).await
    }

    /// Submits a job under a key of 1 to 128 visible ASCII characters, and again where no answer comes: there is one
    /// job in the end, and it is the answer.
    pub async fn submit_job_once(&self, spec: &JobSpec, key: &str) -> Result<JobView, ClientError> {
        let path = "/v1/jobs";
        let mut left = SUBMISSIONS;
        loop {
            left -= 1;
            let request = self.request(Method::POST, path).header(IDEMPOTENCY_KEY, key).json(spec);
            let answer = async {
                let response = self.send(request.timeout(TIMEOUT), path).await?;
                response.bytes().await.map_err(|error| self.unreachable(path, &error))
            };
            match answer.await {
                Ok(body) => {
                    return serde_json::from_slice(&body)
                        .map_err(|error| self.broken(path, error.to_string()));
                }
                Err(ClientError::Unreachable { .. }) if left > 0 => tokio::time::sleep(SUBMIT_PAUSE).await,
                Err(error) => return Err(error),
            }
        }
    }

    /// All jobs, oldest first.
    pub async fn jobs(&self) -> Result<Vec<JobView>, ClientError> {
        self.get("/v1/jobs").await
    }

    /// One job.
    pub async fn job(&self, name: &JobName) -> Result<JobView, ClientError> {
        self.get(&format!("/v1/jobs/{name}")).await
    }

    /// Ends a job.
    pub async fn cancel_job(&self, name: &JobName) -> Result<JobView, ClientError> {
        self.json::<(), _>(Method::POST, &format!("/v1/jobs/{name}/cancel"), None).await
    }

    /// Forgets a job that has ended.
    pub async fn delete_job(&self, name: &JobName) -> Result<(), ClientError> {
        self.no_content::<()>(Method::DELETE, &format!("/v1/jobs/{name}"), None).await
    }

    /// Why a deployment is where it is, or isn't.
    pub async fn why_deployment(&self, name: &DeploymentName) -> Result<Explanation, ClientError> {
        self.get(&format!("/v1/deployments/{name}/why")).await
    }

    /// Why a job is where it is, or isn't.
    pub async fn why_job(&self, name: &JobName) -> Result<Explanation, ClientError> {
        self.get(&format!("/v1/jobs/{name}/why")).await
    }

    /// The routes of a deployment's virtual IPs in all locations.
    pub async fn routes(&self, name: &DeploymentName) -> Result<RoutesView, ClientError> {
        self.get(&format!("/v1/deployments/{name}/routes")).await
    }

    /// Log of a deployment's instances, as a stream of text.
    pub async fn deployment_logs(
        &self,
        name: &DeploymentName,
        query: &LogQuery,
    ) -> Result<Response, ClientError> {
        self.open(&format!("/v1/deployments/{name}/logs"), query).await
    }

    /// Log of a job's last attempt, as a stream of text.
    pub async fn job_logs(&self, name: &JobName, query: &LogQuery) -> Result<Response, ClientError> {
        self.open(&format!("/v1/jobs/{name}/logs"), query).await
    }

    /// All locations.
    pub async fn locations(&self) -> Result<Vec<LocationRecord>, ClientError> {
        self.get("/v1/locations").await
    }

    /// One location.
    pub async fn location(&self, name: &LocationId) -> Result<LocationRecord, ClientError> {
        self.get(&format!("/v1/locations/{name}")).await
    }

    /// Replaces an operator's settings of a location.
    pub async fn set_location(
        &self,
        name: &LocationId,
        settings: &LocationSettings,
    ) -> Result<LocationRecord, ClientError> {
        self.json(Method::PATCH, &format!("/v1/locations/{name}"), Some(settings)).await
    }

    /// Wishes that machines have an image.
    pub async fn set_prewarm(&self, spec: &Prewarm) -> Result<PrewarmView, ClientError> {
        self.json(Method::PUT, "/v1/prewarm", Some(spec)).await
    }

    /// All wishes for warm images, by image.
    pub async fn prewarms(&self) -> Result<Vec<PrewarmView>, ClientError> {
        self.get("/v1/prewarm").await
    }

    /// Takes a wish back; machines keep the image until they need its room.
    pub async fn delete_prewarm(&self, image: &str) -> Result<(), ClientError> {
        let query = PrewarmQuery { image: image.to_owned() };
        let request = self.request(Method::DELETE, "/v1/prewarm").query(&query).timeout(TIMEOUT);
        self.send(request, "/v1/prewarm").await.map(drop)
    }

    /// Capacity by location.
    pub async fn capacity(&self) -> Result<Vec<CapacityView>, ClientError> {
        self.get("/v1/capacity").await
    }

    /// Round trips between locations; those from one where given.
    pub async fn latency(&self, from: Option<&LocationId>) -> Result<Vec<LatencyView>, ClientError> {
        let request = self.request(Method::GET, "/v1/latency").query(&[("from", from)]).timeout(TIMEOUT);
        let response = self.send(request, "/v1/latency").await?;
        response.json().await.map_err(|error| self.broken("/v1/latency", error.to_string()))
    }

    /// What happened, oldest first; to one subject where given, such as `deployment/hello`.
    pub async fn events(&self, subject: Option<&str>) -> Result<Vec<Event>, ClientError> {
        let request = self.request(Method::GET, "/v1/events").query(&[("subject", subject)]).timeout(TIMEOUT);
        let response = self.send(request, "/v1/events").await?;
        response.json().await.map_err(|error| self.broken("/v1/events", error.to_string()))
    }

    /// Everything stored, at one moment, as a file for `anyplace admin import`.
    pub async fn export(&self) -> Result<bytes::Bytes, ClientError> {
        let response = self.open("/v1/export", &()).await?;
        response.bytes().await.map_err(|error| self.broken("/v1/export", error.to_string()))
    }

    /// Makes a token.
    pub async fn create_token(&self, request: &TokenRequest) -> Result<NewToken, ClientError> {
        self.json(Method::POST, "/v1/tokens", Some(request)).await
    }

    /// Tells the global scheduler what a location has.
    pub async fn report_location(&self, report: &LocationReport) -> Result<(), ClientError> {
        self.no_content(Method::PUT, &format!("/v1/locations/{}/report", report.location), Some(report)).await
    }
}

/// The location scheduler's API, for its machines and the global scheduler. Errors: see [`ClientError`].
#[allow(clippy::missing_errors_doc, reason = "one type of error, said once above")]
impl Client {
    /// Tells the location scheduler what a machine has.
    pub async fn report_machine(&self, report: &MachineReport) -> Result<(), ClientError> {
        self.no_content(Method::PUT, &format!("/v1/machines/{}/report", report.machine), Some(report)).await
    }

    /// Tells the location scheduler how many new connections enter at a machine; what its router should measure.
    pub async fn report_traffic(
        &self,
        machine: &MachineId,
        report: &TrafficReport,
    ) -> Result<Probes, ClientError> {
        self.json(Method::PUT, &format!("/v1/machines/{machine}/traffic"), Some(report)).await
    }

    /// The location's machines.
    pub async fn machines(&self) -> Result<Vec<MachineRecord>, ClientError> {
        self.get("/v1/machines").await
    }

    /// Path of the watch of what a machine should have; items are `MachineDesired`.
    pub fn machine_desired_path(machine: &MachineId) -> String {
        format!("/v1/watch/machines/{machine}/desired")
    }

    /// Path of the watch of routes; items are `RouteRecord`.
    pub const ROUTES_PATH: &str = "/v1/watch/routes";

    /// A virtual IP's route, as the location's routers follow it.
    pub async fn route(&self, vip: IpAddr) -> Result<Route, ClientError> {
        self.get(&format!("/v1/routes/{vip}")).await
    }

    /// Path of the watch of what a location should have; items are `LocationDesired`.
    pub fn location_desired_path(location: &LocationId) -> String {
        format!("/v1/watch/locations/{location}/desired")
    }

    /// Log of one instance, at its location scheduler or its machine agent, as a stream of text.
    pub async fn instance_logs(
        &self,
        instance: &InstanceId,
        query: &LogQuery,
    ) -> Result<Response, ClientError> {
        self.open(&format!("/v1/instances/{instance}/logs"), query).await
    }

    /// Whether the server answers at all.
    pub async fn healthz(&self) -> Result<(), ClientError> {
        let request = self.request(Method::GET, "/healthz").timeout(CONNECT_TIMEOUT);
        match self.send(request, "/healthz").await {
            Ok(response) if response.status() == StatusCode::OK => Ok(()),
            Ok(response) => Err(self.broken("/healthz", format!("status {}", response.status()))),
            Err(error) => Err(error),
        }
    }
}
