//! Who may ask: decided from a request's head alone, before anything else looks at it.
//!
//! A server on this machine is reached by more than the user's programs: by pages of the web in the user's browser, and, if it
//! listens beyond the loopback address, by other machines. Names, origins and keys tell them apart.

mod hosts;
mod keys;
mod origins;

use std::net::IpAddr;

use warp::http::{
    HeaderName, HeaderValue, Method, Request,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
        ACCESS_CONTROL_REQUEST_METHOD, HOST, ORIGIN, VARY,
    },
};

pub use hosts::{HOSTS_MAX, HostError, Hosts};
pub use keys::{KEY_BYTES_MAX, KEYS_MAX, KeyError, KeyName, Keys, is_readable_by_others};
pub use origins::{ORIGINS_MAX, OriginError, Origins};

use crate::error::ApiError;
use keys::Stranger;
use origins::Origin;

/// Most bytes of header names that a page may ask to send.
const ASKED_HEADERS_BYTES_MAX: usize = 2048;

/// The path of the metrics.
pub const METRICS_PATH: &str = "/metrics";

/// Who may ask for what.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Keys, one of which has to be shown; none where there are none.
    pub keys: Keys,
    /// Names the server may be called by, besides local ones and its address.
    pub hosts: Hosts,
    /// Pages of other servers that may use this one.
    pub origins: Origins,
    /// Whether metrics are for everybody.
    pub metrics_open: bool,
    /// The address that is listened on.
    pub bound: IpAddr,
}

impl Default for Policy {
    /// No keys, local names, and no pages but its own.
    fn default() -> Self {
        Self {
            keys: Keys::default(),
            hosts: Hosts::default(),
            origins: Origins::default(),
            metrics_open: false,
            bound: hosts::UNKNOWN,
        }
    }
}

/// What becomes of a request.
#[derive(Debug)]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// Whose key it came with.
    pub key: Option<KeyName>,
    /// For the answer, whatever that is: what the browser has to know.
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// What happens to a request.
#[derive(Debug)]
pub enum Verdict {
    /// It goes on.
    Allow,
    /// It is a browser's question whether it would; the headers answer it.
    Preflight,
    /// It does not.
    Refuse(Box<ApiError>),
}

/// An address that others can reach, and nothing that would keep them out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} can be reached by other machines, and no API key is set: anybody could use this server")]
pub struct Exposed(pub IpAddr);

/// Whether a server may listen on `address`.
pub fn may_listen(address: IpAddr, keys: &Keys, insecure: bool) -> Result<(), Exposed> {
    if address.to_canonical().is_loopback() || !keys.is_empty() || insecure { Ok(()) } else { Err(Exposed(address)) }
}

/// Decides on a request.
pub fn decide<B>(request: &Request<B>, policy: &Policy) -> Decision {
    let mut decision = Decision { verdict: Verdict::Allow, key: None, headers: Vec::new() };
    decision.verdict = match judge(request, policy, &mut decision) {
        Ok(verdict) => verdict,
        Err(error) => Verdict::Refuse(Box::new(error)),
    };
    decision
}

fn judge<B>(request: &Request<B>, policy: &Policy, decision: &mut Decision) -> Result<Verdict, ApiError> {
    let (host, port) = called(request, policy)?;
    if let Some(origin) = request.headers().get(ORIGIN) {
        let parsed = origin.to_str().ok().and_then(Origin::parse);
        let own = parsed.as_ref().is_some_and(|origin| origin.is_at(&host, port));
        let admitted = policy.origins.admits(parsed.as_ref());
        if admitted {
            decision.headers = admission(origin, policy.origins.any);
        }
        if !own && request.method() == Method::OPTIONS && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD)
        {
            if !admitted {
                return Err(ApiError::foreign_page(&lossy(origin)));
            }
            decision.headers.extend(preflight(request));
            return Ok(Verdict::Preflight);
        }
        // A page may send to anybody; what it may not, unless it is told so, is read the answer.
        let harmless = [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
        if !own && !admitted && !harmless {
            return Err(ApiError::foreign_page(&lossy(origin)));
        }
    } else if !policy.origins.any && !policy.origins.is_empty() {
        decision.headers.push((VARY, HeaderValue::from_static("origin")));
    }
    if policy.keys.is_empty() {
        return Ok(Verdict::Allow);
    }
    match policy.keys.of_request(request.headers()) {
        Ok(name) => decision.key = Some(name),
        Err(_) if is_open(request, policy) => {}
        Err(Stranger::Nobody) => return Err(ApiError::no_key()),
        Err(Stranger::Unknown) => return Err(ApiError::unknown_key()),
    }
    Ok(Verdict::Allow)
}

