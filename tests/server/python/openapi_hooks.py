"""What schemathesis does not know of this API."""

import json

import jsonschema
import schemathesis

MODEL = "schemathesis"
STREAM = "text/event-stream"

# A refusal with one of these says that the body is not what the schema asks for.
SCHEMA_CODES = {"invalid_json", "invalid_value", "unknown_field"}

# What the data of an event looks like, by the labels of operations.
event_schemas = {}


@schemathesis.hook
def before_load_schema(context, raw_schema):
    """Keeps the schemas of events: schemathesis takes them for those of a whole event, which has
    its data as a string."""
    for path, methods in raw_schema["paths"].items():
        for method, operation in methods.items():
            for response in operation.get("responses", {}).values():
                stream = response.get("content", {}).get(STREAM)
                if stream is not None:
                    schema = {"components": raw_schema["components"], **stream.pop("schema")}
                    event_schemas[f"{method.upper()} {path}"] = schema


@schemathesis.hook
def before_call(context, case, kwargs):
    """Asks for the model that is there: other names are refused before anything is looked at."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = MODEL


@schemathesis.check
def valid_data_is_understood(ctx, response, case):
    """Data that the schema accepts is never refused as data that it does not."""
    meta = case.meta
    if meta is None or not meta.generation.mode.is_positive or response.status_code != 400:
        return
    code = response.json()["error"]["code"]
    assert code not in SCHEMA_CODES, f"the schema accepts what is refused: {response.text}"


@schemathesis.check
def errors_have_one_shape(ctx, response, case):
    """Every error is an error of OpenAI's API, whatever caused it."""
    if response.status_code < 400 or case.method.upper() == "HEAD":
        return
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, response.text
    assert error["message"] and error["type"], response.text


@schemathesis.check
def events_have_their_schema(ctx, response, case):
    """Every event of a stream is what the OpenAPI file says."""
    kind = (response.headers.get("content-type") or [""])[0]
    if response.status_code != 200 or not kind.startswith(STREAM):
        return
    schema = event_schemas[case.operation.label]
    for line in response.text.split("\n"):
        data = line.removeprefix("data: ")
        if line.startswith("data: ") and data != "[DONE]":
            jsonschema.validate(json.loads(data), schema)
