//! Request bodies: bounded while they are read, then JSON that says one thing only.

use std::fmt;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde::de::{DeserializeOwned, DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize as _, Deserializer};
use serde_json::{Map, Number, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

use super::app::App;
use super::error::ApiError;

/// The body of a request as `T`, which should deny unknown fields: the error names them.
#[derive(Clone, Debug)]
pub struct ApiJson<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        if !is_json(request.headers()) {
            return Err(ApiError::unsupported_media_type());
        }
        let time = app.options.timeouts.body;
        let reading = app.bodies.read(request.into_body());
        let body = tokio::time::timeout(time, reading).await.map_err(|_| ApiError::body_timeout());
        parse(&body??.bytes, app.options.limits.json_depth_max).map(ApiJson)
    }
}

/// Memory for bodies that are read.
pub struct Bodies {
    /// In units of [`UNIT`].
    permits: Arc<Semaphore>,
    bytes_max: usize,
}

/// A body, which holds its share of the memory.
struct HeldBody {
    bytes: Bytes,
    _permits: Vec<OwnedSemaphorePermit>,
}

/// Bytes that are reserved at once.
const UNIT: usize = 16 << 10;

impl Bodies {
    /// Bodies of `bytes_max` each and `all_bytes_max` together.
    pub fn new(bytes_max: usize, all_bytes_max: usize) -> Bodies {
        let num_units = all_bytes_max.div_ceil(UNIT).min(Semaphore::MAX_PERMITS);
        Bodies { permits: Arc::new(Semaphore::new(num_units)), bytes_max }
    }

    async fn read(&self, mut body: Body) -> Result<HeldBody, ApiError> {
        let mut bytes = BytesMut::new();
        let mut permits = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| broken())?;
            let Ok(data) = frame.into_data() else { continue };
            if data.len() > self.bytes_max - bytes.len() {
                return Err(ApiError::body_too_large(self.bytes_max));
            }
            while permits.len() * UNIT < bytes.len() + data.len() {
                permits.push(self.reserve()?);
            }
            bytes.extend_from_slice(&data);
        }
        Ok(HeldBody { bytes: bytes.freeze(), _permits: permits })
    }

    fn reserve(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let permit = Arc::clone(&self.permits).try_acquire_owned();
        permit.map_err(|error| match error {
            TryAcquireError::NoPermits | TryAcquireError::Closed => {
                let message = "the server reads too many bodies at once; try again later";
                ApiError::unavailable("out_of_resources", message)
            }
        })
    }
}

fn broken() -> ApiError {
    ApiError::bad_request(None, "the body of the request ended early or is framed wrongly")
}

/// NOTE: a page of another origin cannot send this type without asking first.
fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let kind = value.unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    kind == "application/json" || (kind.starts_with("application/") && kind.ends_with("+json"))
}

/// The one value that `bytes` hold. Refuses what parsers read differently, such as a key that is
/// there twice, and arrays and objects nested deeper than `depth_max`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8], depth_max: usize) -> Result<T, ApiError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let place = error.valid_up_to();
        let message = format!("the body is not UTF-8 at byte {place}; send JSON in UTF-8");
        ApiError::bad_request(None, message).with_code("invalid_json")
    })?;
    let mut reader = serde_json::Deserializer::from_str(text);
    let value = Strict { depth_left: depth_max }
        .deserialize(&mut reader)
        .and_then(|value| reader.end().map(|()| value))
        .map_err(|error| {
            let message = format!("the body is no acceptable JSON: {error}");
            ApiError::bad_request(None, message).with_code("invalid_json")
        })?;
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        field_error(&path, &error.into_inner().to_string())
    })
}

