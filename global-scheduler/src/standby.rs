//! What a global scheduler answers while another one leads.

use anyplace_api::{ErrorCode, Problem};
use anyplace_service::{Failure, healthz};
use axum::{Router, routing::get};
use tokio::sync::watch;

use crate::term::Leader;

/// The service: refuses everything, and says who leads.
pub(crate) fn service(seen: watch::Receiver<Option<Leader>>) -> Router {
    let refuse = move || {
        let leader = seen.borrow().clone();
        async move { Failure(refusal(leader)) }
    };
    Router::new().route("/healthz", get(healthz)).fallback(refuse)
}

fn refusal(leader: Option<Leader>) -> Problem {
    match leader {
        Some(leader) => {
            let problem = Problem::new(
                ErrorCode::NotLeading,
                format!("this global scheduler stands by; the one at {} leads", leader.advertise),
            );
            problem.fix("give clients the addresses of all of them, with commas between")
        }
        None => Problem::new(ErrorCode::NotLeading, "no global scheduler leads at the moment")
            .fix("try again in a second"),
    }
}
