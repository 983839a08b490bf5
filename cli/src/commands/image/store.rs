//! Looking after a machine's image store: through the agent that has it open, or, without one, directly.

use std::process::ExitCode;

use anyhow::Context as _;
use anyplace_api::{Client, Method};
use anyplace_images::{Diff, Inspected, Options, Reference, Store, StoredImage, Usage, Verified};
use anyplace_model::Bytes;
use anyplace_service::load_config;

use crate::{
    args::{ImageStoreArgs, ImageStoreCommand},
    output::{self, Format, Table, size, yes_no},
};

/// Paths that a difference shows of each kind; `-o json` has them all.
const PATHS_SHOWN: usize = 50;

/// Who answers.
enum Keeper {
    Agent(Client),
    Store(Store),
}

impl Keeper {
    fn find(args: &ImageStoreArgs) -> anyhow::Result<Keeper> {
        if let Some(folder) = &args.store {
            let missing =
                || format!("--store: there is no {}; `anyplace image pull` makes one", folder.display());
            anyhow::ensure!(folder.is_dir(), missing());
            return Ok(Keeper::Store(Store::open(folder, Options::default())?));
        }
        let config: anyplace_machine_agent::Config = load_config(&args.config).with_context(|| {
            "the machine agent's configuration says where its images are; give it with --config, or a folder with --store"
        })?;
        let token = std::fs::read_to_string(&config.token_file)
            .with_context(|| format!("can't read the machine token {}", config.token_file.display()))?;
        Ok(Keeper::Agent(Client::new(&config.advertise, Some(token.trim().to_owned()))?))
    }
}

pub(super) async fn run(command: ImageStoreCommand, args: &ImageStoreArgs) -> anyhow::Result<ExitCode> {
    let keeper = Keeper::find(args)?;
    match command {
        ImageStoreCommand::Ls { output } => list(&keeper, output.format).await?,
        ImageStoreCommand::Du { output } => du(&keeper, output.format).await?,
        ImageStoreCommand::Inspect { image, output } => inspect(&keeper, &image, output.format).await?,
        ImageStoreCommand::Diff { first, second, output } => {
            diff(&keeper, &first, &second, output.format).await?;
        }
        ImageStoreCommand::Rm { image } => remove(&keeper, &image).await?,
        ImageStoreCommand::Verify { output } => return verify(&keeper, output.format).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(keeper: &Keeper, format: Format) -> anyhow::Result<()> {
    let images: Vec<StoredImage> = match keeper {
        Keeper::Agent(agent) => agent.slow(Method::GET, "/v1/images", &[]).await?,
        Keeper::Store(store) => store.list()?,
    };
    output::data(format, &images, || {
        let mut table = Table::new(&["IMAGE", "DIGEST"]);
        for image in &images {
            table.row([image.reference.to_string(), image.digest.to_string()]);
        }
        if table.is_empty() {
            output::note("no image is here");
        }
        table.to_string()
    })
}

async fn du(keeper: &Keeper, format: Format) -> anyhow::Result<()> {
    let usages: Vec<Usage> = match keeper {
        Keeper::Agent(agent) => agent.slow(Method::GET, "/v1/images/du", &[]).await?,
        Keeper::Store(store) => store.du()?,
    };
    output::data(format, &usages, || {
        let mut table = Table::new(&["IMAGE", "SIZE", "OWN", "SHARED", "IN USE", "LAST USED"]);
        for usage in &usages {
            let used = i64::try_from(usage.used_s).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
            table.row([
                usage.image.reference.to_string(),
                size(Bytes(usage.bytes)),
                size(Bytes(usage.unique_bytes)),
                size(Bytes(usage.shared_bytes)),
                yes_no(usage.in_use),
                used.map(output::moment).unwrap_or_default(),
            ]);
        }
        if table.is_empty() {
            output::note("no image is here");
        }
        table.to_string()
    })
}

async fn inspect(keeper: &Keeper, image: &str, format: Format) -> anyhow::Result<()> {
    let reference: Reference = image.parse()?;
    let found: Inspected = match keeper {
        Keeper::Agent(agent) => agent.slow(Method::GET, "/v1/images/inspect", &[("image", image)]).await?,
        Keeper::Store(store) => store.inspect(&reference)?,
    };
    output::data(format, &found, || {
        let mut table = Table::new(&["LAYER", "SIZE", "UNPACKED", "ENTRIES", "DIFF ID"]);
        for layer in &found.layers {
            table.row([
                layer.digest.to_string(),
                size(Bytes(layer.size)),
                size(Bytes(layer.bytes)),
                layer.entries.to_string(),
                layer.diff_id.to_string(),
            ]);
        }
        format!(
            "image     {}\ndigest    {}\nmanifest  {}\nfiles     {}, {}\n\n{table}",
            found.image.reference,
            found.image.digest,
            found.image.manifest,
            found.files,
            size(Bytes(found.bytes)),
        )
    })
}

async fn diff(keeper: &Keeper, first: &str, second: &str, format: Format) -> anyhow::Result<()> {
    let names: (Reference, Reference) = (first.parse()?, second.parse()?);
    let diff: Diff = match keeper {
        Keeper::Agent(agent) => {
            agent.slow(Method::GET, "/v1/images/diff", &[("first", first), ("second", second)]).await?
        }
        Keeper::Store(store) => store.diff(&names.0, &names.1)?,
    };
    output::data(format, &diff, || {
        let mut text = String::new();
        for (mark, paths) in [('+', &diff.added), ('~', &diff.changed), ('-', &diff.removed)] {
            for path in paths.iter().take(PATHS_SHOWN) {
                text += &format!("{mark} {path}\n");
            }
            if paths.len() > PATHS_SHOWN {
                text += &format!("{mark} and {} more; -o json has them all\n", paths.len() - PATHS_SHOWN);
            }
        }
        text + &format!(
            "{} shared, {} only in the first, {} only in the second",
            size(Bytes(diff.shared_bytes)),
            size(Bytes(diff.first_bytes)),
            size(Bytes(diff.second_bytes))
        )
    })
}

async fn remove(keeper: &Keeper, image: &str) -> anyhow::Result<()> {
    let reference: Reference = image.parse()?;
    let freed: u64 = match keeper {
        Keeper::Agent(agent) => agent.slow(Method::DELETE, "/v1/images", &[("image", image)]).await?,
        Keeper::Store(store) => store.remove(&reference)?,
    };
    output::note(format_args!("{image} removed, {} freed", size(Bytes(freed))));
    Ok(())
}

async fn verify(keeper: &Keeper, format: Format) -> anyhow::Result<ExitCode> {
    let mut shown = crate::wait::Shown::new();
    shown.state("reading everything that is stored".to_owned());
    let verified: Verified = match keeper {
        Keeper::Agent(agent) => agent.slow(Method::POST, "/v1/images/verify", &[]).await?,
        Keeper::Store(store) => store.verify()?,
    };
    drop(shown);
    output::data(format, &verified, || {
        let mut text = format!(
            "{} images, {} objects, {} read",
            verified.images,
            verified.objects,
            size(Bytes(verified.bytes))
        );
        for (what, paths) in [("damaged and removed", &verified.damaged), ("made anew", &verified.repaired)] {
            for path in paths {
                text += &format!("\n{what}: {path}");
            }
        }
        for image in &verified.dropped {
            text += &format!("\nno longer whole: {}; the next pull fetches what it lacks", image.reference);
        }
        text
    })?;
    let whole = verified.damaged.is_empty() && verified.repaired.is_empty() && verified.dropped.is_empty();
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
