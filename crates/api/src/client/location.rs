//! What machines and the global scheduler ask of a location scheduler; logs and health, which agents have too.

use std::net::IpAddr;

use anyplace_model::{InstanceId, MachineId, MachineRecord, MachineReport, Probes, Route, TrafficReport};
use reqwest::{Method, Response, StatusCode};

use super::{CONNECT_TIMEOUT, Client, ClientError};
use crate::LogQuery;

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