/// Says which field is wrong.
fn field_error(path: &str, message: &str) -> ApiError {
    let named = ["unknown field `", "missing field `"].iter().find_map(|start| {
        let rest = message.strip_prefix(start)?;
        rest.split_once('`').map(|(name, _)| name)
    });
    let place = if path == "." { "" } else { path };
    let param = match named {
        None => place.to_owned(),
        Some(name) if place.is_empty() => name.to_owned(),
        Some(name) if place == name || place.ends_with(&format!(".{name}")) => place.to_owned(),
        Some(name) => format!("{place}.{name}"),
    };
    let is_known = named.is_none() || !message.starts_with("unknown");
    let code = if is_known { "invalid_value" } else { "unknown_field" };
    let text = match param.is_empty() {
        true => message.to_owned(),
        false => format!("{param}: {message}"),
    };
    ApiError::bad_request((!param.is_empty()).then_some(param), text).with_code(code)
}

/// Reads any JSON value of bounded depth whose objects have each key once.
struct Strict {
    depth_left: usize,
}

impl Strict {
    fn inner<E: serde::de::Error>(&self) -> Result<Strict, E> {
        match self.depth_left.checked_sub(1) {
            Some(depth_left) => Ok(Strict { depth_left }),
            None => Err(E::custom("arrays and objects are nested too deeply")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number is not finite"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(self.inner()?)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key_seed(Key)? {
            let value = entries.next_value_seed(self.inner()?)?;
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!("the key {key:?} is there twice")));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        String::deserialize(deserializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Body {
        name: String,
        #[serde(default)]
        items: Vec<Item>,
    }

    #[derive(Debug, serde::Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Item {
        #[serde(rename = "n")]
        _n: u8,
    }

    #[test]
    fn errors_name_the_field() {
        let check = |text: &str, param: Option<&str>, code: &str, part: &str| {
            let error = parse::<Body>(text.as_bytes(), 64).unwrap_err();
            assert_eq!(error.param.as_deref(), param, "{text}: {error:?}");
            assert_eq!(error.code, Some(code), "{text}: {error:?}");
            assert!(error.message.contains(part), "{text}: {error:?}");
            assert_eq!(error.status.as_u16(), 400);
        };
        check(r#"{"name":1}"#, Some("name"), "invalid_value", "expected a string");
        check(r#"{}"#, Some("name"), "invalid_value", "missing field");
        check(r#"{"name":"a","x":1}"#, Some("x"), "unknown_field", "unknown field `x`");
        check(
            r#"{"name":"a","items":[{"n":1},{"n":300}]}"#,
            Some("items[1].n"),
            "invalid_value",
            "300",
        );
        check(
            r#"{"name":"a","items":[{"n":1,"z":2}]}"#,
            Some("items[0].z"),
            "unknown_field",
            "unknown field",
        );
        check("[]", None, "invalid_value", "");
        check("{\"name\":\"a\"} x", None, "invalid_json", "trailing");
        check("", None, "invalid_json", "EOF");
        check(r#"{"name":"a","name":"b"}"#, None, "invalid_json", "twice");
        check(r#"{"name":"\ud800"}"#, None, "invalid_json", "hex escape");
        check(r#"{"name":NaN}"#, None, "invalid_json", "");
        check(r#"{"name":1e999}"#, None, "invalid_json", "out of range");
        check("\u{feff}{}", None, "invalid_json", "");
        let error = parse::<Body>(b"{\"name\":\"\xff\"}", 64).unwrap_err();
        assert!(error.message.contains("at byte 9"), "{error:?}");
    }

    #[test]
    fn depth_is_bounded_to_the_level() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        for depth_max in [1, 2, 64] {
            let check = |depth| parse::<Value>(nested(depth).as_bytes(), depth_max);
            assert!(check(depth_max).is_ok(), "{depth_max}");
            assert!(check(depth_max + 1).is_err(), "{depth_max}");
        }
        for depth in [127, 128, 129, 100_000] {
            assert!(parse::<Value>(nested(depth).as_bytes(), 64).is_err(), "{depth}");
        }
        let sound: Value = parse(br#"{"a":[1,-2,2.5,null,true,"x"],"b":{}}"#, 64).unwrap();
        assert_eq!(sound, serde_json::json!({"a":[1,-2,2.5,null,true,"x"],"b":{}}));
    }
}
