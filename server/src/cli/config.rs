//! The configuration file.

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    net::IpAddr,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use mesh_llm::defaults::{Manner, ReasoningField};
use mesh_models::catalog::{self, Entry};
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

use super::{
    access::AccessTable,
    failure::{Exit, Failure},
    mesh::{MeshTable, ShareTable},
};

/// Longest configuration file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What the file can say. The command line goes first.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The model to serve.
    pub model: Option<String>,
    /// The backend that has to serve it, or `auto` for the best one, experimental ones included.
    pub backend: Option<String>,
    /// Context length in tokens.
    pub ctx: Option<u32>,
    /// Requests computed at the same time for a model.
    pub max_parallel: Option<u32>,
    /// Requests that may wait for those.
    pub max_queue: Option<u32>,
    /// More models, loaded when they are asked for. The first is the default where no other is named.
    #[serde(default)]
    pub models: Vec<ModelTable>,
    /// Memory that models may hold together.
    #[serde(default, deserialize_with = "memory")]
    pub memory: Option<ByteSize>,
    /// Seconds after which models that nobody uses are unloaded.
    pub idle_ttl_s: Option<u64>,
    /// Address to listen on.
    pub host: Option<IpAddr>,
    /// Port to listen on.
    pub port: Option<u16>,
    /// Download nothing.
    pub offline: Option<bool>,
    /// Directory for mirrored and imported models.
    pub cache: Option<PathBuf>,
    /// More models that have names.
    #[serde(default)]
    pub catalog: Vec<Entry>,
    /// Who may use the server.
    #[serde(default)]
    pub access: AccessTable,
    /// How this machine takes part in a mesh.
    #[serde(default)]
    pub mesh: MeshTable,
    /// Servers whose models are offered beside those of this one.
    #[serde(default)]
    pub share: Vec<ShareTable>,
    /// How models are presented to clients.
    #[serde(default)]
    pub api: ApiTable,
    /// Settings of backends, by id.
    #[serde(default)]
    pub backends: BTreeMap<String, Value>,
}

/// How models are presented to clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiTable {
    /// The field that holds reasoning: `reasoning_content`, `reasoning` or `both`.
    #[serde(default)]
    pub reasoning_field: ReasoningField,
    /// Whether a model's `generation_config.json` counts where a request does not say; true if absent.
    pub generation_config: Option<bool>,
}

impl ApiTable {
    /// The same with what is absent filled in.
    pub fn manner(&self) -> Manner {
        let Self { reasoning_field, generation_config } = *self;
        Manner { reasoning_field, generation_config: generation_config.unwrap_or(true) }
    }
}

/// One of several models.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelTable {
    /// The model.
    pub model: String,
    /// A name to ask for it by, instead of its own.
    pub name: Option<String>,
    /// The backend that has to serve it, or `auto`; the file's own if absent.
    pub backend: Option<String>,
    /// Context length in tokens; the file's own if absent.
    pub ctx: Option<u32>,
    /// Memory it shall have, if not what it needs for itself.
    #[serde(default, deserialize_with = "memory")]
    pub memory: Option<ByteSize>,
    /// Load it at the start, and keep it in memory whatever comes.
    #[serde(default)]
    pub pin: bool,
}

fn memory<'de, D: Deserializer<'de>>(value: D) -> Result<Option<ByteSize>, D::Error> {
    // The crate's own words would not say what is expected.
    match ByteSize::deserialize(value) {
        Ok(bytes) if bytes.as_u64() > 0 => Ok(Some(bytes)),
        _ => Err(D::Error::custom(super::args::MEMORY)),
    }
}

