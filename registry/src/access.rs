//! Who may do what.
//!
//! Three kinds of proof: Basic with a user of the credentials file (operators, who may do everything), Basic with an
//! account that operators made, or a bearer token that either got from `/auth/token` for some minutes, by the
//! distribution project's token flow. Without proof nobody may do anything, unless `anonymous_pull` is on.
//!
//! What a request needs follows from its method and path: `pull`, `push` or `delete` on one repository, or the right
//! to operate the registry for `/v1/...`. All changes are written to the audit record.

pub(crate) mod accounts;
mod audit;
pub(crate) mod http;
pub(crate) mod limits;
mod logins;
mod token;
mod users;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyplace_registry_core::access::{Action, Grant, Scope, allowed, may_operate};
use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, HOST, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{Extensions, HeaderMap, StatusCode};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::errors::{Answer, Refusal};
use crate::gc::GcConfig;
use crate::storage::Storage;
use crate::uploads::Uploads;
use accounts::Accounts;
pub use accounts::{AccountSpec, AccountView, Team, TeamView, check_account_name};
pub(crate) use audit::{Audit, RETENTION};
pub use audit::{Event, TAIL_MAX};
use limits::{Limits, Taken};
use logins::Logins;
use token::{Bad, Claims, Signer};
use users::Users;

/// The service name in challenges.
const SERVICE: &str = "anyplace-registry";

/// Settings of access, `[access]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Whether anyone may pull.
    pub anonymous_pull: bool,
    /// How long a token is good, in seconds.
    pub token_ttl_s: u64,
    /// How clients reach this registry, such as `https://registry.example.org`; by default the `Host` header over http.
    pub public_url: Option<String>,
}

impl Default for Config {
    fn default() -> Config {
        Config { anonymous_pull: false, token_ttl_s: 300, public_url: None }
    }
}

/// The address that a request comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Peer(pub(crate) IpAddr);

impl Peer {
    fn of(extensions: &Extensions) -> IpAddr {
        extensions.get().map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |Peer(address)| *address)
    }
}

/// Who sends a request, and what they may do.
#[derive(Clone, Debug)]
pub(crate) struct Who {
    /// The account's name; empty for anyone.
    pub(crate) account: String,
    pub(crate) team: Option<String>,
    rights: Rights,
}

#[derive(Clone, Debug)]
enum Rights {
    Operator,
    Account(Vec<Grant>),
    Token(Vec<Scope>),
    Anyone { pull: bool },
}

impl Who {
    pub(crate) fn may(&self, repository: &str, action: Action) -> bool {
        match &self.rights {
            Rights::Operator => true,
            Rights::Account(grants) => allowed(grants, repository, action),
            Rights::Token(scopes) => {
                scopes.iter().any(|scope| scope.repository == repository && scope.actions.contains(&action))
            }
            Rights::Anyone { pull } => *pull && action == Action::Pull,
        }
    }

    /// Whether they may read every repository, also those whose names they don't say.
    pub(crate) fn may_pull_all(&self) -> bool {
        matches!(self.rights, Rights::Operator)
    }

    /// Whether their token was asked for anything in the repository; true of other proofs, which needn't be.
    fn asked_for(&self, repository: &str) -> bool {
        match &self.rights {
            Rights::Token(scopes) => scopes.iter().any(|scope| scope.repository == repository),
            Rights::Operator | Rights::Account(_) | Rights::Anyone { .. } => true,
        }
    }

    /// Whether a token was their proof.
    fn is_by_token(&self) -> bool {
        matches!(self.rights, Rights::Token(_))
    }

    fn may_operate(&self) -> bool {
        match &self.rights {
            Rights::Operator => true,
            Rights::Account(grants) => may_operate(grants),
            Rights::Token(_) | Rights::Anyone { .. } => false,
        }
    }

    /// What of a scope they would get as a token.
    fn granted(&self, scope: &Scope) -> Scope {
        let actions = scope.actions.iter().filter(|action| self.may(&scope.repository, **action)).copied();
        Scope { repository: scope.repository.clone(), actions: actions.collect() }
    }
}

/// What a request needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// To be somebody.
    Identity,
    /// An action on a repository.
    Repository(String, Action),
    /// To push into one repository and, if it may be, to read in another.
    Mount { into: String, from: String },
    /// The right to operate the registry.
    Operator,
}

/// The registry's access control.
pub(crate) struct Access {
    config: Config,
    users: Users,
    pub(crate) accounts: Accounts,
    signer: Signer,
    pub(crate) limits: Limits,
    logins: Logins,
    /// Logins refused for the wrong ones before them.
    logins_refused: AtomicU64,
    pub(crate) audit: Arc<Audit>,
}

