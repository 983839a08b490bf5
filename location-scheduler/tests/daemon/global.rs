//! A scripted global scheduler: serves what the test wants, keeps the last report.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyplace_api::WatchQuery;
use anyplace_model::{LocationDesired, LocationReport};
use anyplace_service::{Feed, Json, Query};
use axum::{
    Router,
    extract::State,
    http::StatusCode,
    routing::{get, put},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::sync::CancellationToken;

pub(crate) struct Global {
    pub(crate) url: String,
    pub(crate) desired: Arc<Feed<LocationDesired>>,
    reports: watch::Receiver<Option<LocationReport>>,
    server: JoinHandle<()>,
    shutdown: CancellationToken,
}

#[derive(Clone)]
struct App {
    desired: Arc<Feed<LocationDesired>>,
    reports: watch::Sender<Option<LocationReport>>,
    shutdown: CancellationToken,
}

impl Global {
    pub(crate) async fn start() -> Self {
        let (sender, reports) = watch::channel(None);
        let (desired, shutdown) = (Arc::new(Feed::new()), CancellationToken::new());
        let app = App { desired: desired.clone(), reports: sender, shutdown: shutdown.clone() };
        let router = Router::new()
            .route("/v1/watch/locations/ams/desired", get(watch_desired))
            .route("/v1/locations/ams/report", put(report))
            .with_state(app);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let until = shutdown.clone().cancelled_owned();
        let server = tokio::spawn(async move {
            axum::serve(listener, router).with_graceful_shutdown(until).await.unwrap();
        });
        Self { url, desired, reports, server, shutdown }
    }

    pub(crate) async fn stop(&mut self) {
        self.shutdown.cancel();
        (&mut self.server).await.unwrap();
    }

    /// The first report from now on (the last one included) of which this holds.
    pub(crate) async fn until(
        &self,
        limit: Duration,
        holds: impl Fn(&LocationReport) -> bool,
    ) -> LocationReport {
        let (start, mut reports) = (Instant::now(), self.reports.clone());
        loop {
            let last = reports.borrow_and_update().clone();
            if let Some(report) = last.as_ref().filter(|report| holds(report)) {
                return report.clone();
            }
            let left = limit.saturating_sub(start.elapsed());
            let heard = tokio::time::timeout(left, reports.changed()).await;
            assert!(heard.is_ok_and(|changed| changed.is_ok()), "no such report within {limit:?}: {last:#?}");
        }
    }
}

async fn watch_desired(State(app): State<App>, Query(query): Query<WatchQuery>) -> axum::response::Response {
    app.desired.response(query, app.shutdown)
}

async fn report(State(app): State<App>, Json(report): Json<LocationReport>) -> StatusCode {
    app.reports.send_replace(Some(report));
    StatusCode::NO_CONTENT
}
