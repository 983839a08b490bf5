//! JSON Schema 2020-12 of the specs, derived from the same types that parse them.

use anyplace_model::{DeploymentSpec, JobSpec};
use serde_json::{Map, Value, json};
use utoipa::{
    ToSchema,
    openapi::{RefOr, schema::Schema},
};

use crate::args::WorkloadKind;

const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";
/// Where OpenAPI keeps what JSON Schema keeps in `$defs`.
const OPENAPI_SCHEMAS: &str = "#/components/schemas/";

/// The schema of one kind, or of both.
pub(crate) fn document(kind: Option<WorkloadKind>) -> anyhow::Result<Value> {
    match kind {
        Some(WorkloadKind::Deployment) => complete::<DeploymentSpec>("anyplace deployment"),
        Some(WorkloadKind::Job) => complete::<JobSpec>("anyplace job"),
        None => {
            let mut definitions = Map::new();
            collect::<DeploymentSpec>(&mut definitions)?;
            collect::<JobSpec>(&mut definitions)?;
            Ok(json!({
                "$schema": DIALECT,
                "title": "anyplace deployment or job",
                "oneOf": [
                    { "$ref": format!("#/$defs/{}", DeploymentSpec::name()) },
                    { "$ref": format!("#/$defs/{}", JobSpec::name()) },
                ],
                "$defs": definitions,
            }))
        }
    }
}

fn complete<T: ToSchema>(title: &str) -> anyhow::Result<Value> {
    let mut definitions = Map::new();
    collect::<T>(&mut definitions)?;
    let mut document = Map::new();
    document.insert("$schema".into(), DIALECT.into());
    document.insert("title".into(), title.into());
    if let Some(Value::Object(own)) = definitions.remove(T::name().as_ref()) {
        document.extend(own);
    }
    document.insert("$defs".into(), Value::Object(definitions));
    Ok(Value::Object(document))
}

fn collect<T: ToSchema>(definitions: &mut Map<String, Value>) -> anyhow::Result<()> {
    let mut schemas: Vec<(String, RefOr<Schema>)> = vec![(T::name().into_owned(), T::schema())];
    T::schemas(&mut schemas);
    for (name, schema) in schemas {
        let mut schema = serde_json::to_value(schema)?;
        to_json_schema(&mut schema);
        if name == "MilliCpu" {
            // `cpu: 2` is a number to YAML, and cores to us.
            schema["type"] = json!(["string", "number"]);
        }
        definitions.insert(name, schema);
    }
    Ok(())
}

/// OpenAPI 3.1 schemas are JSON Schema, but for where references point and the keyword `example`.
fn to_json_schema(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            if let Some(example) = fields.remove("example") {
                fields.insert("examples".into(), json!([example]));
            }
            for (key, value) in fields {
                match value {
                    Value::String(target) if key == "$ref" => {
                        *target = target.replace(OPENAPI_SCHEMAS, "#/$defs/");
                    }
                    other => to_json_schema(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(to_json_schema),
        _ => {}
    }
}
