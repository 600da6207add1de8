//! Typed access to the fields of a JSON object, with errors that name the field.

use serde_json::{Map, Value};

use crate::error::Error;

/// A JSON object and where it lies in `config.json`.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// Prefix of field names in messages: empty, or `rope_scaling.` and the like.
    place: &'static str,
}

/// A value as a message shows it: short, whatever the file holds.
pub(super) fn show(value: &Value) -> String {
    match value {
        Value::Object(_) => "an object".to_string(),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::String(text) if text.chars().count() > 60 => {
            format!("\"{}…\"", text.chars().take(60).collect::<String>())
        }
        other => other.to_string(),
    }
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>, place: &'static str) -> Fields<'a> {
        Fields { map, place }
    }

    /// An error about the field `name`.
    pub(super) fn error(&self, name: &str, message: impl Into<String>) -> Error {
        Error::Config { field: format!("{}{name}", self.place), message: message.into() }
    }

    fn wrong(&self, name: &str, value: &Value, expected: &str) -> Error {
        self.error(name, format!("{} given, {expected} expected", show(value)))
    }

    fn missing(&self, name: &str, expected: &str) -> Error {
        self.error(name, format!("missing, {expected} expected"))
    }

    /// The value of a field; `null` counts as absent.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }

    /// An integer in `min..=max`.
    pub(super) fn integer_or_none(
        &self,
        name: &str,
        min: usize,
        max: usize,
    ) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_u64().map(usize::try_from) {
            Some(Ok(size)) if (min..=max).contains(&size) => Ok(Some(size)),
            _ => Err(self.wrong(name, value, &format!("an integer from {min} to {max}"))),
        }
    }

    /// An integer in `1..=max`.
    pub(super) fn size_or_none(&self, name: &str, max: usize) -> Result<Option<usize>, Error> {
        self.integer_or_none(name, 1, max)
    }

    pub(super) fn size(&self, name: &str, max: usize) -> Result<usize, Error> {
        let expected = format!("an integer from 1 to {max}");
        self.size_or_none(name, max)?.ok_or_else(|| self.missing(name, &expected))
    }

    /// A finite number in `min..=max`.
    pub(super) fn number_or_none(
        &self,
        name: &str,
        min: f64,
        max: f64,
    ) -> Result<Option<f64>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if (min..=max).contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(name, value, &format!("a number from {min} to {max}"))),
        }
    }

    pub(super) fn number(&self, name: &str, min: f64, max: f64) -> Result<f64, Error> {
        let expected = format!("a number from {min} to {max}");
        self.number_or_none(name, min, max)?.ok_or_else(|| self.missing(name, &expected))
    }

    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(name, value, "true or false"))
    }

    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(name, value, "a string"))
    }

    pub(super) fn object(
        &self,
        name: &str,
        place: &'static str,
    ) -> Result<Option<Fields<'a>>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Fields::new(map, place))),
            None => Err(self.wrong(name, value, "an object")),
        }
    }

    /// A list of strings of at most `max` items.
    pub(super) fn texts(&self, name: &str, max: usize) -> Result<Option<Vec<&'a str>>, Error> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let expected = format!("a list of at most {max} strings");
        let wrong = || self.wrong(name, value, &expected);
        let items = value.as_array().filter(|items| items.len() <= max).ok_or_else(wrong)?;
        let texts: Option<Vec<&str>> = items.iter().map(Value::as_str).collect();
        texts.map(Some).ok_or_else(wrong)
    }

    /// A token id below `vocab_size`, or a list of at most 64 of them.
    pub(super) fn tokens(&self, name: &str, vocab_size: usize) -> Result<Vec<u32>, Error> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let items = match value {
            Value::Array(items) if items.len() <= 64 => items.as_slice(),
            Value::Array(_) => return Err(self.wrong(name, value, "at most 64 token ids")),
            one => std::slice::from_ref(one),
        };
        let token = |item: &Value| match item.as_u64().map(u32::try_from) {
            Some(Ok(id)) if (id as usize) < vocab_size => Ok(id),
            _ => Err(self.wrong(name, item, &format!("a token id below {vocab_size}"))),
        };
        items.iter().map(token).collect()
    }
}
