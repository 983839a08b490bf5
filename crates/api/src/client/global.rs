//! What users ask of the global scheduler, and locations tell it.

use std::time::Duration;

use anyplace_model::{
    DeploymentName, DeploymentSpec, Explanation, JobName, JobSpec, LocationId, LocationRecord,
    LocationReport, LocationSettings, Prewarm, Team, TeamSettings,
};
use reqwest::{Method, Response};

use super::{Client, ClientError, TIMEOUT};
use crate::{
    ApplyOutcome, CapacityView, DeploymentView, Event, JobQuery, JobView, LatencyView, LogQuery, NewToken,
    PrewarmQuery, PrewarmView, RoutesView, TeamView, TokenRequest,
};

/// The header with which a client names a submission, so that it can send it again.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// How often a submission with a key is sent where no answer comes: over the restart of a server.
const SUBMISSIONS: u32 = 3;
const SUBMIT_PAUSE: Duration = Duration::from_millis(500);

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

    /// All indexes of an array, in their order.
    pub async fn job_indexes(&self, array: &JobName) -> Result<Vec<JobView>, ClientError> {
        let query = JobQuery { array: Some(array.clone()) };
        let request = self.request(Method::GET, "/v1/jobs").query(&query).timeout(TIMEOUT);
        let response = self.send(request, "/v1/jobs").await?;
        response.json().await.map_err(|error| self.broken("/v1/jobs", error.to_string()))
    }

    /// All jobs and arrays, oldest first.
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

    /// All teams for which something is set, or whose jobs wait or run.
    pub async fn teams(&self) -> Result<Vec<TeamView>, ClientError> {
        self.get("/v1/teams").await
    }

    /// One team.
    pub async fn team(&self, name: &Team) -> Result<TeamView, ClientError> {
        self.get(&format!("/v1/teams/{name}")).await
    }

    /// Replaces an operator's settings of a team.
    pub async fn set_team(&self, name: &Team, settings: &TeamSettings) -> Result<TeamView, ClientError> {
        self.json(Method::PUT, &format!("/v1/teams/{name}"), Some(settings)).await
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

    /// Path of the watch of what a location should have; items are `LocationDesired`.
    pub fn location_desired_path(location: &LocationId) -> String {
        format!("/v1/watch/locations/{location}/desired")
    }
}
