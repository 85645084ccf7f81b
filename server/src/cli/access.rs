//! Who may use a server: what the command line, the environment and the configuration file say of it.

use std::{net::IpAddr, path::PathBuf};

use bytesize::ByteSize;
use clap::Args;
use mesh_core::Hint;
use mesh_llm::{
    body::{BODY_BYTES_MAX, DISCARD_BYTES_MAX},
    guard::{Hosts, Keys, Origins, Policy, is_readable_by_others, may_listen},
    listen::Options,
    tls::Tls,
};
use serde::{Deserialize, Deserializer, de::Error};

use super::failure::{Exit, Failure};

/// Keys with commas between them. Not a flag: those are seen by everybody on the machine.
const KEYS_VARIABLE: &str = "MESH_LLM_API_KEYS";
/// The smallest bound on bodies, in bytes.
const BODY_BYTES_MIN: u64 = 1 << 10;
/// What is said of a bound on bodies that is none.
const BODY: &str = "it has to be a number of bytes between 1KiB and 512MiB, such as 32MiB";

/// Who may use the server.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Access")]
pub struct AccessArgs {
    /// File of API keys, one of which requests have to show: one a line, `#` begins a comment, `name:` may stand before a
    /// key and is what the log shows. MESH_LLM_API_KEYS takes them too, with commas between them
    #[arg(long, value_name = "FILE", env = "MESH_LLM_API_KEY_FILE", hide_env_values = true)]
    pub api_key_file: Option<PathBuf>,
    /// Listen where other machines can reach the server, though no API key is set
    #[arg(long)]
    pub insecure: bool,
    /// Another name for this server that the `host` of requests may have, besides local ones and its address; `*` stands
    /// for all. May be repeated
    #[arg(long, value_name = "NAME", env = "MESH_LLM_ALLOW_HOST", hide_env_values = true, value_delimiter = ',')]
    pub allow_host: Vec<String>,
    /// Origin whose web pages may use this server, such as http://localhost:3000; `*` stands for all. May be repeated
    #[arg(long, value_name = "ORIGIN", env = "MESH_LLM_CORS_ORIGIN", hide_env_values = true, value_delimiter = ',')]
    pub cors_origin: Vec<String>,
    /// Serve HTTPS with these PEM certificates, the server's own first. Read again on SIGHUP
    #[arg(long, value_name = "FILE", env = "MESH_LLM_TLS_CERT", hide_env_values = true)]
    pub tls_cert: Option<PathBuf>,
    /// The private key of that certificate, as PEM
    #[arg(long, value_name = "FILE", env = "MESH_LLM_TLS_KEY", hide_env_values = true)]
    pub tls_key: Option<PathBuf>,
    /// Longest body of a request that is read [default: 16MiB]
    #[arg(long, value_name = "BYTES", env = "MESH_LLM_MAX_BODY", hide_env_values = true, value_parser = body)]
    pub max_body: Option<ByteSize>,
    /// Show /metrics without an API key
    #[arg(long)]
    pub open_metrics: bool,
    /// Have the log show what is asked and answered, up to 16 KiB of each
    #[arg(long)]
    pub log_prompts: bool,
}

/// The same in the configuration file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccessTable {
    /// File of API keys.
    pub key_file: Option<PathBuf>,
    /// Listen beyond this machine without a key.
    #[serde(default)]
    pub insecure: bool,
    /// Other names for this server.
    #[serde(default)]
    pub allow_hosts: Vec<String>,
    /// Origins whose pages may use it.
    #[serde(default)]
    pub cors_origins: Vec<String>,
    /// PEM certificates.
    pub tls_cert: Option<PathBuf>,
    /// The key of the first.
    pub tls_key: Option<PathBuf>,
    /// Longest body that is read.
    #[serde(default, deserialize_with = "body_value")]
    pub max_body: Option<ByteSize>,
    /// Show metrics to everybody.
    #[serde(default)]
    pub open_metrics: bool,
    /// Have the log show what is asked and answered.
    #[serde(default)]
    pub log_prompts: bool,
}

