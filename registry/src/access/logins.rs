//! Wrong passwords, counted by the address that they come from and the name that they are for.
//!
//! Some are let through at once, and then one now and then. Until then, the right one isn't looked at either: a guesser
//! must not learn which it is. Others at the same address, with another name or with a token, go on as ever.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Wrong passwords at once: more than a person types, and a script with an old one notices before it is held up.
const AT_ONCE: u32 = 10;
/// How long until one more may be wrong: 10 a minute.
const ONE_MORE_AFTER: Duration = Duration::from_secs(6);
/// Most addresses and names that are remembered; some 100 bytes each.
const REMEMBERED_MAX: usize = 10_000;
/// A longer name is no account's, and needn't be kept whole.
const NAME_MAX_CHARS: usize = 128;

/// Who fails, and since when how often.
#[derive(Default)]
pub(super) struct Logins(Mutex<HashMap<(IpAddr, String), Failed>>);

struct Failed {
    /// How many more may be wrong.
    left: u32,
    /// When that was so.
    at: Instant,
}

impl Failed {
    fn pass(&mut self, now: Instant) {
        let more = now.saturating_duration_since(self.at).as_nanos() / ONE_MORE_AFTER.as_nanos();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(AT_ONCE);
        // What passed of the next one stays passed.
        self.at = if self.left == AT_ONCE { now } else { self.at + ONE_MORE_AFTER * more };
    }
}

impl Logins {
    /// Whether a password may be looked at; otherwise, how long until then.
    pub(super) fn may_try(&self, address: IpAddr, name: &str, now: Instant) -> Result<(), Duration> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(failed) = all.get_mut(&key(address, name)) else { return Ok(()) };
        failed.pass(now);
        match failed.left {
            0 => Err((failed.at + ONE_MORE_AFTER).saturating_duration_since(now)),
            _ => Ok(()),
        }
    }

    /// Remembers a wrong password.
    pub(super) fn failed(&self, address: IpAddr, name: &str, now: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key(address, name);
        if all.len() >= REMEMBERED_MAX && !all.contains_key(&key) {
            all.retain(|_, failed| {
                failed.pass(now);
                failed.left < AT_ONCE
            });
        }
        if all.len() >= REMEMBERED_MAX
            && !all.contains_key(&key)
            && let Some(oldest) = all.iter().min_by_key(|(_, failed)| failed.at).map(|(key, _)| key.clone())
        {
            all.remove(&oldest);
        }
        let failed = all.entry(key).or_insert(Failed { left: AT_ONCE, at: now });
        failed.pass(now);
        failed.left = failed.left.saturating_sub(1);
    }
}

/// One host may have all addresses of an IPv6 network of 64 bits.
fn key(address: IpAddr, name: &str) -> (IpAddr, String) {
    let network = match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
        v4 @ IpAddr::V4(_) => v4,
    };
    (network, name.chars().take(NAME_MAX_CHARS).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_passwords_are_bounded_by_address_and_name() {
        let (logins, begun) = (Logins::default(), Instant::now());
        let here: IpAddr = "10.0.0.1".parse().unwrap();
        for _ in 0..AT_ONCE {
            assert_eq!(logins.may_try(here, "ana", begun), Ok(()));
            logins.failed(here, "ana", begun);
        }
        assert_eq!(logins.may_try(here, "ana", begun), Err(ONE_MORE_AFTER));
        assert_eq!(logins.may_try(here, "bob", begun), Ok(()));
        assert_eq!(logins.may_try("10.0.0.2".parse().unwrap(), "ana", begun), Ok(()));
        let soon = begun + ONE_MORE_AFTER / 2;
        assert_eq!(logins.may_try(here, "ana", soon), Err(ONE_MORE_AFTER / 2));
        let later = begun + ONE_MORE_AFTER;
        assert_eq!(logins.may_try(here, "ana", later), Ok(()));
        logins.failed(here, "ana", later);
        assert!(logins.may_try(here, "ana", later).is_err());
        assert_eq!(logins.may_try(here, "ana", later + ONE_MORE_AFTER * AT_ONCE), Ok(()));
    }

    #[test]
    fn a_network_counts_as_one_and_memory_has_a_bound() {
        let (logins, now) = (Logins::default(), Instant::now());
        for host in 0..AT_ONCE {
            logins.failed(format!("2001:db8:0:1::{host:x}").parse().unwrap(), "ana", now);
        }
        assert!(logins.may_try("2001:db8:0:1:ffff::9".parse().unwrap(), "ana", now).is_err());
        assert_eq!(logins.may_try("2001:db8:0:2::1".parse().unwrap(), "ana", now), Ok(()));
        let host: IpAddr = "10.0.0.1".parse().unwrap();
        (0..REMEMBERED_MAX + 20).for_each(|number| logins.failed(host, &number.to_string(), now));
        assert_eq!(logins.0.lock().unwrap().len(), REMEMBERED_MAX);
    }
}
