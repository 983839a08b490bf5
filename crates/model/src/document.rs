//! From the text of a spec file to a [`Spec`], with errors that name file, line, field and fix.

use std::fmt;

use serde::{Deserialize, de::DeserializeOwned};

use crate::{DeploymentSpec, JobSpec, Spec};

/// The text format of a spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// YAML 1.2.
    Yaml,
    /// TOML 1.
    Toml,
    /// JSON.
    Json,
}

impl Format {
    /// Chosen by the end of a file's name; YAML where that says nothing (and for standard input).
    pub fn of_file(name: &str) -> Self {
        match name.rsplit_once('.').map(|(_, extension)| extension) {
            Some("toml") => Self::Toml,
            Some("json") => Self::Json,
            _ => Self::Yaml,
        }
    }
}

/// An impossible value: the field's path, what is wrong with it, and what to write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}; {fix}")]
pub struct Problem {
    /// Path of the field, such as `ports[1].port`.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub fix: String,
}

impl Problem {
    pub(crate) fn new(field: impl Into<String>, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into(), fix: fix.into() }
    }
}

/// Why a spec file was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpecError {
    /// The file, as the user named it.
    pub file: String,
    /// Line, from 1, where it could be found.
    pub line: Option<usize>,
    /// The field's path, where the error is about one.
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub fix: String,
}

impl std::error::Error for SpecError {}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        if let Some(field) = &self.field {
            write!(f, ": {field}")?;
        }
        write!(f, ": {}; {}", self.message, self.fix)
    }
}

/// What a deserializer said, before the file's name and the fix are added.
struct Parsed {
    line: Option<usize>,
    field: Option<String>,
    message: String,
}

#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

/// Reads one spec. `file` is only used in messages.
///
/// # Errors
/// The text isn't of the format, has an unknown or missing field, a wrong unit, or an impossible value.
pub fn parse_spec(text: &str, format: Format, file: &str) -> Result<Spec, SpecError> {
    let refused = |parsed: Parsed| {
        let fix = fix_for(&parsed.message);
        SpecError { file: file.into(), line: parsed.line, field: parsed.field, message: parsed.message, fix }
    };
    let kind: Kind = deserialize(text, format).map_err(refused)?;
    let spec = match kind.kind.as_deref() {
        Some("Deployment") => {
            Spec::Deployment(Box::new(deserialize::<DeploymentSpec>(text, format).map_err(refused)?))
        }
        Some("Job") => Spec::Job(Box::new(deserialize::<JobSpec>(text, format).map_err(refused)?)),
        other => {
            return Err(SpecError {
                file: file.into(),
                line: other.and_then(|_| line_of(text, "kind")),
                field: Some("kind".into()),
                message: other.map_or("is missing".into(), |kind| format!("`{kind}` is not known")),
                fix: "write `Deployment` or `Job`".into(),
            });
        }
    };
    spec.validate().map_err(|problem| SpecError {
        file: file.into(),
        line: line_of(text, &problem.field),
        field: Some(problem.field),
        message: problem.message,
        fix: problem.fix,
    })?;
    Ok(spec)
}

fn deserialize<T: DeserializeOwned>(text: &str, format: Format) -> Result<T, Parsed> {
    let mut field = None;
    let mut keep_path = |path: &serde_path_to_error::Path| {
        field = Some(path.to_string()).filter(|path| path != ".");
    };
    let result = match format {
        Format::Yaml => serde_saphyr::with_deserializer_from_str(text, |deserializer| {
            serde_path_to_error::deserialize(deserializer).map_err(|error| {
                keep_path(error.path());
                error.into_inner()
            })
        })
        .map_err(|error| {
            let line = error.location().and_then(|location| usize::try_from(location.line()).ok());
            (line, error.without_snippet().to_string())
        }),
        Format::Toml => toml::Deserializer::parse(text)
            .and_then(|deserializer| {
                serde_path_to_error::deserialize(deserializer).map_err(|error| {
                    keep_path(error.path());
                    error.into_inner()
                })
            })
            .map_err(|error| {
                let line =
                    error.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
                (line, error.message().to_string())
            }),
        Format::Json => serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
            .map_err(|error| {
                keep_path(error.path());
                let inner = error.into_inner();
                (Some(inner.line()), inner.to_string())
            }),
    };
    result.map_err(|(line, message)| Parsed {
        line: line.filter(|line| *line > 0),
        field,
        // Parsers append or prepend the position, which stands in front already.
        message: plain(strip_position(&message)),
    })
}

fn strip_position(message: &str) -> String {
    let message = message.lines().next().unwrap_or_default();
    let end =
        [" at line ", " (line "].iter().filter_map(|mark| message.find(mark)).min().unwrap_or(message.len());
    let message = &message[..end];
    match message.strip_prefix("error: ").unwrap_or(message).split_once(": ") {
        Some((position, rest)) if position.starts_with("line ") => rest.to_string(),
        _ => message.strip_prefix("error: ").unwrap_or(message).to_string(),
    }
}

/// Says in the user's words what parsers say in those of their programmers.
fn plain(message: String) -> String {
    for (kind, most) in [("u16", u16::MAX.into()), ("u32", u32::MAX.into()), ("u64", u64::MAX)] {
        let expected = [format!("expected a nonzero {kind}"), format!("expected {kind}")];
        let found = expected.iter().find_map(|end| message.strip_suffix(end));
        if found.is_some() || message == format!("invalid {kind}") {
            return format!("{}expected a whole number of at most {most}", found.unwrap_or_default());
        }
    }
    if message.starts_with("multiple YAML documents") {
        return "a second document begins here; write each spec into a file of its own".into();
    }
    message
}

fn fix_for(message: &str) -> String {
    let fix = if message.contains("unknown field") {
        "remove it, or see `anyplace schema` for the fields"
    } else if message.contains("missing field") {
        "add it; `anyplace schema` describes it"
    } else if message.contains("write ") {
        "see `anyplace schema`"
    } else {
        "mend it there; `anyplace schema` describes every field"
    };
    fix.into()
}

/// The line of a field by its path, found by the order of its keys in the text. Good for a message: keys are
/// searched one below the other, which block YAML, TOML and indented JSON all satisfy.
fn line_of(text: &str, path: &str) -> Option<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = None;
    let mut from = 0;
    for part in path.split('.') {
        let (key, index) = match part.split_once('[') {
            Some((key, index)) => (key, index.trim_end_matches(']').parse::<usize>().ok()),
            None => (part, None),
        };
        let Some(offset) = lines[from..].iter().position(|line| has_key(line, key)) else { break };
        found = Some(from + offset);
        from += offset;
        if let Some(index) = index {
            // The item's own line: the index-th list mark, or table header, from here on.
            let mut items = lines[from..].iter().enumerate().filter(|(_, line)| {
                let line = line.trim_start();
                line.starts_with("- ") || line.starts_with(&format!("[[{key}")) || line.starts_with('{')
            });
            if let Some((offset, _)) = items.nth(index) {
                found = Some(from + offset);
                from += offset;
            }
        }
    }
    found.map(|index| index + 1)
}

fn has_key(line: &str, key: &str) -> bool {
    let line = line.trim_start().trim_start_matches("- ").trim_start_matches(['[', '{', ' ']);
    let line = line.strip_prefix('"').unwrap_or(line);
    line.strip_prefix(key)
        .is_some_and(|rest| rest.trim_start_matches('"').trim_start().starts_with([':', '=', ']', '.']))
}

#[cfg(test)]
mod tests;
