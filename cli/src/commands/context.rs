//! `context ...`: named addresses and credentials.

use std::collections::BTreeMap;

use anyhow::Context as _;

use crate::{
    args::{Connection, ContextCommand},
    context::{Context, Contexts},
    output::{self, Table},
};

/// Shown in place of a token.
const HIDDEN: &str = "(kept)";

pub(super) fn run(connection: &Connection, command: ContextCommand) -> anyhow::Result<()> {
    let mut contexts = Contexts::load()?;
    match command {
        ContextCommand::List { output: arg } => {
            let shown: BTreeMap<&String, Context> =
                contexts.contexts.iter().map(|(name, context)| (name, without_token(context))).collect();
            let shown = serde_json::json!({ "current": contexts.current, "contexts": shown });
            output::data(arg.format, &shown, || list(&contexts))
        }
        ContextCommand::Use { name } => {
            contexts.find(&name)?;
            contexts.current = Some(name.clone());
            contexts.save()?;
            output::note(format_args!("the current context is {name}"));
            Ok(())
        }
        ContextCommand::Set { name, token_stdin } => {
            let token = match token_stdin {
                true => Some(std::io::read_to_string(std::io::stdin())?.trim().to_owned()),
                false => None,
            };
            anyplace_service::install_crypto_provider();
            contexts.contexts.entry(name.clone()).or_default().update(connection, token)?;
            let current = contexts.current.get_or_insert_with(|| name.clone()).clone();
            contexts.save()?;
            let next = if current == name {
                String::new()
            } else {
                format!("; `anyplace context use {name}` makes it current")
            };
            output::note(format_args!("context {name} is set{next}"));
            Ok(())
        }
        ContextCommand::Show { name, output: arg } => {
            let name = name.or(connection.context.clone()).or(contexts.current.clone()).context(
                "there is no current context; make one with `anyplace context set NAME --url URL`",
            )?;
            let context = without_token(contexts.find(&name)?);
            output::data(arg.format, &context, || show(&name, &context))
        }
    }
}

fn without_token(context: &Context) -> Context {
    Context { token: context.token.as_ref().map(|_| HIDDEN.into()), ..context.clone() }
}

fn list(contexts: &Contexts) -> String {
    let mut table = Table::new(&["CURRENT", "NAME", "URL", "REGISTRY"]);
    for (name, context) in &contexts.contexts {
        table.row([
            if contexts.current.as_ref() == Some(name) { "*".into() } else { String::new() },
            name.clone(),
            context.url.clone().unwrap_or_default(),
            context.registry.clone().unwrap_or_default(),
        ]);
    }
    if table.is_empty() {
        output::note("no contexts; `anyplace context set NAME --url URL` makes one");
    }
    table.to_string()
}

fn show(name: &str, context: &Context) -> String {
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    let rows = [
        ("Name", Some(name.to_owned())),
        ("URL", context.url.clone()),
        ("Token", context.token.clone()),
        ("Token file", path(&context.token_file)),
        ("Registry", context.registry.clone()),
        ("Credentials file", path(&context.registry_credentials_file)),
    ];
    let mut text = String::new();
    for (label, value) in rows {
        if let Some(value) = value {
            text += &format!("{:18}{value}\n", format!("{label}:"));
        }
    }
    text
}
