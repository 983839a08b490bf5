//! Logs, fetched from the location schedulers.

use std::{collections::VecDeque, io, sync::Arc};

use anyplace_api::{ErrorCode, LogQuery, Problem};
use anyplace_model::{DeploymentName, InstanceId, JobName, LocationId};
use anyplace_service::{Failure, text_stream};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};

use crate::{app::App, deployments::unknown_deployment, jobs::unknown_job, views};

/// Instances whose logs are shown together; each is a connection.
const MAX_STREAMS: usize = 64;
/// Longer lines are cut into several, so that one without an end can't fill the memory.
const MAX_LINE_BYTES: usize = 64 << 10;

/// An open log.
type Chunks = stream::BoxStream<'static, Result<Bytes, io::Error>>;

/// An instance, and where to ask for its log.
struct Source {
    instance: InstanceId,
    location: LocationId,
    address: Option<(String, String)>,
}

fn source(app: &App, instance: InstanceId, location: LocationId) -> Source {
    let world = app.world();
    let observed = world.locations.get(&location).and_then(|location| location.observed.as_ref());
    let address = observed.map(|observed| (observed.advertise.clone(), observed.log_token.clone()));
    Source { instance, location, address }
}

fn nothing_yet(what: &str, kind: &str, name: &str) -> Failure {
    Problem::new(ErrorCode::NotFound, format!("no {what} has started; see `anyplace why`"))
        .fix(format!("run `anyplace why {kind} {name}`"))
        .into()
}

pub(super) async fn of_deployment(
    app: &Arc<App>,
    name: &DeploymentName,
    query: &LogQuery,
) -> Result<Response, Failure> {
    let instances = {
        let world = app.world();
        if !world.deployments.contains_key(name) {
            return Err(unknown_deployment(name));
        }
        views::instances_of(&world, name)
    };
    if instances.is_empty() {
        return Err(nothing_yet("instance", "deployment", name.as_str()));
    }
    let there: Vec<String> = instances.iter().map(|it| it.status.instance.to_string()).collect();
    let wanted = |id: &InstanceId| query.instance.as_ref().is_none_or(|instance| instance == id.as_str());
    let sources: Vec<Source> = instances
        .into_iter()
        .filter(|it| wanted(&it.status.instance))
        .map(|it| source(app, it.status.instance, it.location))
        .collect();
    if sources.is_empty() {
        let text = format!("{name} has no instance {}", query.instance.as_deref().unwrap_or_default());
        return Err(Problem::new(ErrorCode::NotFound, text)
            .field("instance")
            .fix(format!("choose one of {}", there.join(", ")))
            .into());
    }
    stream_of(app, sources, query).await
}

pub(super) async fn of_job(app: &Arc<App>, name: &JobName, query: &LogQuery) -> Result<Response, Failure> {
    let found = {
        let world = app.world();
        let record = world.jobs.find(name).ok_or_else(|| unknown_job(name))?;
        if record.spec.array.is_some() {
            let text = format!("{name} is an array, and each of its indexes has a log");
            return Err(Problem::new(ErrorCode::InvalidRequest, text)
                .field("name")
                .fix(format!("choose an index, such as `anyplace logs job {name}-0`"))
                .into());
        }
        views::job_instance(&world, &record).map(|it| it.instance).zip(record.location.clone())
    };
    let Some((instance, location)) = found else { return Err(nothing_yet("attempt", "job", name.as_str())) };
    if let Some(other) = query.instance.as_ref().filter(|other| *other != instance.as_str()) {
        return Err(Problem::new(ErrorCode::NotFound, format!("the last attempt of {name} is not {other}"))
            .field("instance")
            .fix(format!("leave it out, or choose {instance}"))
            .into());
    }
    let source = source(app, instance, location);
    stream_of(app, vec![source], query).await
}

async fn open(app: &App, source: &Source, query: &LogQuery) -> Result<Chunks, Failure> {
    let Some((address, token)) = &source.address else {
        let text = format!("location {} has not reported since this server started", source.location);
        return Err(Problem::new(ErrorCode::Unavailable, text).fix("see `anyplace capacity`").into());
    };
    let client = app.http.with_base(address, Some(token.clone()))?;
    let query = LogQuery { instance: None, ..query.clone() };
    let response = client.instance_logs(&source.instance, &query).await?;
    Ok(response.bytes_stream().map(|chunk| chunk.map_err(io::Error::other)).boxed())
}

async fn stream_of(app: &Arc<App>, mut sources: Vec<Source>, query: &LogQuery) -> Result<Response, Failure> {
    if let [source] = sources.as_slice() {
        return Ok(text_stream(until_shutdown(app, open(app, source, query).await?)));
    }
    sources.truncate(MAX_STREAMS);
    let mut streams = Vec::new();
    let mut first_failure = None;
    let mut any = false;
    for source in sources {
        let prefix = format!("{} ", source.instance);
        match open(app, &source, query).await {
            Ok(stream) => {
                any = true;
                streams.push(lines(prefix, stream));
            }
            Err(Failure(problem)) => {
                let line = Bytes::from(format!("{prefix}(no log: {problem})\n"));
                streams.push(stream::iter([Ok(line)]).boxed());
                first_failure.get_or_insert(problem);
            }
        }
    }
    match first_failure {
        Some(problem) if !any => Err(problem.into()),
        _ => Ok(text_stream(until_shutdown(app, stream::select_all(streams).boxed()))),
    }
}

/// A followed log would hold up the shutdown.
fn until_shutdown(app: &App, stream: Chunks) -> Chunks {
    stream.take_until(app.shutdown.clone().cancelled_owned()).boxed()
}

/// The stream cut into lines, each with the prefix.
fn lines(prefix: String, stream: Chunks) -> Chunks {
    let state = (prefix, stream, BytesMut::new(), VecDeque::new(), false);
    stream::unfold(state, |(prefix, mut stream, mut buffer, mut ready, mut ended)| async move {
        loop {
            if let Some(line) = ready.pop_front() {
                return Some((Ok(line), (prefix, stream, buffer, ready, ended)));
            }
            if ended {
                return None;
            }
            let cut = |buffer: &mut BytesMut, length: usize| {
                let line = buffer.split_to(length);
                let mut text = BytesMut::with_capacity(prefix.len() + length + 1);
                text.extend_from_slice(prefix.as_bytes());
                text.extend_from_slice(line.strip_suffix(b"\n").unwrap_or(&line));
                text.extend_from_slice(b"\n");
                text.freeze()
            };
            match stream.next().await {
                Some(Ok(chunk)) => buffer.extend_from_slice(&chunk),
                // The log of one instance breaks off: those of the others go on.
                Some(Err(_)) | None => ended = true,
            }
            while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                ready.push_back(cut(&mut buffer, end + 1));
            }
            if !buffer.is_empty() && (ended || buffer.len() > MAX_LINE_BYTES) {
                let length = buffer.len();
                ready.push_back(cut(&mut buffer, length));
            }
        }
    })
    .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_prefixed_wherever_chunks_end() {
        let chunks = ["one\ntw", "o\n", "\nthree"].map(|text| Ok(Bytes::from(text)));
        let all = lines("a ".into(), stream::iter(chunks).boxed()).map(Result::unwrap).collect::<Vec<_>>();
        let all = futures_util::FutureExt::now_or_never(all).unwrap().concat();
        assert_eq!(String::from_utf8(all).unwrap(), "a one\na two\na \na three\n");
    }
}