/// What the client calls this server: host and port.
fn called<B>(request: &Request<B>, policy: &Policy) -> Result<(String, Option<u16>), ApiError> {
    let mut given = request.headers().get_all(HOST).iter();
    let header = match (given.next(), given.next()) {
        (_, Some(_)) => return Err(ApiError::bad_host("more than one `host` header")),
        (header, None) => {
            header.map(|header| header.to_str().map_err(|_| ApiError::bad_host("an unreadable `host` header")))
        }
    };
    // HTTP/2 has the name beside the path, and HTTP/1 may have it there too.
    let names = [request.uri().authority().map(|authority| Ok(authority.as_str())), header];
    let mut called = None;
    for name in names.into_iter().flatten() {
        let name = name?;
        let parsed = hosts::parse(name).ok_or_else(|| ApiError::bad_host("a `host` header that names no host"))?;
        if !policy.hosts.admits(&parsed.0, policy.bound) {
            return Err(ApiError::foreign_host(&parsed.0));
        }
        called.get_or_insert(parsed);
    }
    called.ok_or_else(|| ApiError::bad_host("no `host` header"))
}

/// What everybody may see: that the server is there, and the page, which asks for a key itself.
fn is_open<B>(request: &Request<B>, policy: &Policy) -> bool {
    let reads = [Method::GET, Method::HEAD].contains(request.method());
    let path = request.uri().path();
    let open = matches!(path, "/" | "/health" | "/livez" | "/readyz" | "/version") || path.starts_with("/ui/");
    reads && (open || (policy.metrics_open && path == METRICS_PATH))
}