impl Config {
    /// Reads `given`, or else the file at its usual place if there is one.
    pub fn read(given: Option<&Path>) -> Result<Self, Failure> {
        let usual = || dirs::config_dir().map(|dir| dir.join("mesh-llm").join("config.toml"));
        let Some(path) = given.map(Path::to_owned).or_else(usual) else { return Ok(Self::default()) };
        let failure = |what: String| Failure::new(Exit::Usage, format!("{}: {what}", path.display()));
        let long = |path| fs::metadata(path).is_ok_and(|metadata: fs::Metadata| metadata.len() > FILE_BYTES_MAX);
        if long(&path) {
            return Err(failure(format!("the file is larger than {FILE_BYTES_MAX} bytes")));
        }
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).map_err(failure),
            Err(error) if error.kind() == ErrorKind::NotFound && given.is_none() => Ok(Self::default()),
            Err(error) => Err(failure(error.to_string()).hint("check the path given as --config")),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        if config.ctx == Some(0) || config.models.iter().any(|table| table.ctx == Some(0)) {
            return Err("`ctx` has to be 1 or more".into());
        }
        if config.max_parallel == Some(0) {
            return Err("`max_parallel` has to be 1 or more".into());
        }
        if config.idle_ttl_s == Some(0) {
            return Err("`idle_ttl_s` has to be 1 or more".into());
        }
        catalog::check(&config.catalog)?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_file_is_read() {
        let config = Config::parse(
            r#"
            model = "Qwen3-4B-MLX"
            backend = "auto"
            ctx = 8192
            max_parallel = 8
            max_queue = 0
            host = "0.0.0.0"
            port = 8080
            offline = true
            cache = "models"
            memory = "8GiB"
            idle_ttl_s = 600
            [[models]]
            model = "Qwen3-0.6B-MLX"
            name = "small"
            backend = "mlx"
            ctx = 4096
            memory = 2147483648
            pin = true
            [[catalog]]
            name = "Mine"
            about = "my own"
            repo = "org/mine"
            format = "safetensors"
            [access]
            key_file = "keys"
            insecure = false
            allow_hosts = ["box.lan"]
            cors_origins = ["http://localhost:3000"]
            tls_cert = "cert.pem"
            tls_key = "key.pem"
            max_body = "32MiB"
            open_metrics = true
            log_prompts = false
            [api]
            reasoning_field = "both"
            generation_config = false
            [mesh]
            take_part = false
            node_name = "tower"
            host = "10.0.0.1"
            port = 4000
            mdns = false
            relays = ["https://relay.example.org"]
            policy = { prefer = "fastest", cold = "local_first", affinity = 0.5 }
            [[share]]
            url = "http://127.0.0.1:11434"
            name = "ollama"
            key_file = "key"
            [backends.llama-server]
            args = ["--threads", "2"]
            "#,
        )
        .unwrap();
        assert_eq!(config.backend.as_deref(), Some("auto"));
        assert_eq!((config.max_parallel, config.max_queue), (Some(8), Some(0)));
        assert_eq!((config.access.max_body, config.access.open_metrics), (Some(ByteSize::mib(32)), true));
        assert_eq!(config.backends["llama-server"]["args"][1], "2");
        assert_eq!((config.mesh.port, config.mesh.mdns, config.mesh.relays.len()), (Some(4000), Some(false), 1));
        assert_eq!(config.mesh.policy.affinity, 0.5);
        assert_eq!((config.memory, config.idle_ttl_s), (Some(ByteSize::gib(8)), Some(600)));
        let manner = Manner { reasoning_field: ReasoningField::Both, generation_config: false };
        assert_eq!((config.api.manner(), ApiTable::default().manner()), (manner, Manner::default()));
        assert_eq!((config.catalog.len(), config.catalog[0].name.as_str()), (1, "Mine"));
        assert_eq!(config.models[0].memory, Some(ByteSize::gib(2)));
        assert!(config.models[0].pin && config.models[0].name.as_deref() == Some("small"));
    }

    #[test]
    fn mistakes_are_shown_where_they_are() {
        insta::assert_snapshot!(Config::parse("modle = \"x\"").unwrap_err());
        insta::assert_snapshot!(Config::parse("port = \"x\"").unwrap_err());
        insta::assert_snapshot!(Config::parse("ctx = 0").unwrap_err());
        insta::assert_snapshot!(Config::parse("memory = \"lots\"").unwrap_err());
        insta::assert_snapshot!(Config::parse("[[models]]\nmodle = \"x\"").unwrap_err());
        let entry = "[[catalog]]\nname = \"a/b\"\nabout = \"\"\nrepo = \"o/r\"\nformat = \"safetensors\"";
        insta::assert_snapshot!(Config::parse(entry).unwrap_err());
    }

    #[test]
    fn a_file_that_was_named_has_to_be_there() {
        let failure = Config::read(Some(Path::new("no/such/config.toml"))).unwrap_err();
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.message.starts_with("no/such/config.toml: "), "{failure:?}");
    }
}
