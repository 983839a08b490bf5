//! Machines, reservations, assignments and routes of one location.
//!
//! One process, five tasks around one state in memory:
//!
//! - HTTP: machines report, and watch what they should have; routers watch routes. A report that changes anything
//!   changes the routes at once, before anything is written to disk.
//! - the clock: machines whose lease expires leave the routes at that moment;
//! - the reconcile loop: plans with the pure core, writes the plan in one transaction, then publishes it. It alone
//!   changes reservations;
//! - the choice of what goes to other locations, every second, by what routers measured and the global scheduler grants;
//! - the link to the global scheduler: what is wanted comes in (and is kept, so that the location goes on without
//!   it), what is there goes out.
//!
//! Store (`data_dir/store.redb`, or etcd): `instances/<instance>` reservations, `fence` (changes with each plan; a plan is
//! written only on the revision that it was made from), `desired/<key>` the last wish of the global scheduler,
//! `machines/<machine>` machines with their size, `away/<deployment>` which parts of its new connections go elsewhere,
//! `moves/<cause>` moves under way, `latency` round trips to other locations, `ran/<instance>` who ran ended instances (for their logs).
//!
//! This crate must not know users, runtimes or packets, nor other locations but as distant backends.

mod choice;
mod config;
mod http;
mod latency;
mod live;
mod naming;
mod persist;
mod reconcile;
mod scheduler;
mod upstream;

pub use config::Config;
pub use scheduler::run;

/// Whose store an export is.
const STORE_OF: &str = "location-scheduler";

/// What is in the store of a configuration, as a file. Over etcd, the scheduler may run meanwhile; a local file is only
/// read while it doesn't.
///
/// # Errors
/// The store can't be opened or read.
pub async fn export(config: &Config) -> anyhow::Result<Vec<u8>> {
    let store = anyplace_store::open(config.store_path(), config.etcd.as_ref()).await?;
    Ok(anyplace_store::export(store.as_ref(), STORE_OF).await?)
}

/// Fills the empty store of a configuration with what was exported; returns the number of entries.
///
/// # Errors
/// The file isn't a whole export, the store isn't empty, or can't be opened or written.
pub async fn import(config: &Config, file: &[u8]) -> anyhow::Result<usize> {
    let store = anyplace_store::open_any(config.store_path(), config.etcd.as_ref()).await?;
    Ok(anyplace_store::import(store.as_ref(), STORE_OF, file).await?)
}
