//! Accounts and teams, kept in the store, so that all processes on one store know the same.
//!
//! An account's secret is made here and shown once; only its hash is kept. People and machines ("robots") are the same
//! kind of account: a machine's has the grant `**:pull` and nothing else.
//!
//! One that is damaged stays what it was in this process's memory, or is nobody; the others are not touched by that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Duration;

use anyplace_registry_core::access::Grant;
use anyplace_registry_core::pattern::Pattern;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::users::hash;
use crate::errors::{Answer, Refusal};
use crate::storage::{Error, Result, Storage};
use axum::http::StatusCode;

/// What another process on the same store changed is known here after so long at most.
pub(crate) const REFRESH: Duration = Duration::from_secs(10);
/// Bytes of randomness in a secret.
const SECRET_BYTES: usize = 24;
const NAME_MAX: usize = 64;

/// Who may do what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Account {
    pub(crate) name: String,
    /// SHA-256 of the secret, in hex.
    secret_sha256: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) team: Option<String>,
    pub(crate) grants: Vec<Grant>,
    /// Until when it is good, in seconds since 1970; for ever without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expires_s: Option<u64>,
}

/// What an account should be.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccountSpec {
    /// Whose rate and quota count.
    #[serde(default)]
    pub team: Option<String>,
    /// What it may do; at least one.
    pub grants: Vec<Grant>,
    /// How long it is good, in seconds.
    #[serde(default)]
    pub ttl_s: Option<u64>,
    /// Whether an account that is there gets another secret.
    #[serde(default)]
    pub new_secret: bool,
}

/// An account as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AccountView {
    /// Its name.
    pub name: String,
    /// Its team.
    pub team: Option<String>,
    /// What it may do.
    pub grants: Vec<Grant>,
    /// Until when it is good, in seconds since 1970; for ever without.
    pub expires_s: Option<u64>,
    /// Only in the answer to what made the secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

/// What a team owns, and its bounds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Team {
    /// Its name; the path says it in a request.
    #[serde(default)]
    pub name: String,
    /// Its repositories: pushes to them count against the quota.
    #[serde(default)]
    pub repositories: Vec<Pattern>,
    /// Bytes that its repositories may hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quota_bytes: Option<u64>,
    /// Requests a second by its accounts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_s: Option<u32>,
}

/// A team as it is shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TeamView {
    /// Its name.
    pub name: String,
    /// Its repositories.
    pub repositories: Vec<Pattern>,
    /// Bytes that its repositories may hold.
    pub quota_bytes: Option<u64>,
    /// Requests a second by its accounts.
    pub requests_per_s: Option<u32>,
    /// Bytes that its repositories hold, where there is a quota.
    pub used_bytes: Option<u64>,
}

/// What is known at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    accounts: BTreeMap<String, Account>,
    pub(crate) teams: BTreeMap<String, Team>,
    /// Documents that can't be understood.
    damaged: BTreeSet<String>,
}

impl Known {
    /// The account, if the secret is right and its time isn't over.
    pub(crate) fn account(&self, name: &str, secret: &str, now_s: u64) -> Option<&Account> {
        let account = self.accounts.get(name)?;
        let good = account.expires_s.is_none_or(|end| now_s < end);
        (good && account.secret_sha256 == hex::encode(hash(secret))).then_some(account)
    }

    /// The team that a repository belongs to: the first by name that claims it.
    pub(crate) fn owner(&self, repository: &str) -> Option<&Team> {
        self.teams.values().find(|team| team.repositories.iter().any(|own| own.matches(repository)))
    }
}

/// The accounts and teams of a store.
pub(crate) struct Accounts {
    storage: Storage,
    known: RwLock<Arc<Known>>,
    /// One reads at a time, so that what was read later is known in the end.
    reading: tokio::sync::Mutex<()>,
}

impl Accounts {
    pub(crate) async fn load(storage: Storage) -> Result<Accounts> {
        let accounts = Accounts { storage, known: RwLock::default(), reading: tokio::sync::Mutex::default() };
        accounts.refresh().await?;
        Ok(accounts)
    }

    pub(crate) fn known(&self) -> Arc<Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads what is stored now.
    pub(crate) async fn refresh(&self) -> Result<()> {
        let _reading = self.reading.lock().await;
        self.read().await
    }

    async fn read(&self) -> Result<()> {
        let before = self.known();
        let mut damaged = BTreeSet::new();
        let accounts = self.read_all("accounts", &before.accounts, &mut damaged).await?;
        let teams = self.read_all("teams", &before.teams, &mut damaged).await?;
        for document in damaged.difference(&before.damaged) {
            tracing::error!(document, "it is damaged, and stays what it was; set it again, or remove it");
        }
        *self.lock() = Arc::new(Known { accounts, teams, damaged });
        Ok(())
    }

