//! Other machines: what the command line and the configuration file say of them.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;
use mesh_backend_mesh::{Home, Mesh, Options, PORT, Policy, RelayUrl, Ticket};
use mesh_backend_openai::{Own, ShareOptions, Shared};
use mesh_core::{Hint, node::Elsewhere};
use mesh_llm::{hosting::Hosting, listen, slots::Slots};
use serde::Deserialize;

use super::{
    failure::{Exit, Failure},
    output::Output,
};

/// How this machine takes part in a mesh.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Mesh")]
pub struct MeshArgs {
    /// Join the mesh that this ticket of `mesh-llm mesh invite` is for. Once joined, a server takes part whenever it runs
    #[arg(long, value_name = "TICKET", env = "MESH_LLM_JOIN", hide_env_values = true, conflicts_with = "no_mesh")]
    pub join: Option<Ticket>,
    /// Take part in no mesh this time
    #[arg(long)]
    pub no_mesh: bool,
    /// What this machine is called in the mesh [default: its host name]
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub node_name: Option<String>,
    /// Address for other machines of the mesh to connect to [default: 0.0.0.0]
    #[arg(long, value_name = "ADDRESS")]
    pub mesh_host: Option<IpAddr>,
    /// UDP port for them; 0 takes any free one [default: 9338]
    #[arg(long, value_name = "PORT")]
    pub mesh_port: Option<u16>,
    /// Neither look for members on local networks nor be found there
    #[arg(long)]
    pub no_mdns: bool,
    /// Relay for machines that do not reach one another; none is used unless it is named. May be repeated
    #[arg(long, value_name = "URL")]
    pub relay: Vec<RelayUrl>,
    /// Offer the models of a server that speaks OpenAI's API beside those of this one: vLLM, Ollama, LM Studio. May be
    /// repeated. Where no model is named, this server has none of its own then. MESH_LLM_SHARE_KEY is the key it asks for
    #[arg(long, value_name = "URL")]
    pub share: Vec<String>,
}

/// A server whose models are offered, in the configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareTable {
    /// Where it is.
    pub url: String,
    /// What it is called; `share` if absent.
    pub name: Option<String>,
    /// The file that holds the key it asks for.
    pub key_file: Option<PathBuf>,
}

/// Longest file of a key, in bytes.
const KEY_BYTES_MAX: u64 = 4 << 10;
const SHARE_KEY: &str = "MESH_LLM_SHARE_KEY";

/// The same in the configuration file.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeshTable {
    /// Whether a server takes part in the mesh that this machine is in; true if absent.
    pub take_part: Option<bool>,
    /// What this machine is called.
    pub node_name: Option<String>,
    /// Address for other machines to connect to.
    pub host: Option<IpAddr>,
    /// UDP port for them.
    pub port: Option<u16>,
    /// Whether members are looked for on local networks; true if absent.
    pub mdns: Option<bool>,
    /// Relays.
    #[serde(default)]
    pub relays: Vec<RelayUrl>,
    /// How it is decided which machine a request goes to.
    #[serde(default)]
    pub policy: Policy,
}

/// Bytes that a node's name may have.
const NAME_BYTES_MAX: usize = 64;

/// `@` stands between a model's name and a node's.
fn name(text: &str) -> Result<String, String> {
    match text.len() {
        1..=NAME_BYTES_MAX if !text.contains(|c: char| c == '@' || c.is_control() || c.is_whitespace()) => {
            Ok(text.into())
        }
        _ => Err(format!("it has to be a word of at most {NAME_BYTES_MAX} bytes, without `@`")),
    }
}

/// The machine's own name, as far as it is one.
fn host_name() -> String {
    let own = sysinfo::System::host_name().unwrap_or_default();
    let own = own.split('.').next().unwrap_or_default();
    name(own).unwrap_or_else(|_| "node".into())
}

/// Joins, where that is asked for or was done before.
pub async fn mesh(args: &MeshArgs, table: &MeshTable) -> Result<Option<Arc<Mesh>>, Failure> {
    let home = Home::usual().map_err(|error| failure(&error))?;
    let taking_part = !args.no_mesh && (args.join.is_some() || table.take_part.unwrap_or(true));
    let member = home.membership().map_err(|error| failure(&error))?.is_some();
    if !taking_part || (args.join.is_none() && !member) {
        return Ok(None);
    }
    let named = table.node_name.as_deref().map(name).transpose();
    let named = named.map_err(|error| Failure::new(Exit::Usage, format!("`node_name` of [mesh]: {error}")))?;
    let host = args.mesh_host.or(table.host).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let options = Options {
        home,
        name: args.node_name.clone().or(named).unwrap_or_else(host_name),
        listen: SocketAddr::new(host, args.mesh_port.or(table.port).unwrap_or(PORT)),
        mdns: !args.no_mdns && table.mdns.unwrap_or(true),
        relays: if args.relay.is_empty() { table.relays.clone() } else { args.relay.clone() },
        policy: table.policy.clone(),
    };
    Mesh::start(options, args.join.as_ref()).await.map(Some).map_err(|error| failure(&error))
}

