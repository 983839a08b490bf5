//! What `why` and `logs` are asked about: `deployment NAME`, `job NAME`, `deployment/NAME`, or just `NAME`.

use anyhow::{Context as _, bail};
use anyplace_api::{Client, ClientError, ErrorCode};
use anyplace_model::{DeploymentName, JobName};
use clap::ValueEnum as _;

use crate::{
    args::{TargetArg, WorkloadKind},
    output,
};

/// A workload by kind and name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    Deployment(DeploymentName),
    Job(JobName),
}

/// What the words alone say.
#[derive(Debug, PartialEq, Eq)]
enum Words<'a> {
    Kind(WorkloadKind, &'a str),
    Name(&'a str),
}

impl Target {
    /// Finds out what is meant; a name alone is looked up.
    pub(crate) async fn find(words: &TargetArg, client: &Client) -> anyhow::Result<Self> {
        match parse(&words.target)? {
            Words::Kind(WorkloadKind::Deployment, name) => Ok(Self::Deployment(name.parse()?)),
            Words::Kind(WorkloadKind::Job, name) => Ok(Self::Job(name.parse()?)),
            Words::Name(name) => {
                let (deployment, job) = (name.parse::<DeploymentName>()?, name.parse::<JobName>()?);
                let is_deployment = exists(client.deployment(&deployment).await)?;
                let is_job = exists(client.job(&job).await)?;
                match (is_deployment, is_job) {
                    (true, false) => Ok(Self::Deployment(deployment)),
                    (false, true) => Ok(Self::Job(job)),
                    (true, true) => {
                        output::note(format_args!(
                            "there is also a job `{name}`; say `job {name}` if you mean that"
                        ));
                        Ok(Self::Deployment(deployment))
                    }
                    (false, false) => bail!(
                        "there is no deployment or job `{name}`; `anyplace get deployments` and `anyplace get jobs` \
                         list them"
                    ),
                }
            }
        }
    }
}

fn exists<T>(answer: Result<T, ClientError>) -> anyhow::Result<bool> {
    match answer {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some(ErrorCode::NotFound) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn parse(words: &[String]) -> anyhow::Result<Words<'_>> {
    let kind = |word: &str| {
        WorkloadKind::from_str(word, true).ok().with_context(|| {
            format!("`{word}` is not a kind; write `deployment NAME`, `job NAME`, or just the name")
        })
    };
    match words {
        [kind_word, name] => Ok(Words::Kind(kind(kind_word)?, name)),
        [word] => match word.split_once('/') {
            Some((kind_word, name)) => Ok(Words::Kind(kind(kind_word)?, name)),
            None => Ok(Words::Name(word)),
        },
        _ => bail!("write `deployment NAME`, `job NAME`, or just the name"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kind_and_name_are_told_apart() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(
            parse(&words("deployment hello")).unwrap(),
            Words::Kind(WorkloadKind::Deployment, "hello")
        );
        assert_eq!(parse(&words("jobs nightly")).unwrap(), Words::Kind(WorkloadKind::Job, "nightly"));
        assert_eq!(parse(&words("job/nightly")).unwrap(), Words::Kind(WorkloadKind::Job, "nightly"));
        assert_eq!(parse(&words("job")).unwrap(), Words::Name("job"));
        assert!(parse(&words("pod hello")).unwrap_err().to_string().contains("not a kind"));
    }
}
