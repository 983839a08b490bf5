//! Proxies, as the environment names them: `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, each also in lower
//! case, which wins.
//!
//! `NO_PROXY` lists hosts that are reached directly: names (with everything below them), addresses, networks such as
//! `10.0.0.0/8`, or `*` for all. Loopback is always reached directly: a proxy elsewhere can't know what listens here.

use reqwest::{ClientBuilder, NoProxy, Proxy};

use crate::error::{Error, Result};

/// Never by a proxy.
const LOOPBACK: &str = "localhost,127.0.0.0/8,::1";

/// Sets up `builder` by the variables that `variable` gives.
pub(super) fn apply(
    mut builder: ClientBuilder,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<ClientBuilder> {
    let read = |name: &str| {
        variable(&name.to_ascii_lowercase())
            .or_else(|| variable(name))
            .filter(|value| !value.trim().is_empty())
    };
    let direct = match read("NO_PROXY") {
        Some(hosts) => format!("{LOOPBACK},{hosts}"),
        None => LOOPBACK.to_owned(),
    };
    // No proxy but those below.
    builder = builder.no_proxy();
    for name in ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        let Some(url) = read(name) else { continue };
        let proxy = match name {
            "HTTP_PROXY" => Proxy::http(&url),
            "HTTPS_PROXY" => Proxy::https(&url),
            _ => Proxy::all(&url),
        };
        let proxy = proxy.map_err(|_| Error::InvalidRegistry {
            what: format!("the variable {name}"),
            reason: format!("`{url}` is no proxy; expected a URL such as http://10.0.0.1:3128"),
        })?;
        builder = builder.proxy(proxy.no_proxy(NoProxy::from_string(&direct)));
    }
    Ok(builder)
}
