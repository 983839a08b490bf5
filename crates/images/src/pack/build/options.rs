//! How to build, beyond the Dockerfile, in each builder's own words.

use std::path::PathBuf;
use std::str::FromStr;

use super::Builder;
use crate::error::{Error, Result};

/// What `docker build` takes too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BuildOptions {
    /// Values of the Dockerfile's `ARG`s: `NAME=VALUE`, or `NAME` for what the environment has, if it has it.
    pub args: Vec<String>,
    /// The stage that is built, where it isn't the last one.
    pub target: Option<String>,
    /// The platform that it is built for, such as `linux/arm64`, where it isn't this machine's.
    pub platform: Option<String>,
    /// What `RUN --mount=type=secret` sees, and the image doesn't keep.
    pub secrets: Vec<BuildSecret>,
    /// Whether all is built anew.
    pub no_cache: bool,
}

/// A secret of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildSecret {
    id: String,
    from: Origin,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    File(PathBuf),
    Variable(String),
}

/// `id=NAME,src=FILE` or `id=NAME,env=VARIABLE`, as docker has it.
impl FromStr for BuildSecret {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<BuildSecret, String> {
        let expected = || "expected id=NAME,src=FILE or id=NAME,env=VARIABLE".to_owned();
        let (mut id, mut from) = (None, None);
        for field in text.split(',') {
            let (key, value) =
                field.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(expected)?;
            let before = match key {
                "id" => id.replace(value.to_owned()).is_some(),
                "src" | "source" => from.replace(Origin::File(value.into())).is_some(),
                "env" => from.replace(Origin::Variable(value.to_owned())).is_some(),
                "type" if matches!(value, "file" | "env") => false,
                _ => true,
            };
            if before {
                return Err(expected());
            }
        }
        id.zip(from).map(|(id, from)| BuildSecret { id, from }).ok_or_else(expected)
    }
}

impl BuildSecret {
    /// As builders take it, which disagree on what a relative path is relative to.
    fn text(&self) -> Result<String> {
        let BuildSecret { id, from } = self;
        let path = match from {
            Origin::Variable(name) if std::env::var_os(name).is_some() => {
                return Ok(format!("id={id},env={name}"));
            }
            Origin::Variable(name) => {
                return Err(Error::Unsupported {
                    what: format!("the secret `{id}` of the variable {name}, which isn't set,"),
                    help: "set it, or name a file with src=".to_owned(),
                });
            }
            Origin::File(path) => path,
        };
        let invalid = |reason: &str| Error::InvalidSource {
            path: path.clone(),
            reason: format!("the secret `{id}`: {reason}"),
        };
        if !path.is_file() {
            return Err(invalid("there is no such file"));
        }
        let whole = std::path::absolute(path).map_err(Error::io("reading", path))?;
        let whole = whole.to_str().filter(|text| !text.contains(','));
        let whole =
            whole.ok_or_else(|| invalid("builders take no path with a comma, or that is no UTF-8"))?;
        Ok(format!("id={id},src={whole}"))
    }
}

impl BuildOptions {
    /// The arguments for a builder.
    ///
    /// # Errors
    /// What the builder can't do, and secrets that aren't there.
    pub(super) fn arguments(&self, builder: Builder) -> Result<Vec<String>> {
        let buildctl = builder == Builder::Buildctl;
        let option = |name: &str, value: &str| match buildctl {
            true => format!("--opt={name}={value}"),
            false => format!("--{name}={value}"),
        };
        let mut arguments = Vec::new();
        for arg in &self.args {
            if !buildctl {
                arguments.push(format!("--build-arg={arg}"));
            } else if arg.contains('=') {
                arguments.push(format!("--opt=build-arg:{arg}"));
            } else if let Ok(value) = std::env::var(arg) {
                arguments.push(format!("--opt=build-arg:{arg}={value}"));
            }
        }
        arguments.extend(self.target.iter().map(|target| option("target", target)));
        arguments.extend(self.platform.iter().map(|platform| option("platform", platform)));
        for secret in &self.secrets {
            arguments.push(format!("--secret={}", secret.text()?));
        }
        let anew = self.no_cache || self.stays_apart(builder);
        arguments.extend(anew.then(|| "--no-cache".to_owned()));
        self.check(builder)?;
        Ok(arguments)
    }

