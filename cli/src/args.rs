//! The command line: what can be asked, and its help.

mod access;
mod admin;
mod images;
mod location;
mod registry;
mod team;
mod vip;

use std::path::PathBuf;

use anyplace_model::{DeploymentName, DurationMs, InstanceId, JobName, LocationId};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use crate::output::Format;
pub(crate) use access::{AccountCommand, AccountSetArgs, AuditArgs, TeamCommand, TeamSetArgs};
pub(crate) use admin::{AdminCommand, ExportArgs, ImportArgs, StoreOf};
pub(crate) use images::{
    BuildArgs, ImageCommand, ImagePullArgs, ImageStoreArgs, ImageStoreCommand, PrewarmCommand,
    PrewarmSetArgs, PushArgs, SendArgs,
};
pub(crate) use location::LocationCommand;
pub(crate) use registry::{RegistryArgs, RegistryCommand, RunArgs};
pub(crate) use team::{TeamsCommand, TeamsSetArgs};
pub(crate) use vip::{VipCommand, VipPort, VipTarget, VipTraceArgs};

/// Runs containers in many locations behind one address.
#[derive(Debug, Parser)]
#[command(
    name = "anyplace",
    version,
    propagate_version = false,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Data goes to standard output, messages to standard error.\n\
                  Exit codes: 0 done, 1 error, 2 wrong usage, 4 still pending at the deadline of --wait."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) connection: Connection,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which platform the client commands talk to: flags, then variables, then the context, then loopback.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Connection {
    /// Global scheduler [env: ANYPLACE_URL] [default: http://127.0.0.1:7600]
    #[arg(long, global = true, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) url: Option<String>,
    /// File with the bearer token [env: ANYPLACE_TOKEN, or ANYPLACE_TOKEN_FILE]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) token_file: Option<PathBuf>,
    /// Registry for images without a host [env: ANYPLACE_REGISTRY] [default: http://127.0.0.1:5000]
    #[arg(long, global = true, value_name = "URL", value_hint = ValueHint::Url)]
    pub(crate) registry: Option<String>,
    /// File with one line `user:password` [env: ANYPLACE_REGISTRY_CREDENTIALS_FILE]
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) registry_credentials_file: Option<PathBuf>,
    /// Context that gives what isn't said otherwise [env: ANYPLACE_CONTEXT] [default: the current one]
    #[arg(long, global = true, value_name = "NAME")]
    pub(crate) context: Option<String>,
}

/// Everything that the binary can do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(flatten)]
    Client(ClientCommand),
    #[command(flatten)]
    Role(RoleCommand),
    /// Holds one container's output and exit code while the machine agent restarts.
    #[command(hide = true)]
    Shim {
        /// Folder of the container's state.
        #[arg(long)]
        state: PathBuf,
    },
}

/// Where a role's configuration is.
#[derive(Debug, Args)]
pub(crate) struct ConfigArg {
    /// Configuration (TOML)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) config: PathBuf,
}

/// Roles: processes that run until SIGTERM or SIGINT.
#[derive(Debug, Subcommand)]
pub(crate) enum RoleCommand {
    /// Role: API, placement into locations, virtual IPs, off-peak queue
    GlobalScheduler(ConfigArg),
    /// Role: machines of one location
    LocationScheduler(ConfigArg),
    /// Role: image registry of one location; with a command, operate one that runs
    Registry(RegistryArgs),
    /// Role: containers of one machine
    MachineAgent(ConfigArg),
    /// Role: packets of one machine
    StateRouter(ConfigArg),
}

/// What users run.
#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Pack an image and push it to the registry
    ///
    /// Prints the pushed reference with its digest, for a spec's `image` field.
    Push(Box<PushArgs>),
    /// Build a Dockerfile with buildah, docker, buildkit or podman, and push the result
    ///
    /// Prints the pushed reference with its digest, as `push` does.
    Build(BuildArgs),
    /// Create or change a deployment, or submit a job
    Apply(ApplyArgs),
    /// End a deployment, or forget a job that has ended
    #[command(subcommand)]
    Delete(DeleteCommand),
    /// List things, or show one of them
    Get(GetArgs),
    /// Show everything about one thing
    #[command(subcommand)]
    Describe(DescribeCommand),
    /// Say why something is where it is, or isn't
    Why {
        #[command(flatten)]
        target: TargetArg,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show what instances write
    Logs {
        #[command(flatten)]
        target: TargetArg,
        #[command(flatten)]
        logs: LogArgs,
        /// Only this instance
        #[arg(long, value_name = "INSTANCE")]
        instance: Option<InstanceId>,
    },
    /// Keep images on machines before anything asks for them
    #[command(subcommand)]
    Prewarm(PrewarmCommand),
    /// Images on this machine: pull, pack, and look after the store
    Image {
        #[command(flatten)]
        of: ImageStoreArgs,
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Show what each location has and could take
    Capacity {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Back the schedulers' stores up, and move them between a local file and etcd
    #[command(subcommand)]
    Admin(AdminCommand),
    /// Show what happened
    Events {
        /// To what, such as `deployment/hello` or `location/ams`; everything without
        subject: Option<String>,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Run and follow batch jobs
    #[command(subcommand)]
    Jobs(JobsCommand),
    /// See and set teams' weights and quotas
    #[command(subcommand)]
    Team(TeamsCommand),
    /// Operate a location
    #[command(subcommand)]
    Location(LocationCommand),
    /// Look at virtual IPs: who serves them from where, and which instance a connection gets
    #[command(subcommand)]
    Vip(VipCommand),
    /// Manage access
    #[command(subcommand)]
    Token(TokenCommand),
    /// Print the JSON Schema of specs
    Schema {
        /// Of one kind only
        kind: Option<WorkloadKind>,
    },
    /// Print a completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Remember addresses and credentials under a name
    #[command(subcommand)]
    Context(ContextCommand),
    /// Print the version
    Version,
}

/// How data is printed.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct OutputArg {
    /// Format of what is printed
    #[arg(short = 'o', long = "output", value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) format: Format,
}

/// Kinds of workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WorkloadKind {
    /// A long-running app
    #[value(alias = "deployments", alias = "deploy")]
    Deployment,
    /// Work that runs once
    #[value(alias = "jobs")]
    Job,
}

/// `deployment NAME`, `job NAME`, `deployment/NAME`, or `NAME` alone.
#[derive(Debug, Args)]
pub(crate) struct TargetArg {
    /// `deployment NAME`, `job NAME`, or just the name
    #[arg(required = true, num_args = 1..=2, value_name = "TARGET")]
    pub(crate) target: Vec<String>,
}

/// What to apply.
#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    pub(crate) file: FileArg,
    #[command(flatten)]
    pub(crate) wait: WaitArgs,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// A spec file.
#[derive(Debug, Args)]
pub(crate) struct FileArg {
    /// Spec (.yaml, .toml or .json); `-` reads YAML or JSON from standard input
    #[arg(short = 'f', long = "file", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) file: PathBuf,
}

/// Whether and how long to wait.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct WaitArgs {
    /// Wait until it is ready (or, a job, ended), and show how it gets there
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait; then exit with 4
    #[arg(long, value_name = "DURATION", default_value = "2m", requires = "wait")]
    pub(crate) timeout: DurationMs,
}

