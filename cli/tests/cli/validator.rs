//! A second opinion on the schema: as much of JSON Schema 2020-12 as it uses. A keyword that isn't known here fails
//! the test, so that nothing is passed over.

use serde_json::Value;

/// What is wrong with `value`; nothing where the schema accepts it.
pub(crate) fn check(root: &Value, schema: &Value, value: &Value, path: &str) -> Vec<String> {
    let Value::Object(keywords) = schema else { panic!("a schema is an object: {schema}") };
    let mut wrong = Vec::new();
    let mut refuse = |message: String| wrong.push(format!("{path}: {message}"));
    let mut inner = Vec::new();
    for (keyword, rule) in keywords {
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "default" | "examples" | "format" => {}
            "$ref" => {
                let pointer = rule.as_str().unwrap().strip_prefix('#').unwrap();
                let target = root.pointer(pointer).unwrap_or_else(|| panic!("{rule} points nowhere"));
                inner.extend(check(root, target, value, path));
            }
            "type" => {
                let allowed = match rule {
                    Value::Array(list) => list.iter().any(|one| has_type(value, one.as_str().unwrap())),
                    one => has_type(value, one.as_str().unwrap()),
                };
                if !allowed {
                    refuse(format!("{value} is no {rule}"));
                }
            }
            "enum" => {
                if !rule.as_array().unwrap().contains(value) {
                    refuse(format!("{value} is not one of {rule}"));
                }
            }
            "required" => {
                for name in rule.as_array().unwrap() {
                    if value.is_object() && value.get(name.as_str().unwrap()).is_none() {
                        refuse(format!("{name} is missing"));
                    }
                }
            }
            "properties" => {
                for (name, rule) in rule.as_object().unwrap() {
                    if let Some(value) = value.get(name) {
                        inner.extend(check(root, rule, value, &format!("{path}.{name}")));
                    }
                }
            }
            "additionalProperties" => {
                let known = keywords.get("properties").and_then(Value::as_object);
                for (name, value) in value.as_object().into_iter().flatten() {
                    if known.is_some_and(|known| known.contains_key(name)) {
                        continue;
                    }
                    match rule {
                        Value::Bool(allowed) if !allowed => refuse(format!("{name} is unknown")),
                        Value::Bool(_) => {}
                        rule => inner.extend(check(root, rule, value, &format!("{path}.{name}"))),
                    }
                }
            }
            "propertyNames" => {
                for name in value.as_object().into_iter().flatten().map(|(name, _)| name) {
                    inner.extend(check(root, rule, &Value::String(name.clone()), path));
                }
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    inner.extend(check(root, rule, item, &format!("{path}[{index}]")));
                }
            }
            "oneOf" => {
                let tries: Vec<_> =
                    rule.as_array().unwrap().iter().map(|rule| check(root, rule, value, path)).collect();
                if tries.iter().filter(|wrong| wrong.is_empty()).count() != 1 {
                    refuse(format!("{value} fits none or several: {tries:?}"));
                }
            }
            "minimum" => {
                if value.as_f64().is_some_and(|number| number < rule.as_f64().unwrap()) {
                    refuse(format!("{value} is less than {rule}"));
                }
            }
            "maximum" => {
                if value.as_f64().is_some_and(|number| number > rule.as_f64().unwrap()) {
                    refuse(format!("{value} is more than {rule}"));
                }
            }
            // One pattern is used, that of identifiers.
            "pattern" => {
                assert_eq!(rule, "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$");
                let text = value.as_str().unwrap_or("a");
                let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
                if !(text.starts_with(good)
                    && text.ends_with(good)
                    && text.chars().all(|c| good(c) || c == '-'))
                {
                    refuse(format!("{value} doesn't match {rule}"));
                }
            }
            other => panic!("{path}: the keyword `{other}` is not known here"),
        }
    }
    wrong.extend(inner);
    wrong
}

fn has_type(value: &Value, kind: &str) -> bool {
    match kind {
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        "boolean" => value.is_boolean(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "null" => value.is_null(),
        other => panic!("no type `{other}`"),
    }
}
