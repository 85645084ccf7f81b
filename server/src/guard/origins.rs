//! Pages of the web that may use a server. Browsers say in `Origin` which page asks.

use super::hosts;

/// Most origins.
pub const ORIGINS_MAX: usize = 256;

/// Pages besides the server's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    pub(super) any: bool,
    listed: Vec<Origin>,
}

/// Scheme, host and port of a page; the port is absent where it is the scheme's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Origin {
    scheme: String,
    host: String,
    port: Option<u16>,
}

/// An origin that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OriginError {
    /// It is something else.
    #[error(
        "`{0}` is not an origin: it has to be like https://example.org or http://localhost:3000, without a path, or `*`"
    )]
    Malformed(String),
    /// There are too many.
    #[error("there are more than {ORIGINS_MAX} origins")]
    TooMany,
}

impl Origins {
    /// Reads origins; `*` stands for all.
    pub fn parse(origins: &[String]) -> Result<Self, OriginError> {
        if origins.len() > ORIGINS_MAX {
            return Err(OriginError::TooMany);
        }
        let mut parsed = Self::default();
        for text in origins {
            if text == "*" {
                parsed.any = true;
            } else {
                let malformed = || OriginError::Malformed(text.chars().take(200).collect());
                parsed
                    .listed
                    .push(Origin::parse(text).filter(|origin| !origin.host.contains('*')).ok_or_else(malformed)?);
            }
        }
        Ok(parsed)
    }

    /// Whether no page was named.
    pub fn is_empty(&self) -> bool {
        !self.any && self.listed.is_empty()
    }

    /// Whether every page is admitted.
    pub fn is_any(&self) -> bool {
        self.any
    }

    pub(super) fn admits(&self, origin: Option<&Origin>) -> bool {
        self.any || origin.is_some_and(|origin| self.listed.contains(origin))
    }
}

impl Origin {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte);
        if scheme.is_empty() || !scheme.bytes().all(letters) {
            return None;
        }
        let (host, port) = hosts::parse(authority)?;
        let port = port.filter(|port| Some(*port) != usual(&scheme));
        Some(Self { scheme, host, port })
    }

    /// Whether the page came from a server that is reached as `host` and `port`. Its scheme is not known there: something in
    /// between may have taken TLS off.
    pub(super) fn is_at(&self, host: &str, port: Option<u16>) -> bool {
        self.host == host && self.port == port.filter(|port| Some(*port) != usual(&self.scheme))
    }
}

fn usual(scheme: &str) -> Option<u16> {
    match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_the_same_however_they_are_written() {
        let origins = ["https://Example.org:443", "http://localhost:3000", "tauri://localhost"].map(String::from);
        let origins = Origins::parse(&origins).unwrap();
        for (origin, want) in [
            ("https://example.org", true),
            ("https://example.org:443", true),
            ("http://example.org", false),
            ("https://example.org:8443", false),
            ("https://a.example.org", false),
            ("http://localhost:3000", true),
            ("http://localhost", false),
            ("tauri://localhost", true),
            ("null", false),
            ("", false),
        ] {
            assert_eq!(origins.admits(Origin::parse(origin).as_ref()), want, "{origin}");
        }
        assert!(Origins::parse(&["*".into()]).unwrap().admits(None));
    }

    #[test]
    fn what_is_no_origin_is_refused() {
        for text in
            ["", "null", "example.org", "https://", "https://a/", "https://a/b", "https://u@a", "://a", "https://*"]
        {
            let refused = Origins::parse(&[text.to_owned()]);
            assert_eq!(refused, Err(OriginError::Malformed(text.into())), "{text:?}");
        }
    }

    #[test]
    fn a_page_of_the_server_itself_is_known_by_its_address() {
        let origin = Origin::parse("http://localhost").unwrap();
        assert!(origin.is_at("localhost", None) && origin.is_at("localhost", Some(80)));
        assert!(!origin.is_at("localhost", Some(9337)) && !origin.is_at("127.0.0.1", None));
    }
}