fn admission(origin: &HeaderValue, any: bool) -> Vec<(HeaderName, HeaderValue)> {
    let exposed = HeaderValue::from_static("x-request-id, retry-after");
    let mut headers = vec![(ACCESS_CONTROL_EXPOSE_HEADERS, exposed)];
    if any {
        headers.push((ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*")));
    } else {
        headers.push((ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone()));
        headers.push((VARY, HeaderValue::from_static("origin")));
    }
    headers
}

fn preflight<B>(request: &Request<B>) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers = vec![
        (ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, HEAD, POST, DELETE")),
        (ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600")),
    ];
    // Clients send headers of their own, whose names nobody can list, and `*` would not stand for `authorization`.
    let asked = request.headers().get(ACCESS_CONTROL_REQUEST_HEADERS);
    let names = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_, ".contains(byte);
    if let Some(asked) =
        asked.filter(|asked| asked.len() <= ASKED_HEADERS_BYTES_MAX && asked.as_bytes().iter().all(names))
    {
        headers.push((ACCESS_CONTROL_ALLOW_HEADERS, asked.clone()));
    }
    if request.headers().contains_key("access-control-request-private-network") {
        headers
            .push((HeaderName::from_static("access-control-allow-private-network"), HeaderValue::from_static("true")));
    }
    headers
}

fn lossy(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn policy(keys: &str, origins: &[&str]) -> Policy {
        let keys = if keys.is_empty() { Keys::default() } else { Keys::list(keys, "LIST").unwrap() };
        Policy { keys, origins: Origins::parse(&names(origins)).unwrap(), ..Policy::default() }
    }

    /// The verdict in a word, or the status and code of the refusal.
    fn verdict(policy: &Policy, method: &str, path: &str, headers: &[(&str, &str)]) -> String {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        match decide(&request.body(()).unwrap(), policy).verdict {
            Verdict::Allow => "allow".into(),
            Verdict::Preflight => "preflight".into(),
            Verdict::Refuse(error) => {
                format!("{} {}", error.status().as_u16(), error.body().error.code.unwrap_or_default())
            }
        }
    }

    const LOCAL: (&str, &str) = ("host", "localhost:9337");

    #[test]
    fn names_are_checked_before_anything_else() {
        let open = policy("", &[]);
        for (path, headers, want) in [
            ("/livez", &[LOCAL][..], "allow"),
            ("/livez", &[], "400 bad_host"),
            ("/livez", &[("host", "")], "400 bad_host"),
            ("/livez", &[LOCAL, LOCAL], "400 bad_host"),
            ("/livez", &[("host", "evil.example")], "403 host_not_allowed"),
            // The name beside the path is checked as well, whatever the header says.
            ("http://localhost/livez", &[], "allow"),
            ("http://evil.example/livez", &[LOCAL], "403 host_not_allowed"),
            ("http://localhost/livez", &[("host", "evil.example")], "403 host_not_allowed"),
        ] {
            assert_eq!(verdict(&open, "GET", path, headers), want, "{path} {headers:?}");
        }
    }

    #[test]
    fn keys_open_everything_and_no_key_what_everybody_may_see() {
        let keyed = policy("ci:0123456789abcdef", &[]);
        let key = ("authorization", "Bearer 0123456789abcdef");
        let wrong = ("x-api-key", "0123456789abcdee");
        for (method, path, more, want) in [
            ("POST", "/v1/chat/completions", None, "401 missing_api_key"),
            ("POST", "/v1/chat/completions", Some(wrong), "401 invalid_api_key"),
            ("POST", "/v1/chat/completions", Some(key), "allow"),
            ("GET", "/v1/models", None, "401 missing_api_key"),
            ("GET", "/metrics", None, "401 missing_api_key"),
            ("GET", "/metrics", Some(key), "allow"),
            ("GET", "/nothing", None, "401 missing_api_key"),
            ("GET", "/openapi.json", None, "401 missing_api_key"),
            ("OPTIONS", "/v1/models", None, "401 missing_api_key"),
            ("GET", "/health", None, "allow"),
            ("HEAD", "/livez", None, "allow"),
            ("GET", "/readyz", Some(wrong), "allow"),
            ("GET", "/version", None, "allow"),
            ("GET", "/", None, "allow"),
            ("GET", "/ui/page.js", None, "allow"),
            ("GET", "/ui", None, "401 missing_api_key"),
            ("POST", "/", None, "401 missing_api_key"),
            ("GET", "/health/", None, "401 missing_api_key"),
            ("GET", "//health", None, "401 missing_api_key"),
            ("GET", "/HEALTH", None, "401 missing_api_key"),
        ] {
            let headers: Vec<_> = [Some(LOCAL), more].into_iter().flatten().collect();
            assert_eq!(verdict(&keyed, method, path, &headers), want, "{method} {path} {more:?}");
        }
        let open = Policy { metrics_open: true, ..keyed };
        assert_eq!(verdict(&open, "GET", "/metrics", &[LOCAL]), "allow");
        assert_eq!(verdict(&policy("", &[]), "POST", "/v1/chat/completions", &[LOCAL, wrong]), "allow", "keys are off");
    }

    #[test]
    fn pages_of_other_servers_do_nothing_unless_they_are_named() {
        let page = ("origin", "https://app.example");
        let ask = ("access-control-request-method", "POST");
        let (none, one, any) = (policy("", &[]), policy("", &["https://app.example"]), policy("", &["*"]));
        for (policy, method, headers, want) in [
            (&none, "POST", &[LOCAL, page][..], "403 origin_not_allowed"),
            (&none, "DELETE", &[LOCAL, page], "403 origin_not_allowed"),
            (&none, "GET", &[LOCAL, page], "allow"),
            (&none, "OPTIONS", &[LOCAL, page, ask], "403 origin_not_allowed"),
            (&none, "POST", &[LOCAL, ("origin", "null")], "403 origin_not_allowed"),
            (&none, "POST", &[LOCAL, ("origin", "http://localhost:3000")], "403 origin_not_allowed"),
            (&none, "POST", &[LOCAL, ("origin", "http://localhost:9337")], "allow"),
            (&none, "POST", &[LOCAL, ("origin", "https://localhost:9337")], "allow"),
            (&none, "POST", &[("host", "localhost"), ("origin", "http://localhost")], "allow"),
            (&none, "POST", &[LOCAL], "allow"),
            (&one, "POST", &[LOCAL, page], "allow"),
            (&one, "OPTIONS", &[LOCAL, page, ask], "preflight"),
            (&one, "OPTIONS", &[LOCAL, page], "allow"),
            (&one, "OPTIONS", &[LOCAL, ("origin", "https://other.example"), ask], "403 origin_not_allowed"),
            (&any, "POST", &[LOCAL, ("origin", "null")], "allow"),
            (&any, "OPTIONS", &[LOCAL, ("origin", "https://other.example"), ask], "preflight"),
        ] {
            assert_eq!(verdict(policy, method, "/v1/chat/completions", headers), want, "{method} {headers:?}");
        }
        // Browsers send no key along with the question.
        let keyed = policy("0123456789abcdef", &["https://app.example"]);
        assert_eq!(verdict(&keyed, "OPTIONS", "/v1/models", &[LOCAL, page, ask]), "preflight");
        assert_eq!(verdict(&keyed, "POST", "/v1/models", &[LOCAL, page]), "401 missing_api_key");
    }

    #[test]
    fn nothing_is_said_of_origins_unless_some_are_named() {
        let said = |policy: &Policy, origin: Option<&str>| {
            let mut request = Request::builder().uri("/livez").header("host", "localhost");
            request = origin.into_iter().fold(request, |request, origin| request.header("origin", origin));
            let mut headers = decide(&request.body(()).unwrap(), policy).headers;
            headers.sort_by_key(|(name, _)| name.to_string());
            let said = headers.iter().filter(|(name, _)| *name != ACCESS_CONTROL_EXPOSE_HEADERS);
            said.map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect::<Vec<_>>().join("; ")
        };
        let one = policy("", &["https://app.example"]);
        assert_eq!(said(&policy("", &[]), Some("https://app.example")), "");
        assert_eq!(
            said(&one, Some("https://app.example")),
            "access-control-allow-origin: https://app.example; vary: origin"
        );
        assert_eq!(said(&one, None), "vary: origin");
        assert_eq!(said(&policy("", &["*"]), Some("null")), "access-control-allow-origin: *");
    }

    #[test]
    fn beyond_loopback_there_has_to_be_a_key() {
        let keys = Keys::list("0123456789abcdef", "LIST").unwrap();
        for (address, keys, insecure, want) in [
            ("127.0.0.1", &Keys::default(), false, true),
            ("127.0.0.9", &Keys::default(), false, true),
            ("::1", &Keys::default(), false, true),
            ("0.0.0.0", &Keys::default(), false, false),
            ("::", &Keys::default(), false, false),
            ("192.168.1.5", &Keys::default(), false, false),
            ("0.0.0.0", &Keys::default(), true, true),
            ("0.0.0.0", &keys, false, true),
        ] {
            assert_eq!(may_listen(address.parse().unwrap(), keys, insecure).is_ok(), want, "{address} {insecure}");
        }
    }
}