    async fn read_all<T: Clone + DeserializeOwned>(
        &self,
        kind: &str,
        before: &BTreeMap<String, T>,
        damaged: &mut BTreeSet<String>,
    ) -> Result<BTreeMap<String, T>> {
        let mut all = BTreeMap::new();
        for name in self.storage.documents(kind).await? {
            let document = format!("{kind}/{name}");
            let read = match self.storage.document::<T>(&document).await {
                Err(Error::Damaged { .. }) => {
                    damaged.insert(document);
                    before.get(&name).cloned()
                }
                read => read?,
            };
            all.extend(read.map(|value| (name, value)));
        }
        Ok(all)
    }

    fn lock(&self) -> RwLockWriteGuard<'_, Arc<Known>> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn list(&self) -> Vec<AccountView> {
        self.known().accounts.values().map(|account| view(account, None)).collect()
    }

    /// Makes an account, or changes one: it keeps its secret unless another one is asked for.
    pub(crate) async fn set(&self, name: &str, spec: AccountSpec, now_s: u64) -> Answer<AccountView> {
        check_name("account", name)?;
        if let Some(team) = &spec.team
            && !self.known().teams.contains_key(team)
        {
            return Err(invalid(
                "team",
                format!("there is no team `{team}`; make it with `anyplace registry team set`"),
            ));
        }
        if spec.grants.is_empty() {
            return Err(invalid("grants", "expected at least one, such as `vision/**:pull,push`".to_owned()));
        }
        // Not what is known, which another process on the same store may have changed since.
        let there = match self.storage.document::<Account>(&format!("accounts/{name}")).await {
            Err(Error::Damaged { .. }) => None,
            there => there?,
        };
        let (secret, secret_sha256) = match there.filter(|_| !spec.new_secret) {
            Some(account) => (None, account.secret_sha256),
            None => {
                let secret = hex::encode(rand::random::<[u8; SECRET_BYTES]>());
                let sha256 = hex::encode(hash(&secret));
                (Some(secret), sha256)
            }
        };
        let account = Account {
            name: name.to_owned(),
            secret_sha256,
            team: spec.team,
            grants: spec.grants,
            expires_s: spec.ttl_s.map(|ttl| now_s.saturating_add(ttl)),
        };
        self.storage.put_document(&format!("accounts/{name}"), &account).await?;
        self.refresh().await?;
        Ok(view(&account, secret))
    }

    pub(crate) async fn delete(&self, name: &str) -> Answer<()> {
        check_name("account", name)?;
        let _reading = self.reading.lock().await;
        // First, so that nothing that fails afterwards lets them in.
        Arc::make_mut(&mut self.lock()).accounts.remove(name);
        if !self.storage.delete_document(&format!("accounts/{name}")).await? {
            return Err(unknown("account", name));
        }
        Ok(self.read().await?)
    }

    pub(crate) async fn set_team(&self, name: &str, mut team: Team) -> Answer<Team> {
        check_name("team", name)?;
        name.clone_into(&mut team.name);
        self.storage.put_document(&format!("teams/{name}"), &team).await?;
        self.refresh().await?;
        Ok(team)
    }

    pub(crate) async fn delete_team(&self, name: &str) -> Answer<()> {
        check_name("team", name)?;
        if self.known().accounts.values().any(|account| account.team.as_deref() == Some(name)) {
            return Err(invalid(
                "team",
                format!(
                    "`{name}` has accounts; remove them (`anyplace registry account rm`) or give them another team first"
                ),
            ));
        }
        if !self.storage.delete_document(&format!("teams/{name}")).await? {
            return Err(unknown("team", name));
        }
        Ok(self.refresh().await?)
    }
}

/// The accounts and teams that can't be understood, or read.
pub(crate) async fn damaged(storage: &Storage) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    for name in storage.documents("accounts").await? {
        let read = storage.document::<Account>(&format!("accounts/{name}")).await;
        problems.extend(read.err().map(|error| error.to_string()));
    }
    for name in storage.documents("teams").await? {
        let read = storage.document::<Team>(&format!("teams/{name}")).await;
        problems.extend(read.err().map(|error| error.to_string()));
    }
    Ok(problems)
}

fn view(account: &Account, secret: Option<String>) -> AccountView {
    AccountView {
        name: account.name.clone(),
        team: account.team.clone(),
        grants: account.grants.clone(),
        expires_s: account.expires_s,
        secret,
    }
}

fn check_name(what: &'static str, name: &str) -> Answer<()> {
    check_account_name(name).map_err(|message| invalid(what, message))
}

/// Whether this can be the name of an account or a team; else what is wrong with it.
pub fn check_account_name(name: &str) -> std::result::Result<(), String> {
    let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
    let good =
        !name.is_empty() && name.len() <= NAME_MAX && name.chars().all(valid) && !name.starts_with('.');
    if good {
        return Ok(());
    }
    Err(format!(
        "`{name}` is no name; expected 1 to {NAME_MAX} of a-z, 0-9, `-`, `_` and `.`, not beginning with `.`"
    ))
}

fn invalid(field: &'static str, message: String) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "INVALID", message).detail(serde_json::json!({ "field": field }))
}

fn unknown(what: &str, name: &str) -> Refusal {
    let message = format!("there is no {what} `{name}`; `anyplace registry {what} ls` lists them");
    Refusal::new(StatusCode::NOT_FOUND, "UNKNOWN", message)
}