fn fits(bytes: ByteSize) -> Option<ByteSize> {
    (BODY_BYTES_MIN..=DISCARD_BYTES_MAX).contains(&bytes.as_u64()).then_some(bytes)
}

fn body(text: &str) -> Result<ByteSize, String> {
    text.parse::<ByteSize>().ok().and_then(fits).ok_or_else(|| BODY.into())
}

fn body_value<'de, D: Deserializer<'de>>(value: D) -> Result<Option<ByteSize>, D::Error> {
    ByteSize::deserialize(value).ok().and_then(fits).map(Some).ok_or_else(|| D::Error::custom(BODY))
}

/// What the server does with its clients. Flags and the environment go before the file; what may be repeated adds up.
pub fn options(args: &AccessArgs, table: &AccessTable, address: IpAddr) -> Result<Options, Failure> {
    let listed = std::env::var(KEYS_VARIABLE).ok().filter(|keys| !keys.trim().is_empty());
    options_with(args, table, address, listed.as_deref())
}

fn options_with(
    args: &AccessArgs,
    table: &AccessTable,
    address: IpAddr,
    listed: Option<&str>,
) -> Result<Options, Failure> {
    let usage = |error: &dyn std::fmt::Display| Failure::new(Exit::Usage, error);
    let mut keys = Keys::default();
    if let Some(path) = args.api_key_file.as_ref().or(table.key_file.as_ref()) {
        keys = Keys::read(path).map_err(|error| {
            usage(&error).hint("the file of API keys holds one a line, and comments that begin with `#`")
        })?;
        warn_if_readable(path, "API keys");
    }
    if let Some(listed) = listed {
        let listed = Keys::list(listed, KEYS_VARIABLE);
        keys = listed
            .and_then(|listed| keys.and(listed))
            .map_err(|error| usage(&error).hint("the variable holds API keys with commas between them"))?;
    }
    may_listen(address, &keys, args.insecure || table.insecure).map_err(|error| {
        usage(&error).hint(format!(
            "set keys with --api-key-file FILE or {KEYS_VARIABLE}, listen on 127.0.0.1, or say --insecure if nobody else can \
             reach {address}"
        ))
    })?;
    let both = |one: &[String], other: &[String]| [one, other].concat();
    let hosts = Hosts::parse(&both(&args.allow_host, &table.allow_hosts))
        .map_err(|error| usage(&error).hint("check --allow-host and `allow_hosts`"))?;
    let origins = Origins::parse(&both(&args.cors_origin, &table.cors_origins))
        .map_err(|error| usage(&error).hint("check --cors-origin and `cors_origins`"))?;
    if origins.is_any() && keys.is_empty() {
        tracing::warn!(
            "every page that is opened in a browser here may use this server: CORS is open, and no API key is set"
        );
    }
    let (cert, key) =
        (args.tls_cert.as_ref().or(table.tls_cert.as_ref()), args.tls_key.as_ref().or(table.tls_key.as_ref()));
    let tls = match (cert, key) {
        (Some(cert), Some(key)) => {
            warn_if_readable(key, "a private key");
            let tls = Tls::read(cert.clone(), key.clone());
            Some(tls.map_err(|error| Failure { hint: error.hint(), ..usage(&error) })?)
        }
        (None, None) => None,
        (Some(_), None) => return Err(usage(&"there is a certificate and no key").hint("give its key as --tls-key")),
        (None, Some(_)) => return Err(usage(&"there is a key and no certificate").hint("give it as --tls-cert")),
    };
    if tls.is_none() && !address.to_canonical().is_loopback() {
        tracing::warn!(
            "what is sent to {address} can be read on its way, API keys too; --tls-cert and --tls-key prevent that"
        );
    }
    Ok(Options {
        policy: Policy {
            keys,
            hosts,
            origins,
            metrics_open: args.open_metrics || table.open_metrics,
            ..Policy::default()
        },
        tls,
        body_bytes_max: args.max_body.or(table.max_body).map_or(BODY_BYTES_MAX, |bytes| bytes.as_u64()),
        log_prompts: args.log_prompts || table.log_prompts,
        ..Options::default()
    })
}

