//! A steady stream of requests from one client, as its users would see it.
//!
//! Every `interval` a new connection asks `GET /`, whether or not earlier ones have been answered, so a slow answer
//! doesn't hide a gap. A request counts as failed when it isn't answered with 200 within its time-out.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde::Serialize;

use crate::http;
use crate::node::Node;

/// From connect to the last byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Requests under way at once; at the time-out of 1 s it allows an interval of 4 ms.
const IN_FLIGHT: usize = 256;

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// When it was due.
    pub start: Instant,
    /// When it was answered or given up.
    pub end: Instant,
    /// The answer's body, or why there was none.
    pub result: Result<String, String>,
}

/// A running stream.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    requests: Arc<Mutex<Vec<Request>>>,
    thread: JoinHandle<Result<()>>,
}

/// What a stream saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LoadReport {
    /// Requests made.
    pub requests: usize,
    /// Those without an answer of 200 in time.
    pub failed_requests: usize,
    /// The longest time between two answers one after the other, and between the last answer and the end of the last
    /// request: a stream that never recovers must not look gapless.
    pub longest_gap_ms: u64,
}

impl Load {
    /// Starts a stream from a node.
    pub fn start(node: &Node, target: SocketAddr, interval: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let thread = {
            let (node, stop, requests) = (node.clone(), stop.clone(), requests.clone());
            std::thread::spawn(move || {
                node.enter()?;
                generate(target, interval, &stop, &requests);
                Ok(())
            })
        };
        Ok(Self { stop, requests, thread })
    }

    /// Stops, waits for the requests under way, and returns all of them in the order of their ends.
    pub fn stop(self) -> Result<Vec<Request>> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.join() {
            Ok(result) => result?,
            Err(_) => bail!("the load generator panicked"),
        }
        let mut requests = std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner));
        requests.sort_by_key(|request| request.end);
        Ok(requests)
    }

    /// Stops and sums up.
    pub fn report(self) -> Result<LoadReport> {
        self.stop().map(|requests| summarize(&requests))
    }
}

/// The report of several streams together: sums, and the longest gap that any client saw.
pub fn combine(reports: impl IntoIterator<Item = LoadReport>) -> LoadReport {
    reports.into_iter().fold(LoadReport::default(), |sum, one| LoadReport {
        requests: sum.requests + one.requests,
        failed_requests: sum.failed_requests + one.failed_requests,
        longest_gap_ms: sum.longest_gap_ms.max(one.longest_gap_ms),
    })
}

fn generate(target: SocketAddr, interval: Duration, stop: &AtomicBool, requests: &Mutex<Vec<Request>>) {
    let in_flight = AtomicUsize::new(0);
    let record = |request| requests.lock().unwrap_or_else(PoisonError::into_inner).push(request);
    std::thread::scope(|scope| {
        let mut due = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let start = Instant::now();
            if in_flight.fetch_add(1, Ordering::Relaxed) < IN_FLIGHT {
                let (in_flight, record) = (&in_flight, &record);
                scope.spawn(move || {
                    let result = match http::get(target, "/", REQUEST_TIMEOUT) {
                        Ok(response) if response.status == 200 => Ok(response.body),
                        Ok(response) => Err(format!("status {}", response.status)),
                        Err(error) => Err(format!("{error:#}")),
                    };
                    record(Request { start, end: Instant::now(), result });
                    in_flight.fetch_sub(1, Ordering::Relaxed);
                });
            } else {
                in_flight.fetch_sub(1, Ordering::Relaxed);
                let result = Err(format!("{IN_FLIGHT} requests are under way already"));
                record(Request { start, end: start, result });
            }
            due += interval;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    });
}

/// Sums up requests that are sorted by their end.
fn summarize(requests: &[Request]) -> LoadReport {
    let mut last: Option<Instant> = None;
    let mut longest = Duration::ZERO;
    for request in requests {
        if let Some(before) = last {
            longest = longest.max(request.end.saturating_duration_since(before));
        }
        if request.result.is_ok() {
            last = Some(request.end);
        }
    }
    LoadReport {
        requests: requests.len(),
        failed_requests: requests.iter().filter(|request| request.result.is_err()).count(),
        longest_gap_ms: longest.as_millis() as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_between_answers_and_counts_when_nothing_follows() {
        let zero = Instant::now();
        let at = |ms, ok: bool| Request {
            start: zero,
            end: zero + Duration::from_millis(ms),
            result: if ok { Ok(String::new()) } else { Err(String::new()) },
        };
        let report = summarize(&[at(0, true), at(20, true), at(300, false), at(320, true), at(340, true)]);
        assert_eq!(report, LoadReport { requests: 5, failed_requests: 1, longest_gap_ms: 300 });
        assert_eq!(summarize(&[at(0, true), at(1000, false), at(2000, false)]).longest_gap_ms, 2000);
    }
}
