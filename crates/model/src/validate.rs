//! What the types alone can't refuse: values that are impossible, or impossible together.

use std::collections::BTreeSet;

use crate::{
    Bytes, Check, DeploymentSpec, DurationMs, JobName, JobSpec, MilliCpu, PRIORITY_MAX, PlacementConstraints,
    Resources, Spec, document::Problem,
};

/// The most instances that one deployment may have; a location's scheduler plans all of them at once.
const MAX_INSTANCES: u32 = 10_000;
/// Ports for each virtual IP; each is an entry in every router.
const MAX_PORTS: usize = 64;
const MAX_GPUS_PER_INSTANCE: u32 = 16;
const MAX_JOB_ATTEMPTS: u32 = 10;
/// Indexes of an array: each is a job, of which a platform keeps 20,000.
const MAX_INDEXES: u32 = 1_000;
/// A container whose limit is smaller can't even start its first process.
const MIN_MEMORY: Bytes = Bytes(4 << 20);
const MIN_CHECK_INTERVAL: DurationMs = DurationMs(100);

impl Spec {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The first impossible value, with its field and what to write instead.
    pub(crate) fn validate(&self) -> Result<(), Problem> {
        match self {
            Self::Deployment(spec) => spec.validate(),
            Self::Job(spec) => spec.validate(),
        }
    }
}

impl DeploymentSpec {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The first impossible value, with its field and what to write instead.
    pub fn validate(&self) -> Result<(), Problem> {
        image(&self.image)?;
        command(self.command.as_deref())?;
        env(self.env.keys())?;
        self.resources.validate()?;
        self.placement.validate()?;
        self.ports()?;
        let (min, max) = (self.instances.min, self.instances.max.unwrap_or(self.instances.min));
        if max < min {
            return Err(Problem::new(
                "instances.max",
                format!("{max} is less than instances.min ({min})"),
                format!("write {min} or more, or leave it out"),
            ));
        }
        if max == 0 || max > MAX_INSTANCES {
            return Err(Problem::new(
                if self.instances.max.is_some() { "instances.max" } else { "instances.min" },
                format!("{max} instances are not possible"),
                format!(
                    "write 1 to {MAX_INSTANCES}; to stop the deployment run `anyplace delete deployment {}`",
                    self.name
                ),
            ));
        }
        for (field, check) in
            [("health.liveness", &self.health.liveness), ("health.readiness", &self.health.readiness)]
        {
            if let Some(check) = check {
                check.validate(field)?;
            }
        }
        if let Some(load) = &self.load
            && !(load.target.is_finite() && load.target > 0.0)
        {
            return Err(Problem::new(
                "load.target",
                format!("{} is not a load", load.target),
                "write a number above 0",
            ));
        }
        Ok(())
    }

    fn ports(&self) -> Result<(), Problem> {
        if self.ports.len() > MAX_PORTS {
            let found = format!("{} ports are too many", self.ports.len());
            return Err(Problem::new("ports", found, format!("write at most {MAX_PORTS}")));
        }
        let mut outside = BTreeSet::new();
        let mut inside = BTreeSet::new();
        for (index, port) in self.ports.iter().enumerate() {
            if !outside.insert((port.port, port.protocol)) {
                return Err(Problem::new(
                    format!("ports[{index}].port"),
                    format!("port {} is there twice", port.port),
                    "give each port of the virtual IP once for each protocol",
                ));
            }
            // Replies find their virtual port by the container port, so that must be unique too.
            if !inside.insert((port.container_port(), port.protocol)) {
                return Err(Problem::new(
                    format!("ports[{index}].container_port"),
                    format!("container port {} is there twice", port.container_port()),
                    "let the container listen on a port of its own for each port of the virtual IP",
                ));
            }
        }
        Ok(())
    }
}

impl JobSpec {
    /// Refuses impossible values.
    ///
    /// # Errors
    /// The first impossible value, with its field and what to write instead.
    pub fn validate(&self) -> Result<(), Problem> {
        image(&self.image)?;
        command(self.command.as_deref())?;
        env(self.env.keys())?;
        self.resources.validate()?;
        self.placement.validate()?;
        if !(1..=MAX_JOB_ATTEMPTS).contains(&self.max_attempts) {
            let found = format!("{} attempts are not possible", self.max_attempts);
            return Err(Problem::new("max_attempts", found, format!("write 1 to {MAX_JOB_ATTEMPTS}")));
        }
        if self.priority > PRIORITY_MAX {
            let found = format!("{} is more than {PRIORITY_MAX}", self.priority);
            return Err(Problem::new("priority", found, format!("write 0 to {PRIORITY_MAX}")));
        }
        if let Some(size) = self.array {
            self.array(size)?;
        }
        if self.timeout == Some(DurationMs(0)) {
            return Err(Problem::new(
                "timeout",
                "0 leaves no time to run",
                "write a duration such as `1h`, or leave it out",
            ));
        }
        Ok(())
    }
}

