"""What schemathesis does not know of this API."""

import schemathesis

MODEL = "schemathesis"

# A refusal with one of these says that the body is not what the schema asks for.
SCHEMA_CODES = {"invalid_json", "invalid_value", "unknown_field"}


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
