//! What is shared and how: the options, and the address in its normal form.

use std::{
    fmt,
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};

use mesh_core::Hint;
use reqwest::Url;

/// Longest name of a node, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// How a server is shared.
#[derive(Clone)]
pub struct ShareOptions {
    /// Where it is: with or without `/v1`, http or https.
    pub url: String,
    /// The API key it asks for.
    pub key: Option<String>,
    /// What it is called among nodes. Its host and port are never shown.
    pub name: String,
    /// Time between two looks at a server that answers.
    pub interval: Duration,
    /// Longest time between two looks at one that does not.
    pub backoff_max: Duration,
    /// Longest wait for each answer of a look.
    pub look_max: Duration,
    /// Longest wait for the first byte of an answer: the server may have to load the model, and to read the prompt.
    pub first_byte_max: Duration,
    /// Longest silence between two events of an answer.
    pub idle_max: Duration,
    /// Requests that it is sent at the same time, over all models.
    pub requests_max: u32,
    /// The server that shares: it is not to share itself.
    pub own: Option<Own>,
}

/// How a server knows itself when it meets itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// Where it listens.
    pub address: SocketAddr,
    /// What its `/version` calls it, by which it is known at other addresses.
    pub instance: String,
}

/// Longest wait for a host's addresses.
const RESOLVE_MAX: Duration = Duration::from_secs(2);

impl Own {
    /// Whether `address` can be nothing but this server. That it cannot be told counts as no.
    pub(crate) async fn is_at(&self, address: &Address) -> bool {
        let host = tokio::net::lookup_host(address.authority.as_str());
        match tokio::time::timeout(RESOLVE_MAX, host).await {
            Ok(Ok(mut found)) => found.any(|found| self.listens_at(found)),
            _ => false,
        }
    }

    fn listens_at(&self, found: SocketAddr) -> bool {
        let (own, ip) = (self.address.ip(), found.ip());
        // What listens on all addresses of one kind need not listen on those of the other.
        let among = own.is_unspecified() && own.is_ipv4() == ip.is_ipv4() && is_here(ip);
        found.port() == self.address.port() && (own == ip || among)
    }
}

/// Whether the address is one of this machine's: no other can be bound.
fn is_here(ip: IpAddr) -> bool {
    UdpSocket::bind((ip, 0)).is_ok()
}

impl ShareOptions {
    /// Shares the server at `url` as the node `name`, with the usual bounds.
    pub fn new(url: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            key: None,
            name: name.into(),
            interval: Duration::from_secs(2),
            backoff_max: Duration::from_secs(4),
            look_max: Duration::from_secs(5),
            first_byte_max: Duration::from_secs(15 * 60),
            idle_max: Duration::from_secs(5 * 60),
            requests_max: 256,
            own: None,
        }
    }
}

/// Without the key and the address.
impl fmt::Debug for ShareOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShareOptions").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A server that cannot be shared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// The address is none.
    #[error("`{url}` cannot be shared: {what}")]
    Url {
        /// As it was given.
        url: String,
        /// What is wrong with it.
        what: String,
    },
    /// It is where the server listens that is to share it.
    #[error("`{url}` is the address of this very server, which cannot share itself")]
    Itself {
        /// As it was given.
        url: String,
    },
    /// The key cannot be sent.
    #[error("the key of the shared server has characters that no header can hold")]
    Key,
    /// The node cannot be called that.
    #[error("a node cannot be called `{name}`")]
    Name {
        /// As it was given.
        name: String,
    },
    /// No client can be made.
    #[error("requests to a shared server cannot be made: {what}")]
    Client {
        /// Why.
        what: String,
    },
}

impl Hint for ShareError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Url { .. } => Some("give it as http://HOST:PORT or https://HOST, with or without /v1".into()),
            Self::Itself { .. } => {
                Some("leave it out: its own models are offered anyway; or name the other server's port".into())
            }
            Self::Key => Some("give the key as the server's owner wrote it, without line breaks".into()),
            Self::Name { .. } => {
                Some(format!("choose a name of 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_` and `.`"))
            }
            Self::Client { .. } => None,
        }
    }
}

/// The address that paths such as `/v1/models` are put behind, and what of it clients must not see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub base: String,
    pub host: String,
    /// `host:port`, also where the port is the scheme's own.
    pub authority: String,
    pub loopback: bool,
}

