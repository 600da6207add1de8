//! Who may use the server: named keys, of which only hashes are kept.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::Response;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::app::App;
use super::error::ApiError;
use crate::error::Error;
use crate::kv_cache::Namespace;

/// Who asks. Everybody is the anonymous caller where there are no keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    pub name: Arc<str>,
    /// Whose sessions and whose pages of the KV cache the caller uses.
    pub namespace: Namespace,
}

/// The keys that a server accepts.
#[derive(Clone, Default)]
pub struct Keys {
    keys: Vec<NamedKey>,
}

#[derive(Clone)]
struct NamedKey {
    hash: [u8; 32],
    caller: Caller,
}

/// Keys that a file may have. Each is compared with what a client sends.
const KEYS_MAX: usize = 1024;
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Shorter keys can be guessed.
const KEY_LEN: std::ops::RangeInclusive<usize> = 16..=512;
const NAME_LEN_MAX: usize = 64;

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| &key.caller.name)).finish()
    }
}

impl Keys {
    /// Reads a file of keys, see [`Keys::parse`].
    pub fn read(path: &Path) -> Result<Keys, Error> {
        let mut text = String::new();
        let read = File::open(path)
            .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text))
            .map_err(|error| Error::io(path, error))?;
        if read as u64 > FILE_BYTES_MAX {
            let path = path.display();
            return Err(Error::Request(format!("{path}: more than {FILE_BYTES_MAX} bytes")));
        }
        let keys = Keys::parse(&text)
            .map_err(|error| Error::Request(format!("{}: {error}", path.display())))?;
        match keys.is_empty() {
            true => Err(Error::Request(format!("{}: it has no key", path.display()))),
            false => Ok(keys),
        }
    }

    /// One key a line, as `name:key` or alone; empty lines and those that begin with `#` are
    /// skipped. Callers of one name share sessions and pages.
    pub fn parse(text: &str) -> Result<Keys, Error> {
        let mut keys: Vec<NamedKey> = Vec::new();
        for (idx, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let refuse = |what: &str| Err(Error::Request(format!("line {}: {what}", idx + 1)));
            let key = match NamedKey::parse(line, idx + 1) {
                Ok(key) => key,
                Err(what) => return refuse(&what),
            };
            if keys.iter().any(|other| other.hash == key.hash) {
                return refuse("the key is there already");
            }
            if keys.len() == KEYS_MAX {
                return refuse(&format!("more than {KEYS_MAX} keys"));
            }
            keys.push(key);
        }
        Ok(Keys { keys })
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Who sends this `Authorization` header. Takes the same time whether there is a key, how long
    /// it is, and which of the known ones it is; the anonymous caller where no keys are needed.
    pub fn caller(&self, headers: &HeaderMap) -> Option<Caller> {
        if self.is_empty() {
            return Some(Caller::anonymous());
        }
        let key = bearer(headers).unwrap_or_default();
        let hash = hash(key);
        // NOTE: every key is compared, and the index chosen without a branch.
        let (mut found, mut found_idx) = (Choice::from(0), 0u32);
        for (idx, known) in self.keys.iter().enumerate() {
            let is_equal = known.hash.ct_eq(&hash);
            found_idx.conditional_assign(&(idx as u32), is_equal);
            found |= is_equal;
        }
        bool::from(found).then(|| self.keys[found_idx as usize].caller.clone())
    }
}

impl NamedKey {
    fn parse(line: &str, number: usize) -> Result<NamedKey, String> {
        let (name, key) = match line.split_once(':') {
            Some((name, key)) => (Some(name.trim()), key.trim()),
            None => (None, line),
        };
        if !KEY_LEN.contains(&key.len()) {
            let (min, max) = (KEY_LEN.start(), KEY_LEN.end());
            return Err(format!("a key of {} bytes; it must have {min} to {max}", key.len()));
        }
        if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a key has letters, digits and ASCII signs only".to_owned());
        }
        let is_name = |name: &str| {
            (1..=NAME_LEN_MAX).contains(&name.len())
                && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.@".contains(c))
        };
        if let Some(name) = name.filter(|name| !is_name(name)) {
            return Err(format!(
                "{name:?} cannot name a key; use 1 to {NAME_LEN_MAX} letters, digits and -_.@"
            ));
        }
        // A key without a name is its own namespace, wherever its line stands.
        let (context, of) = match name {
            Some(name) => ("bespoke server namespace of a name", name),
            None => ("bespoke server namespace of a key", key),
        };
        let name = name.map_or_else(|| format!("line-{number}"), str::to_owned);
        let caller = Caller { name: name.into(), namespace: namespace(context, of) };
        Ok(NamedKey { hash: hash(key.as_bytes()), caller })
    }
}

impl Caller {
    pub fn anonymous() -> Caller {
        Caller { name: "anonymous".into(), namespace: Namespace::default() }
    }
}

fn hash(key: &[u8]) -> [u8; 32] {
    *blake3::hash(key).as_bytes()
}

fn namespace(context: &str, of: &str) -> Namespace {
    let [a, b, c, d, e, f, g, h, ..] = blake3::derive_key(context, of.as_bytes());
    Namespace(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

/// Lets only known callers pass, and tells the handler who it is.
pub(super) async fn require_key(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let Some(caller) = app.options.keys.caller(request.headers()) else {
        app.metrics.rejected(super::metrics::Rejection::Unauthorized);
        return Err(ApiError::unauthorized());
    };
    // What changes something is new work, what only reads is not.
    if app.lifecycle.is_draining() && !request.method().is_safe() {
        app.metrics.rejected(super::metrics::Rejection::Draining);
        return Err(ApiError::draining());
    }
    request.extensions_mut().insert(caller.clone());
    let mut response = next.run(request).await;
    response.extensions_mut().insert(caller);
    Ok(response)
}