fn warn_if_readable(path: &std::path::Path, what: &str) {
    if is_readable_by_others(path) {
        let path = path.display();
        tracing::warn!("{path} holds {what} and can be read by others; `chmod 600 {path}` changes that");
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{args::Cli, config::Config};

    fn said(line: &str, file: &str, keys: Option<&str>, address: &str) -> Result<Options, Failure> {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let config: Config = toml::from_str(file).unwrap();
        options_with(&cli.serve.access, &config.access, address.parse().unwrap(), keys)
    }

    const KEY: &str = "0123456789abcdef";

    #[test]
    fn beyond_this_machine_a_key_is_asked_for() {
        let refused = said("mesh-llm", "", None, "0.0.0.0").unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        assert!(refused.message.contains("0.0.0.0") && refused.message.contains("no API key"), "{refused:?}");
        let hint = refused.hint.unwrap();
        assert!(["--api-key-file", KEYS_VARIABLE, "--insecure"].iter().all(|way| hint.contains(way)), "{hint}");
        said("mesh-llm", "", None, "127.0.0.1").unwrap();
        said("mesh-llm --insecure", "", None, "0.0.0.0").unwrap();
        said("mesh-llm", "[access]\ninsecure = true", None, "0.0.0.0").unwrap();
        assert!(!said("mesh-llm", "", Some(KEY), "0.0.0.0").unwrap().policy.keys.is_empty());
    }

    #[test]
    fn the_command_line_goes_before_the_file_and_lists_add_up() {
        let file = "[access]\nmax_body = \"1MiB\"\nallow_hosts = [\"a\"]\ncors_origins = [\"http://a\"]\nlog_prompts = true\n\
                    open_metrics = true";
        let options = said("mesh-llm", file, None, "127.0.0.1").unwrap();
        assert_eq!((options.body_bytes_max, options.log_prompts, options.policy.metrics_open), (1 << 20, true, true));
        let line = "mesh-llm --max-body 2MiB --allow-host b --cors-origin http://b";
        let options = said(line, file, None, "127.0.0.1").unwrap();
        let strings = |names: [&str; 2]| names.map(String::from);
        assert_eq!(options.body_bytes_max, 2 << 20);
        assert_eq!(options.policy.hosts, Hosts::parse(&strings(["a", "b"])).unwrap());
        assert_eq!(options.policy.origins, Origins::parse(&strings(["http://b", "http://a"])).unwrap());
        let none = said("mesh-llm", "", None, "127.0.0.1").unwrap();
        assert_eq!((none.body_bytes_max, none.log_prompts, none.policy.metrics_open), (BODY_BYTES_MAX, false, false));
    }

    #[test]
    fn mistakes_are_answered_with_a_way_out() {
        for (line, file, keys, message) in [
            ("mesh-llm --api-key-file no/such/keys", "", None, "no/such/keys: "),
            ("mesh-llm", "[access]\nkey_file = \"no/such/keys\"", None, "no/such/keys: "),
            ("mesh-llm", "", Some("a b"), "MESH_LLM_API_KEYS, key 1: "),
            ("mesh-llm --allow-host http://a", "", None, "`http://a` is not the name of a host"),
            ("mesh-llm --cors-origin a", "", None, "`a` is not an origin"),
            ("mesh-llm --tls-cert a.pem", "", None, "there is a certificate and no key"),
            ("mesh-llm", "[access]\ntls_key = \"a.pem\"", None, "there is a key and no certificate"),
            ("mesh-llm --tls-cert no/a.pem --tls-key no/b.pem", "", None, "no/a.pem: "),
        ] {
            let failure = said(line, file, keys, "127.0.0.1").unwrap_err();
            assert!(failure.message.starts_with(message), "{line} {file}: {failure:?}");
            assert!(failure.exit == Exit::Usage && failure.hint.is_some(), "{failure:?}");
        }
        for size in ["0", "1023", "513MiB", "lots", "-1"] {
            assert!(Cli::try_parse_from(["mesh-llm", &format!("--max-body={size}")]).is_err(), "{size}");
            assert!(toml::from_str::<Config>(&format!("[access]\nmax_body = {size:?}")).is_err(), "{size}");
        }
    }
}
