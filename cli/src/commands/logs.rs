//! `logs`: the stream of what instances write, passed on as it comes.

use anyplace_api::{Client, LogQuery};
use anyplace_model::{InstanceId, JobName};

use crate::{
    args::{LogArgs, TargetArg},
    context::Session,
    output,
    target::Target,
};

pub(super) async fn run(
    session: &Session,
    words: &TargetArg,
    args: LogArgs,
    instance: Option<InstanceId>,
) -> anyhow::Result<()> {
    let client = session.api()?;
    match Target::find(words, &client).await? {
        Target::Deployment(name) => {
            let mut response = client.deployment_logs(&name, &query(args, instance)).await?;
            while let Some(chunk) = response.chunk().await? {
                output::bytes(&chunk)?;
            }
            Ok(())
        }
        Target::Job(name) => job(&client, &name, args, instance).await,
    }
}

pub(super) async fn job(
    client: &Client,
    name: &JobName,
    args: LogArgs,
    instance: Option<InstanceId>,
) -> anyhow::Result<()> {
    let mut response = client.job_logs(name, &query(args, instance)).await?;
    while let Some(chunk) = response.chunk().await? {
        output::bytes(&chunk)?;
    }
    Ok(())
}

fn query(args: LogArgs, instance: Option<InstanceId>) -> LogQuery {
    LogQuery { instance: instance.map(|instance| instance.to_string()), follow: args.follow, tail: args.tail }
}
