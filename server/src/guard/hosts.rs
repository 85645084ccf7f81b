//! The names under which a server may be reached. A page of the web can have its own name resolve to this machine (DNS
//! rebinding), and then it is the `Host` header alone that tells it from the user's programs.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
};

use warp::http::uri::Authority;

/// Most names.
pub const HOSTS_MAX: usize = 256;

/// Names besides the machine's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    any: bool,
    names: BTreeSet<String>,
}

/// A name that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// It is something else.
    #[error("`{0}` is not the name of a host: it has to be a name or an address without scheme, port and path, or `*`")]
    Malformed(String),
    /// There are too many.
    #[error("there are more than {HOSTS_MAX} names of hosts")]
    TooMany,
}

impl Hosts {
    /// Reads names; `*` stands for all.
    pub fn parse(names: &[String]) -> Result<Self, HostError> {
        if names.len() > HOSTS_MAX {
            return Err(HostError::TooMany);
        }
        let mut hosts = Self::default();
        for name in names {
            if name == "*" {
                hosts.any = true;
                continue;
            }
            let malformed = || HostError::Malformed(name.chars().take(200).collect());
            // An address of version 6 may be given with and without its brackets.
            let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
            let (host, port) = match address {
                Some(address) => (address.to_string(), None),
                None => parse(name).ok_or_else(malformed)?,
            };
            if port.is_some() || host.contains('*') {
                return Err(malformed());
            }
            hosts.names.insert(host);
        }
        Ok(hosts)
    }

    /// Whether a server that listens on `bound` may be called `host`.
    pub(super) fn admits(&self, host: &str, bound: IpAddr) -> bool {
        if self.any || host == "localhost" || self.names.contains(host) {
            return true;
        }
        // Nobody's name server has a say in an address: where all of the machine's are listened on, any will do.
        let own = |address: IpAddr| address.is_loopback() || bound.is_unspecified() || address == bound.to_canonical();
        host.parse::<IpAddr>().is_ok_and(|address| own(address.to_canonical()))
    }
}

/// Host and port of an authority: the host in lower case, an address in its usual form and without brackets.
pub(super) fn parse(authority: &str) -> Option<(String, Option<u16>)> {
    let parsed: Authority = authority.parse().ok()?;
    let host = parsed.host();
    let port = match authority.strip_prefix(host)?.strip_prefix(':') {
        Some(port) => Some(port.parse().ok()?),
        None if authority.len() == host.len() => None,
        None => return None,
    };
    let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(&name);
    if bare.is_empty() {
        return None;
    }
    Some((bare.parse::<IpAddr>().map_or_else(|_| bare.to_owned(), |address| address.to_string()), port))
}

/// The address to assume where it is not known.
pub(super) const UNKNOWN: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(names: &[&str], bound: &str, host: &str) -> bool {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let hosts = Hosts::parse(&names).unwrap();
        parse(host).is_some_and(|(host, _)| hosts.admits(&host, bound.parse().unwrap()))
    }

    #[test]
    fn a_server_is_known_by_local_names_its_address_and_names_it_was_given() {
        for (names, bound, host, want) in [
            (&[][..], "127.0.0.1", "localhost", true),
            (&[], "127.0.0.1", "LocalHost:9337", true),
            (&[], "127.0.0.1", "localhost.", true),
            (&[], "127.0.0.1", "127.0.0.1:1", true),
            (&[], "127.0.0.1", "127.8.9.1", true),
            (&[], "127.0.0.1", "[::1]:9337", true),
            (&[], "127.0.0.1", "[::ffff:127.0.0.1]", true),
            (&[], "127.0.0.1", "evil.example", false),
            (&[], "127.0.0.1", "evil.example:9337", false),
            (&[], "127.0.0.1", "localhost.evil.example", false),
            (&[], "127.0.0.1", "127.0.0.1.evil.example", false),
            (&[], "127.0.0.1", "evil@localhost", false),
            (&[], "127.0.0.1", "localhost:99999", false),
            (&[], "127.0.0.1", "", false),
            (&[], "127.0.0.1", ":80", false),
            (&[], "127.0.0.1", "192.168.1.5", false),
            (&[], "127.0.0.1", "0.0.0.0", false),
            (&[], "192.168.1.5", "192.168.1.5:9337", true),
            (&[], "192.168.1.5", "192.168.1.6", false),
            (&[], "0.0.0.0", "192.168.1.6", true),
            (&[], "::", "[fd00::1]:80", true),
            (&[], "0.0.0.0", "box.lan", false),
            (&["box.lan"], "127.0.0.1", "BOX.lan:80", true),
            (&["Box.Lan"], "127.0.0.1", "box.lan.", true),
            (&["box.lan"], "127.0.0.1", "a.box.lan", false),
            (&["10.0.0.1", "fd00::1"], "127.0.0.1", "[fd00:0::1]", true),
            (&["*"], "127.0.0.1", "evil.example", true),
        ] {
            assert_eq!(admits(names, bound, host), want, "{host:?} at {bound} with {names:?}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for name in ["", "http://box", "box:80", "box/", "*.box", "a b", "u@box"] {
            let refused = Hosts::parse(&[name.to_owned()]);
            assert_eq!(refused, Err(HostError::Malformed(name.into())), "{name:?}");
        }
        assert_eq!(Hosts::parse(&vec!["a".to_owned(); 257]), Err(HostError::TooMany));
    }
}