impl Access {
    pub(crate) async fn open(
        config: Config,
        credentials: &std::path::Path,
        data_dir: &std::path::Path,
        gc: &GcConfig,
        storage: &Storage,
    ) -> anyhow::Result<Access> {
        let users = Users::load_or_create(credentials)?;
        let random: [u8; 64] = rand::random();
        let key: String = storage.document_or_create("token-key", hex::encode(random)).await?;
        let mut bytes = [0; 64];
        hex::decode_to_slice(key, &mut bytes).map_err(|error| {
            anyhow::anyhow!("the object `access/token-key` is no key ({error}); delete it for a new one")
        })?;
        Ok(Access {
            config,
            users,
            accounts: Accounts::load(storage.clone()).await?,
            signer: Signer::new(&bytes),
            limits: Limits::new(gc.undelete_window, gc.grace),
            logins: Logins::default(),
            logins_refused: AtomicU64::new(0),
            audit: Arc::new(Audit::open(data_dir)?.with_room(storage.room().clone())),
        })
    }

    /// Keeps up with what other processes change, and counts what teams use, until the shutdown.
    pub(crate) async fn run(
        self: Arc<Self>,
        storage: Storage,
        uploads: Arc<Uploads>,
        shutdown: CancellationToken,
    ) {
        // Apart: a count may take minutes, and an account that was removed is good no longer than a refresh.
        let counting = async {
            loop {
                self.count(&storage, &uploads).await;
                tokio::time::sleep(limits::COUNT_EVERY).await;
            }
        };
        let refreshing = async {
            loop {
                tokio::time::sleep(accounts::REFRESH).await;
                if let Err(error) = self.accounts.refresh().await {
                    tracing::warn!(%error, "can't read the accounts; going on with those that are known");
                }
            }
        };
        tokio::select! {
            () = counting => {}
            () = refreshing => {}
            () = shutdown.cancelled() => {}
        }
    }

    /// Counts what teams use.
    pub(crate) async fn count(&self, storage: &Storage, uploads: &Uploads) {
        if let Err(error) = self.limits.count(storage, uploads, &self.accounts.known()).await {
            tracing::warn!(%error, "can't count what teams use; quotas go by the last count");
        }
    }