/// The servers beside this one, which listens there; those of the command line first.
pub async fn shared(
    args: &MeshArgs,
    tables: &[ShareTable],
    listening: SocketAddr,
) -> Result<Vec<Arc<dyn Elsewhere>>, Failure> {
    let named = args.share.iter().map(|url| ShareTable { url: url.clone(), name: None, key_file: None });
    let mut shared: Vec<Arc<dyn Elsewhere>> = Vec::new();
    for ShareTable { url, name, key_file } in named.chain(tables.iter().cloned()) {
        let name = name.unwrap_or_else(|| match shared.len() {
            0 => "share".into(),
            before => format!("share-{}", before + 1),
        });
        let key = match key_file {
            Some(file) => Some(key_of(&file)?),
            None => std::env::var(SHARE_KEY).ok().filter(|key| !key.is_empty()),
        };
        let own = Some(Own { address: listening, instance: listen::instance().to_owned() });
        let started = Shared::start(ShareOptions { key, own, ..ShareOptions::new(url, name) }).await;
        shared.push(started.map_err(|error| failure(&error))?);
    }
    Ok(shared)
}

fn key_of(file: &Path) -> Result<String, Failure> {
    let failed = |what: String| Failure::new(Exit::Usage, format!("{}: {what}", file.display()));
    let length = fs::metadata(file).map_err(|error| failed(error.to_string()))?.len();
    if length > KEY_BYTES_MAX {
        return Err(failed(format!("a key has {KEY_BYTES_MAX} bytes at most")));
    }
    let key = fs::read_to_string(file).map_err(|error| failed(error.to_string()))?;
    Ok(key.trim().to_owned())
}

/// What others serve, and what this server serves for them.
#[derive(Default)]
pub struct Others {
    /// The mesh that it takes part in.
    pub mesh: Option<Arc<Mesh>>,
    /// Servers beside this one whose models it offers.
    pub shared: Vec<Arc<dyn Elsewhere>>,
}

impl Others {
    /// All of them, those nearer first.
    pub fn sources(&self) -> Vec<Arc<dyn Elsewhere>> {
        let mesh = self.mesh.clone().map(|mesh| mesh as Arc<dyn Elsewhere>);
        self.shared.iter().cloned().chain(mesh).collect()
    }

    /// Begins to serve for others.
    pub fn serve(&self, slots: &Slots) {
        if let Some(mesh) = &self.mesh {
            mesh.serve(Hosting::new(slots.clone(), self.shared.clone()));
        }
    }

    /// Says what this server is part of.
    pub fn announce(&self, output: &Output) {
        for source in &self.shared {
            let models: Vec<String> = source.models().into_iter().map(|model| model.name).collect();
            output.step("share", if models.is_empty() { "nothing at the moment".into() } else { models.join(", ") });
        }
        if let Some(mesh) = &self.mesh {
            output.step("mesh", format!("{} as {}", mesh.name(), mesh.node_name()));
        }
    }

    /// Says goodbye.
    pub async fn leave(&self) {
        if let Some(mesh) = &self.mesh {
            mesh.leave().await;
        }
    }
}

/// A failure of the mesh, with what to do next.
pub fn failure(error: &(impl std::fmt::Display + Hint)) -> Failure {
    let failure = Failure::new(Exit::Mesh, error);
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_server_does_not_share_itself() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listening = listener.local_addr().unwrap();
        let args = MeshArgs { share: vec![format!("http://localhost:{}/v1", listening.port())], ..MeshArgs::default() };
        let table = ShareTable { url: format!("http://{listening}"), name: Some("box".into()), key_file: None };
        for (args, tables) in [(args, vec![]), (MeshArgs::default(), vec![table])] {
            let failure = shared(&args, &tables, listening).await.err().unwrap();
            assert!(failure.message.contains("cannot share itself"), "{}", failure.message);
            assert_eq!(failure.exit, Exit::Mesh);
            assert!(failure.hint.is_some());
        }
    }
}
