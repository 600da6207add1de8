//! The server's address, as it was typed.

use std::str::FromStr;

use hyper::Uri;

/// Where requests go: `http://host:port`, and a path before that of the API where a proxy has one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ServerUrl {
    /// As connections are made to it; IPv6 addresses without brackets.
    pub(super) host: String,
    pub(super) port: u16,
    /// Host and port as in the URL, for the header `host`.
    pub(super) authority: String,
    /// Without `/` at its end.
    path: String,
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<ServerUrl, String> {
        let expected = "expected such as http://127.0.0.1:23333";
        let uri: Uri = text.parse().map_err(|error| format!("{error}; {expected}"))?;
        match uri.scheme_str() {
            Some("http") => {}
            Some("https") => {
                return Err(format!(
                    "this client has no TLS; measure the server itself, {expected}"
                ));
            }
            _ => return Err(expected.to_owned()),
        }
        let Some(authority) = uri.authority().filter(|authority| !authority.host().is_empty())
        else {
            return Err(expected.to_owned());
        };
        if authority.as_str().contains('@') || uri.query().is_some() {
            return Err(format!("the URL has a user or a query; {expected}"));
        }
        let host = authority.host().trim_matches(['[', ']']).to_owned();
        let port = match (authority.port_u16(), authority.as_str().ends_with(authority.host())) {
            (Some(port), _) => port,
            (None, true) => 80,
            (None, false) => return Err(format!("the port is not 0 to 65535; {expected}")),
        };
        let path = uri.path().trim_end_matches('/').to_owned();
        Ok(ServerUrl { host, port, authority: authority.to_string(), path })
    }
}

impl ServerUrl {
    /// The path of an endpoint such as `/v1/models`; it may be part of the URL already.
    pub(super) fn path(&self, endpoint: &str) -> String {
        let base = self.path.strip_suffix("/v1").unwrap_or(&self.path);
        format!("{base}{endpoint}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let check = |text: &str, host: &str, port, path: &str| {
            let url: ServerUrl = text.parse().unwrap();
            let found = (url.host.as_str(), url.port, url.path("/v1/models"));
            assert_eq!(found, (host, port, path.to_owned()), "{text}");
        };
        check("http://127.0.0.1:23333", "127.0.0.1", 23333, "/v1/models");
        check("http://localhost/", "localhost", 80, "/v1/models");
        check("http://[::1]:8000/v1", "::1", 8000, "/v1/models");
        check("http://gate/models/a/", "gate", 80, "/models/a/v1/models");
        let refuse = |text: &str, expected: &str| {
            let error = text.parse::<ServerUrl>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        };
        refuse("https://a", "no TLS");
        refuse("127.0.0.1:23333", "expected such as");
        refuse("ftp://a", "expected such as");
        refuse("http://a:99999", "");
        refuse("http://u:p@a", "a user or a query");
        refuse("", "expected such as");
    }
}
