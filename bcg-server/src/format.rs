//! The form that an answer must have: `response_format` and the extensions beside it.

use bcg_engine::Grammar;
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::BodyFields;

/// Reads `response_format`, `regex` and vLLM's name for the latter; at most one of them.
pub(crate) fn grammar(fields: &BodyFields) -> Result<Option<Grammar>, ApiError> {
    let regex =
        |name| Ok::<_, ApiError>(fields.get::<String>(name)?.filter(|pattern| !pattern.is_empty()).map(Grammar::Regex));
    let given = [response_format(fields)?, regex("regex")?, regex("guided_regex")?];
    let mut given = given.into_iter().flatten();
    let grammar = given.next();
    if given.next().is_some() {
        let message = "`response_format`, `regex` and `guided_regex` exclude each other; give one of them.";
        return Err(ApiError::invalid("response_format", message));
    }
    Ok(grammar)
}

fn response_format(fields: &BodyFields) -> Result<Option<Grammar>, ApiError> {
    const PARAM: &str = "response_format";
    let Some(format) = fields.object(PARAM)? else { return Ok(None) };
    match format.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::JsonObject)),
        Some("json_schema") => match format.get("json_schema").and_then(|named| named.get("schema")) {
            Some(schema @ Value::Object(_)) => Ok(Some(Grammar::JsonSchema(schema.clone()))),
            _ => {
                Err(ApiError::invalid(PARAM, "`response_format.json_schema.schema` must be a JSON schema, an object."))
            }
        },
        _ => Err(ApiError::invalid(PARAM, "`response_format.type` must be `text`, `json_object` or `json_schema`.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(body: &Value) -> Result<Option<Grammar>, ApiError> {
        grammar(&crate::fields::leaked(body))
    }

    #[test]
    fn formats_become_grammars() {
        let schema = json!({"type": "integer"});
        let named = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}});
        assert_eq!(read(&json!({"response_format": {"type": "text"}})), Ok(None));
        assert_eq!(read(&json!({"response_format": {"type": "json_object"}})), Ok(Some(Grammar::JsonObject)));
        assert_eq!(read(&json!({ "response_format": named })), Ok(Some(Grammar::JsonSchema(schema))));
        for name in ["regex", "guided_regex"] {
            assert_eq!(read(&json!({name: "a+"})), Ok(Some(Grammar::Regex("a+".into()))));
        }
    }

    #[test]
    fn other_formats_are_refused() {
        for bad in [
            json!({"response_format": "json"}),
            json!({"response_format": {}}),
            json!({"response_format": {"type": "xml"}}),
            json!({"response_format": {"type": "json_schema"}}),
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 1}}}),
            json!({"response_format": {"type": "json_object"}, "regex": "a"}),
        ] {
            assert!(matches!(read(&bad), Err(ApiError::InvalidRequest { param: Some("response_format"), .. })));
        }
    }
}