impl JobSpec {
    fn array(&self, size: u32) -> Result<(), Problem> {
        if !(1..=MAX_INDEXES).contains(&size) {
            let found = format!("{size} indexes are not possible");
            return Err(Problem::new("array", found, format!("write 1 to {MAX_INDEXES}")));
        }
        let last = format!("{}-{}", self.name, size - 1);
        if last.parse::<JobName>().is_err() {
            let found = format!("the last index would be `{last}`, which is too long");
            let most = self.name.as_str().len() - (last.len() - 63);
            return Err(Problem::new("name", found, format!("write a name of at most {most} characters")));
        }
        Ok(())
    }
}

impl Resources {
    fn validate(&self) -> Result<(), Problem> {
        if self.cpu == MilliCpu(0) {
            return Err(Problem::new("resources.cpu", "0 leaves no time to run", "write at least `1m`"));
        }
        if self.memory < MIN_MEMORY {
            let found = format!("{} is too little to start a process", self.memory);
            return Err(Problem::new("resources.memory", found, format!("write at least `{MIN_MEMORY}`")));
        }
        let Some(gpu) = &self.gpu else { return Ok(()) };
        if !(1..=MAX_GPUS_PER_INSTANCE).contains(&gpu.count) {
            return Err(Problem::new(
                "resources.gpu.count",
                format!("{} GPUs are not possible", gpu.count),
                format!("write 1 to {MAX_GPUS_PER_INSTANCE}, or leave `gpu` out for none"),
            ));
        }
        if gpu.memory == Some(Bytes(0)) {
            return Err(Problem::new(
                "resources.gpu.memory",
                "0 is no share of a GPU",
                "write a size such as `16Gi`, or leave it out for whole GPUs",
            ));
        }
        Ok(())
    }
}

impl PlacementConstraints {
    fn validate(&self) -> Result<(), Problem> {
        for (index, country) in self.countries.iter().enumerate() {
            if country.len() != 2 || !country.bytes().all(|byte| byte.is_ascii_uppercase()) {
                return Err(Problem::new(
                    format!("placement.countries[{index}]"),
                    format!("`{country}` is not a country code"),
                    "write two capital letters (ISO 3166-1), such as `NL`",
                ));
            }
        }
        Ok(())
    }
}

impl Check {
    fn validate(&self, field: &str) -> Result<(), Problem> {
        let one_of = "write exactly one of `http`, `tcp` and `exec`";
        if self.kind().is_none() {
            return Err(Problem::new(field, "a check does one thing", one_of));
        }
        if let Some(http) = &self.http
            && !http.path.starts_with('/')
        {
            let found = format!("`{}` is not a path", http.path);
            return Err(Problem::new(format!("{field}.http.path"), found, "begin it with `/`"));
        }
        if let Some(exec) = &self.exec
            && exec.command.is_empty()
        {
            return Err(Problem::new(
                format!("{field}.exec.command"),
                "the command is empty",
                "write program and arguments",
            ));
        }
        if self.interval < MIN_CHECK_INTERVAL {
            let found = format!("{} is too often", self.interval);
            return Err(Problem::new(
                format!("{field}.interval"),
                found,
                format!("write at least `{MIN_CHECK_INTERVAL}`"),
            ));
        }
        if self.timeout == DurationMs(0) {
            return Err(Problem::new(
                format!("{field}.timeout"),
                "0 leaves no time to answer",
                "write a duration such as `1s`",
            ));
        }
        if self.failures == 0 {
            return Err(Problem::new(
                format!("{field}.failures"),
                "0 failures would always have failed",
                "write 1 or more",
            ));
        }
        Ok(())
    }
}

pub(crate) fn image(reference: &str) -> Result<(), Problem> {
    if reference.is_empty() || reference.contains(char::is_whitespace) {
        return Err(Problem::new(
            "image",
            format!("`{reference}` is not an image reference"),
            "write `repository:tag`, such as `hello:v1`; `anyplace push` prints it",
        ));
    }
    Ok(())
}

fn command(command: Option<&[String]>) -> Result<(), Problem> {
    match command {
        Some([]) => Err(Problem::new(
            "command",
            "the command is empty",
            "write program and arguments, or leave it out",
        )),
        _ => Ok(()),
    }
}

fn env<'a>(names: impl Iterator<Item = &'a String>) -> Result<(), Problem> {
    for name in names {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(Problem::new(
                "env",
                format!("`{name}` can't name a variable"),
                "leave out `=` and empty names",
            ));
        }
        if name.starts_with("ANYPLACE_") {
            return Err(Problem::new(
                format!("env.{name}"),
                "names that begin with ANYPLACE_ are the platform's",
                "choose another name",
            ));
        }
    }
    Ok(())
}