/// What to delete.
#[derive(Debug, Subcommand)]
pub(crate) enum DeleteCommand {
    /// End a deployment and free its virtual IP
    #[command(visible_alias = "deploy", alias = "deployments")]
    Deployment {
        /// Its name
        name: DeploymentName,
    },
    /// Forget a job that has ended
    #[command(alias = "jobs")]
    Job {
        /// Its name
        name: JobName,
    },
}

/// What to list.
#[derive(Debug, Args)]
pub(crate) struct GetArgs {
    /// What to list
    pub(crate) kind: GetKind,
    /// Only this one; for instances also a deployment or job, for events a subject
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// Lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GetKind {
    #[value(alias = "deployment", alias = "deploy")]
    Deployments,
    #[value(alias = "job")]
    Jobs,
    #[value(alias = "instance")]
    Instances,
    #[value(alias = "location")]
    Locations,
    #[value(alias = "event")]
    Events,
}

/// What to describe.
#[derive(Debug, Subcommand)]
pub(crate) enum DescribeCommand {
    /// A deployment: spec, instances, reasons, events
    #[command(visible_alias = "deploy", alias = "deployments")]
    Deployment {
        /// Its name
        name: DeploymentName,
        #[command(flatten)]
        output: OutputArg,
    },
    /// A job: spec, attempt, reasons, events
    #[command(alias = "jobs")]
    Job {
        /// Its name
        name: JobName,
        #[command(flatten)]
        output: OutputArg,
    },
    /// A location: settings, capacity, events
    #[command(alias = "locations")]
    Location {
        /// Its name
        name: LocationId,
        #[command(flatten)]
        output: OutputArg,
    },
}

/// Which part of a log.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LogArgs {
    /// Go on with what comes
    #[arg(short = 'f', long)]
    pub(crate) follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    pub(crate) tail: Option<u32>,
}

/// Batch jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum JobsCommand {
    /// Submit a job
    Run(ApplyArgs),
    /// List jobs, or show one
    #[command(alias = "ls")]
    Get {
        /// Only this one
        name: Option<JobName>,
        /// Each index of this array
        #[arg(long, requires = "name")]
        indexes: bool,
        #[command(flatten)]
        output: OutputArg,
    },
    /// Show what the last attempt wrote
    Logs {
        /// The job
        name: JobName,
        #[command(flatten)]
        logs: LogArgs,
    },
    /// End a job
    Cancel {
        /// The job
        name: JobName,
    },
    /// Forget a job that has ended
    Delete {
        /// The job
        name: JobName,
    },
}

/// Access.
#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token; it is shown only once
    Create(TokenCreateArgs),
}

/// A new token.
#[derive(Debug, Args)]
pub(crate) struct TokenCreateArgs {
    /// What it allows
    #[arg(long, value_enum)]
    pub(crate) role: RoleArg,
    /// The only location, for the role `location`
    #[arg(long, required_if_eq("role", "location"))]
    pub(crate) location: Option<LocationId>,
    /// How long it is good; for ever without
    #[arg(long, value_name = "DURATION")]
    pub(crate) ttl: Option<DurationMs>,
    /// Write it to this file (mode 0600) and not to standard output
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) out: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) output: OutputArg,
}

/// Roles of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// Read everything
    Viewer,
    /// And apply and delete deployments and jobs
    Deployer,
    /// And everything else
    Admin,
    /// A location scheduler
    Location,
}

/// Contexts.
#[derive(Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// List contexts
    List {
        #[command(flatten)]
        output: OutputArg,
    },
    /// Make a context the current one
    Use {
        /// Its name
        name: String,
    },
    /// Create or change a context from --url, --token-file, --registry, --registry-credentials-file
    Set {
        /// Its name
        name: String,
        /// Keep the token itself, read from standard input, in the context
        #[arg(long, conflicts_with = "token_file")]
        token_stdin: bool,
    },
    /// Show a context, without its token
    Show {
        /// Its name; the current one without
        name: Option<String>,
        #[command(flatten)]
        output: OutputArg,
    },
}