pub(crate) fn address(url: &str) -> Result<Address, ShareError> {
    let wrong = |what: &str| ShareError::Url { url: shown(url), what: what.into() };
    let parsed = Url::parse(url.trim()).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(parsed.scheme(), "http" | "https") {
        return Err(wrong("it has to begin with http:// or https://"));
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err(wrong("it holds a name or a password; a key is given by itself"));
    }
    if parsed.query().is_some() || parsed.fragment().is_some() {
        return Err(wrong("nothing can follow its path"));
    }
    let host = parsed.host_str().filter(|host| !host.is_empty()).ok_or_else(|| wrong("it names no host"))?.to_owned();
    let port = parsed.port_or_known_default().unwrap_or_default();
    let path = parsed.path().trim_end_matches('/');
    let path = path.strip_suffix("/v1").unwrap_or(path).trim_end_matches('/');
    let shown_port = parsed.port().map(|port| format!(":{port}")).unwrap_or_default();
    let bare = host.trim_matches(['[', ']']);
    let loopback = bare == "localhost" || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
    Ok(Address {
        base: format!("{}://{host}{shown_port}{path}", parsed.scheme()),
        authority: format!("{host}:{port}"),
        host,
        loopback,
    })
}

/// An address as an error shows it: what may be a password is left out.
pub(crate) fn shown(url: &str) -> String {
    let mut shown: String = url.chars().take(200).collect();
    if let Some((before, after)) = shown.rsplit_once('@') {
        let scheme = before.split_once("://").map(|(scheme, _)| format!("{scheme}://")).unwrap_or_default();
        shown = format!("{scheme}…@{after}");
    }
    shown
}

pub(crate) fn name(name: &str) -> Result<String, ShareError> {
    let fine = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(fine) {
        return Err(ShareError::Name { name: name.chars().take(NAME_BYTES_MAX).collect() });
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_one_form() {
        for (url, base) in [
            ("http://localhost:11434", "http://localhost:11434"),
            ("http://localhost:11434/", "http://localhost:11434"),
            (" http://localhost:11434/v1 ", "http://localhost:11434"),
            ("http://localhost:11434/v1/", "http://localhost:11434"),
            ("HTTPS://Example.com/v1", "https://example.com"),
            ("https://example.com:443", "https://example.com"),
            ("https://example.com/openai/v1", "https://example.com/openai"),
            ("http://[::1]:8000", "http://[::1]:8000"),
            ("http://example.com/v12", "http://example.com/v12"),
        ] {
            assert_eq!(address(url).unwrap().base, base, "{url}");
        }
        assert_eq!(address("https://example.com").unwrap().authority, "example.com:443");
        let loopback = |url| address(url).unwrap().loopback;
        assert!(loopback("http://127.0.0.1:1") && loopback("http://[::1]:1") && loopback("http://localhost"));
        assert!(!loopback("http://192.168.0.1:1") && !loopback("http://localhost.example.com"));
    }

    #[test]
    fn what_is_no_address_is_refused_with_a_hint() {
        for url in ["", "localhost:11434", "example.com", "ftp://example.com", "http://", "http://a?b", "http://a/#b"] {
            let error = address(url).unwrap_err();
            assert!(error.hint().unwrap().contains("http://"), "{url}: {error}");
        }
        let error = address("http://me:secret@example.com").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
        let error = address("ftp://me:secret@example.com").unwrap_err().to_string();
        assert!(!error.contains("secret"), "{error}");
    }

    #[tokio::test]
    async fn a_server_knows_its_own_addresses() {
        let own = |address: &str| Own { address: address.parse().unwrap(), instance: "a".into() };
        for (listens, url, itself) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080/v1", true),
            ("127.0.0.1:8080", "http://localhost:8080", true),
            ("127.0.0.1:80", "http://127.0.0.1", true),
            ("0.0.0.0:8080", "http://127.0.0.1:8080", true),
            ("0.0.0.0:8080", "http://127.0.0.2:8080", true),
            ("127.0.0.1:8080", "http://127.0.0.2:8080", false),
            ("127.0.0.1:8080", "http://127.0.0.1:8081", false),
            ("0.0.0.0:8080", "http://192.0.2.1:8080", false),
            ("0.0.0.0:8080", "http://[::1]:8080", false),
        ] {
            assert_eq!(own(listens).is_at(&address(url).unwrap()).await, itself, "{listens} and {url}");
        }
    }

    #[test]
    fn names_are_plain() {
        assert_eq!(name("box-1.lan").unwrap(), "box-1.lan");
        for odd in ["", "a b", "a@b", "a/b", "ä", &"a".repeat(65)] {
            assert!(name(odd).is_err(), "{odd}");
        }
    }
}