    /// Who sends a request.
    pub(crate) fn identify(&self, request: &Request) -> Answer<Who> {
        let headers = request.headers();
        let Some(value) = headers.get(AUTHORIZATION) else {
            let rights = Rights::Anyone { pull: self.config.anonymous_pull };
            return Ok(Who { account: String::new(), team: None, rights });
        };
        let (scheme, proof) = value.to_str().ok().and_then(|value| value.split_once(' ')).unwrap_or_default();
        let proof = proof.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            let claims = self.signer.read(proof, now_s()).map_err(|bad| {
                let message = match bad {
                    Bad::Foreign => "this token was not made here; get one from /auth/token",
                    Bad::Expired => "this token has expired; get another from /auth/token",
                    Bad::Early => {
                        "this token is of a later time than this registry's clock: it was set back, or another registry's \
                         clock is off; get another from /auth/token, and set the clocks"
                    }
                };
                self.unauthorized(headers, &Need::Identity, message, Some("invalid_token"))
            })?;
            let Claims { account, team, scopes, .. } = claims;
            return Ok(Who { account, team, rights: Rights::Token(scopes) });
        }
        let wrong = || {
            let message = "no user or account has this name and password; operators are in the registry's credentials \
                           file, accounts are made with `anyplace registry account set`";
            self.unauthorized(headers, &Need::Identity, message, None)
        };
        if !scheme.eq_ignore_ascii_case("basic") {
            return Err(wrong());
        }
        let decoded = BASE64_STANDARD.decode(proof).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let (name, secret) = decoded.as_deref().and_then(|text| text.split_once(':')).ok_or_else(wrong)?;
        self.login(Peer::of(request.extensions()), name, secret)?.ok_or_else(wrong)
    }

    /// Whose name and password this is, unless too many wrong ones came before.
    fn login(&self, from: IpAddr, name: &str, secret: &str) -> Answer<Option<Who>> {
        let now = Instant::now();
        self.logins.may_try(from, name, now).map_err(|wait| {
            self.logins_refused.fetch_add(1, Ordering::Relaxed);
            let message = format!(
                "too many wrong passwords for `{name}` from {from}; correct it, and try again in {} s",
                wait.as_secs().max(1)
            );
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message)
                .header(RETRY_AFTER, wait.as_secs().max(1).to_string())
        })?;
        let who = self.look_up(name, secret);
        if who.is_none() {
            self.logins.failed(from, name, now);
        }
        Ok(who)
    }

    fn look_up(&self, name: &str, secret: &str) -> Option<Who> {
        if self.users.knows(name, secret) {
            return Some(Who { account: name.to_owned(), team: None, rights: Rights::Operator });
        }
        let known = self.accounts.known();
        let account = known.account(name, secret, now_s())?;
        let rights = Rights::Account(account.grants.clone());
        Some(Who { account: name.to_owned(), team: account.team.clone(), rights })
    }

    /// Lets a request through that its sender may make.
    pub(crate) fn authorize(&self, request: &Request, need: &Need) -> Answer<Who> {
        let headers = request.headers();
        let who = self.identify(request)?;
        let may = match need {
            Need::Identity => !matches!(who.rights, Rights::Anyone { pull: false }),
            Need::Repository(repository, action) => who.may(repository, *action),
            // Whoever may not read there uploads, but a token that wasn't asked for it doesn't say whether they may.
            Need::Mount { into, from } => who.may(into, Action::Push) && who.asked_for(from),
            Need::Operator => who.may_operate(),
        };
        if !may {
            return Err(match &who.rights {
                Rights::Anyone { .. } => {
                    let message = "a token, or the name and password of an account, is needed";
                    self.unauthorized(headers, need, message, None)
                }
                // The client can ask for a wider one.
                Rights::Token(_) => self.unauthorized(
                    headers,
                    need,
                    "the token doesn't allow this",
                    Some("insufficient_scope"),
                ),
                _ => Refusal::new(StatusCode::FORBIDDEN, "DENIED", denied(&who, need)),
            });
        }
        self.count_request(&who)?;
        Ok(who)
    }

    /// Lets a request through that is within the rate of its sender's team.
    fn count_request(&self, who: &Who) -> Answer<()> {
        let known = self.accounts.known();
        let team = who.team.as_deref().and_then(|name| known.teams.get(name));
        team.map_or(Ok(()), |team| self.limits.request(team))
    }

    /// What a request takes from the quota of a repository's owner.
    pub(crate) fn quota(&self, repository: &str) -> Taken<'_> {
        self.limits.taken(self.accounts.known().owner(repository))
    }

    /// Whether a team owns both, so that content of both counts once.
    pub(crate) fn have_one_owner(&self, one: &str, other: &str) -> bool {
        let known = self.accounts.known();
        known.owner(one).is_some_and(|team| known.owner(other).is_some_and(|owner| owner.name == team.name))
    }

    /// A token with what `who` may do of these scopes.
    fn token(&self, who: &Who, scopes: &[Scope]) -> Answer<String> {
        let issued_s = now_s();
        let claims = Claims {
            account: who.account.clone(),
            team: who.team.clone(),
            // Also those that allow nothing: see `Who::asked_for`.
            scopes: scopes.iter().map(|scope| who.granted(scope)).collect(),
            issued_s,
            expires_s: issued_s.saturating_add(self.config.token_ttl_s),
        };
        self.signer.sign(&claims).map_err(|error| crate::errors::internal("making a token", error))
    }

    fn unauthorized(&self, headers: &HeaderMap, need: &Need, message: &str, error: Option<&str>) -> Refusal {
        let base = match &self.config.public_url {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => {
                let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
                format!("http://{host}")
            }
        };
        let mut challenge = format!("Bearer realm=\"{base}/auth/token\",service=\"{SERVICE}\"");
        // Who may push reads too: clients ask what is there before they push.
        let scope = match need {
            Need::Repository(repository, Action::Push) => Some(format!("repository:{repository}:pull,push")),
            Need::Repository(repository, action) => {
                Some(format!("repository:{repository}:{}", action.word()))
            }
            Need::Mount { into, from } => Some(format!("repository:{into}:pull,push repository:{from}:pull")),
            Need::Identity | Need::Operator => None,
        };
        if let Some(scope) = scope {
            challenge += &format!(",scope=\"{scope}\"");
        }
        if let Some(error) = error {
            challenge += &format!(",error=\"{error}\"");
        }
        Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message).header(WWW_AUTHENTICATE, challenge)
    }

    /// Writes a change to the audit record.
    pub(crate) fn record(
        &self,
        who: &Who,
        action: &str,
        subject: &str,
        reference: Option<&str>,
        digest: Option<&str>,
    ) {
        self.audit.record(&Event {
            at: moment(),
            account: if who.account.is_empty() { "anyone".to_owned() } else { who.account.clone() },
            team: who.team.clone(),
            action: action.to_owned(),
            subject: subject.to_owned(),
            reference: reference.map(str::to_owned),
            digest: digest.map(str::to_owned),
        });
    }

    /// What was refused and lost, for the metrics.
    pub(crate) fn counters(&self) -> [(&'static str, &'static str, &AtomicU64); 4] {
        [
            ("rate_refused", "Requests over a team's rate", &self.limits.rate_refused),
            ("quota_refused", "Pushes over a team's quota", &self.limits.quota_refused),
            ("logins_refused", "Logins refused for the wrong passwords before them", &self.logins_refused),
            ("audit_lost", "Events that the audit record misses", &self.audit.lost),
        ]
    }

    fn token_ttl(&self) -> Duration {
        Duration::from_secs(self.config.token_ttl_s)
    }
}

fn denied(who: &Who, need: &Need) -> String {
    let (repository, action) = match need {
        Need::Repository(repository, action) => (repository, *action),
        Need::Mount { into, .. } => (into, Action::Push),
        Need::Identity | Need::Operator => {
            let needed = "that needs the grant `**:admin`";
            return format!("account `{}` may not operate the registry; {needed}", who.account);
        }
    };
    format!(
        "account `{}` may not {} in `{repository}`; an operator grants it with `anyplace registry account set`",
        who.account,
        action.word()
    )
}

/// Now, as the audit record has it.
pub(crate) fn moment() -> String {
    written(jiff::Timestamp::now())
}

/// A moment as the audit record has it.
fn written(at: jiff::Timestamp) -> String {
    format!("{at:.3}")
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