    fn check(&self, builder: Builder) -> Result<()> {
        let off = std::env::var("DOCKER_BUILDKIT").is_ok_and(|value| matches!(value.as_str(), "0" | "false"));
        if builder == Builder::Docker && off && !self.secrets.is_empty() {
            return Err(Error::Unsupported {
                what: "a secret for docker's builder without BuildKit".to_owned(),
                help: "unset DOCKER_BUILDKIT, or set it to 1; or install the package buildah".to_owned(),
            });
        }
        Ok(())
    }

    /// Whether the build takes nothing from the builder's cache, and leaves nothing in it: that of buildah and podman (1.28,
    /// 4.3) gives a build from scratch what it made for any other platform.
    pub(super) fn stays_apart(&self, builder: Builder) -> bool {
        self.platform.is_some() && matches!(builder, Builder::Buildah | Builder::Podman)
    }

    /// What the builder's environment needs: docker before version 23 uses BuildKit only where it is told to.
    pub(super) fn variable(&self, builder: Builder) -> Option<(&'static str, &'static str)> {
        let needed = builder == Builder::Docker && !self.secrets.is_empty();
        needed.then_some(("DOCKER_BUILDKIT", "1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_read_as_docker_writes_them() {
        let file = |id: &str, path: &str| BuildSecret { id: id.into(), from: Origin::File(path.into()) };
        for (text, expected) in [
            ("id=a,src=/b", file("a", "/b")),
            ("type=file,source=c/d,id=a", file("a", "c/d")),
            ("id=a,env=B", BuildSecret { id: "a".into(), from: Origin::Variable("B".into()) }),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "a",
            "id=a",
            "src=/b",
            "id=,src=/b",
            "id=a,src=/b,env=C",
            "id=a,src=/b,mode=1",
            "id=a,type=x",
        ] {
            assert!(bad.parse::<BuildSecret>().is_err(), "{bad}");
        }
    }

    #[test]
    fn each_builder_is_told_in_its_own_words() {
        let options = BuildOptions {
            args: vec!["A=1 2".into(), "ANYPLACE_TEST_UNSET".into()],
            target: Some("first".into()),
            platform: Some("linux/arm64".into()),
            secrets: vec![],
            no_cache: true,
        };
        let plain = [
            "--build-arg=A=1 2",
            "--build-arg=ANYPLACE_TEST_UNSET",
            "--target=first",
            "--platform=linux/arm64",
            "--no-cache",
        ];
        for builder in [Builder::Buildah, Builder::Docker, Builder::Podman] {
            assert_eq!(options.arguments(builder).unwrap(), plain);
        }
        let apart = BuildOptions { no_cache: false, ..options.clone() };
        assert_eq!(apart.arguments(Builder::Buildah).unwrap(), plain);
        assert_eq!(apart.arguments(Builder::Docker).unwrap(), plain[..4]);
        let kit = ["--opt=build-arg:A=1 2", "--opt=target=first", "--opt=platform=linux/arm64", "--no-cache"];
        assert_eq!(options.arguments(Builder::Buildctl).unwrap(), kit);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let with = |path: &std::path::Path| {
            let secret = format!("id=t,src={}", path.display()).parse().unwrap();
            BuildOptions { secrets: vec![secret], ..BuildOptions::default() }.arguments(Builder::Buildah)
        };
        let missing = with(&path).unwrap_err().to_string();
        assert!(missing.contains("the secret `t`: there is no such file"), "{missing}");
        std::fs::write(&path, "x").unwrap();
        assert_eq!(with(&path).unwrap(), [format!("--secret=id=t,src={}", path.display())]);
    }
}
