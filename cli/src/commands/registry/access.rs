//! `registry account|team|audit`: who may do what, and who did what.

use std::process::ExitCode;

use anyhow::Context as _;
use anyplace_model::Bytes;
use anyplace_registry::{AccountSpec, AccountView, AuditEvent, Team, TeamView};
use jiff::Timestamp;

use super::admin::Admin;
use crate::{
    args::{AccountCommand, AccountSetArgs, AuditArgs, TeamCommand, TeamSetArgs},
    output::{self, Format, Table, moment, size},
};

pub(super) async fn account(admin: &Admin, command: AccountCommand) -> anyhow::Result<ExitCode> {
    match command {
        AccountCommand::Ls { output } => {
            let accounts: Vec<AccountView> = admin.get("/v1/accounts", &[]).await?;
            output::data(output.format, &accounts, || list(&accounts))?;
        }
        AccountCommand::Set(args) => set_account(admin, args).await?,
        AccountCommand::Rm { name } => {
            admin.delete(&format!("/v1/accounts/{name}")).await?;
            output::note(format_args!("account {name} removed"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn set_account(admin: &Admin, args: AccountSetArgs) -> anyhow::Result<()> {
    let AccountSetArgs { name, grants, team, ttl, new_secret, out, output } = args;
    let ttl_s = ttl.map(|ttl| ttl.0.div_ceil(1_000));
    let spec = AccountSpec { team, grants, ttl_s, new_secret };
    let mut made: AccountView = admin.put(&format!("/v1/accounts/{name}"), &spec).await?;
    let until = end(&made).map_or("for ever".into(), |end| format!("until {end}"));
    if made.secret.is_none() {
        if let Some(path) = out {
            anyhow::bail!(
                "account {name} is set and keeps its secret, which only its hash is left of; to write another one to \
                 `{}`, add --new-secret",
                path.display()
            );
        }
        output::note(format_args!("account {name} is set, good {until}; it keeps its secret"));
        return match output.format {
            Format::Table => Ok(()),
            format => output::data(format, &made, String::new),
        };
    }
    let Some(path) = out else {
        output::note(format_args!("good {until}; the secret is shown only this once"));
        return output::data(output.format, &made, || made.secret.clone().unwrap_or_default());
    };
    let secret = made.secret.take().context("the registry answered without a secret")?;
    anyplace_service::write_atomically(&path, format!("{name}:{secret}\n").as_bytes(), 0o600).with_context(
        || {
            format!(
                "the secret can't be written to `{}`; set the account again, for another secret",
                path.display()
            )
        },
    )?;
    output::note(format_args!("credentials of {name} written to {}, good {until}", path.display()));
    match output.format {
        Format::Table => Ok(()),
        // Not the secret: it is in the file, and nowhere else.
        format => output::data(format, &made, String::new),
    }
}

fn end(account: &AccountView) -> Option<String> {
    let end = i64::try_from(account.expires_s?).unwrap_or(i64::MAX);
    // Later than any calendar goes is for ever.
    Timestamp::from_second(end).ok().map(moment)
}

fn list(accounts: &[AccountView]) -> String {
    let mut table = Table::new(&["NAME", "TEAM", "GRANTS", "GOOD UNTIL"]);
    for it in accounts {
        let team = it.team.clone().unwrap_or_default();
        table.row([it.name.clone(), team, words(&it.grants), end(it).unwrap_or_default()]);
    }
    if table.is_empty() {
        output::note(
            "only operators so far; `anyplace registry account set NAME --grant GRANT` makes an account",
        );
    }
    table.to_string()
}

pub(super) async fn team(admin: &Admin, command: TeamCommand) -> anyhow::Result<ExitCode> {
    match command {
        TeamCommand::Ls { output } => {
            let teams: Vec<TeamView> = admin.get("/v1/teams", &[]).await?;
            output::data(output.format, &teams, || teams_table(&teams))?;
        }
        TeamCommand::Set(TeamSetArgs { name, repositories, quota, rate, output }) => {
            let quota_bytes = quota.map(|quota| quota.0);
            let team = Team { name: name.clone(), repositories, quota_bytes, requests_per_s: rate };
            let set: Team = admin.put(&format!("/v1/teams/{name}"), &team).await?;
            output::note(format_args!("team {name} is set"));
            if output.format != Format::Table {
                output::data(output.format, &set, String::new)?;
            }
        }
        TeamCommand::Rm { name } => {
            admin.delete(&format!("/v1/teams/{name}")).await?;
            output::note(format_args!("team {name} removed"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn teams_table(teams: &[TeamView]) -> String {
    let mut table = Table::new(&["NAME", "REPOSITORIES", "USED", "QUOTA", "REQUESTS/S"]);
    let bytes = |bytes: Option<u64>| bytes.map(|bytes| size(Bytes(bytes))).unwrap_or_default();
    for it in teams {
        let rate = it.requests_per_s.map(|rate| rate.to_string()).unwrap_or_default();
        let repositories = words(&it.repositories);
        table.row([it.name.clone(), repositories, bytes(it.used_bytes), bytes(it.quota_bytes), rate]);
    }
    if table.is_empty() {
        output::note("no teams; `anyplace registry team set NAME --repository PATTERN` makes one");
    }
    table.to_string()
}

fn words<T: ToString>(words: &[T]) -> String {
    words.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

pub(super) async fn audit(admin: &Admin, args: AuditArgs) -> anyhow::Result<ExitCode> {
    let mut query = vec![("tail", args.tail.to_string())];
    query.extend(args.since.map(|since| ("since", since.to_string())));
    query.extend(args.repository.map(|pattern| ("repository", pattern.to_string())));
    let events: Vec<AuditEvent> = admin.get("/v1/audit", &query).await?;
    output::data(args.output.format, &events, || events_table(&events))?;
    if events.len() == args.tail {
        output::note(format_args!("the last {}; there may be more, see --tail", args.tail));
    }
    Ok(ExitCode::SUCCESS)
}

fn events_table(events: &[AuditEvent]) -> String {
    let mut table = Table::new(&["AT", "ACCOUNT", "TEAM", "ACTION", "SUBJECT", "REFERENCE", "DIGEST"]);
    for it in events {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let at = it.at.parse().map_or_else(|_| it.at.clone(), moment);
        let (account, action, subject) = (it.account.clone(), it.action.clone(), it.subject.clone());
        table.row([at, account, text(&it.team), action, subject, text(&it.reference), text(&it.digest)]);
    }
    if table.is_empty() {
        output::note("nothing was pushed, deleted or set of what you asked about");
    }
    table.to_string()
}
