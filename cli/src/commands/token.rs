//! `token create`: makes a token and shows it, or writes it where only its owner can read it.

use anyhow::Context as _;
use anyplace_api::{Role, TokenRequest, TokenScope};

use crate::{
    args::{RoleArg, TokenCommand},
    context::Session,
    output::{self, Format},
};

pub(super) async fn run(session: &Session, command: TokenCommand) -> anyhow::Result<()> {
    let TokenCommand::Create(args) = command;
    let role = match args.role {
        RoleArg::Viewer => Role::Viewer,
        RoleArg::Deployer => Role::Deployer,
        RoleArg::Admin => Role::Admin,
        RoleArg::Location => Role::Location,
    };
    let request = TokenRequest { role, scope: TokenScope { location: args.location }, ttl: args.ttl };
    let made = session.api()?.create_token(&request).await?;
    let until = made.expires_at.map_or("for ever".into(), |at| format!("until {}", output::moment(at)));
    match &args.out {
        Some(path) => {
            anyplace_service::write_atomically(path, format!("{}\n", made.token).as_bytes(), 0o600)
                .with_context(|| {
                    format!("the token can't be written to `{}`; make another", path.display())
                })?;
            output::note(format_args!("token written to {}, good {until}", path.display()));
            match args.output.format {
                Format::Table => Ok(()),
                // Not the secret: it is in the file, and nowhere else.
                format => output::data(
                    format,
                    &serde_json::json!({ "out": path, "expires_at": made.expires_at }),
                    String::new,
                ),
            }
        }
        None => {
            output::note(format_args!("good {until}; it is shown only this once"));
            output::data(args.output.format, &made, || made.token.clone())
        }
    }
}
