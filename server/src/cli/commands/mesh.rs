//! `mesh-llm mesh`: creating a mesh, letting machines in and out of it, and looking at it.

use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use mesh_backend_mesh::{EndpointAddr, EndpointId, Home};
use serde_json::{Value, json};

use crate::cli::{
    config::Config,
    failure::{Exit, Failure},
    mesh::failure,
    output::Output,
    plan,
};

/// How long the running server may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// `mesh-llm mesh`.
#[derive(Clone, Debug, Args)]
pub struct MeshArgs {
    #[command(subcommand)]
    pub command: MeshCommand,
}

#[derive(Clone, Debug, Subcommand)]
pub enum MeshCommand {
    /// Create a mesh, with this machine as its first
    Create {
        /// What it is called
        #[arg(long, value_name = "NAME", default_value = "home", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        name: String,
    },
    /// Write a ticket with which another machine may join: `mesh-llm serve --join TICKET`
    Invite {
        /// How long it is good, such as 30m, 12h or 7d
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lasting)]
        expires: Duration,
        /// Good for one machine
        #[arg(long)]
        once: bool,
    },
    /// Show the machines of the mesh and what they serve, as the server on this machine sees them
    Status {
        /// Answer in JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Take this machine out of its mesh
    Leave {
        /// On the machine that created the mesh: give its key up, so that nobody can be invited or revoked any more
        #[arg(long)]
        forget_key: bool,
    },
    /// Take another machine out of the mesh, for good
    Revoke {
        /// Its id, or its name as `mesh status` shows it
        node: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// The server on this machine.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// Where it listens [default: where `mesh-llm serve` does]
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
}

fn lasting(text: &str) -> Result<Duration, String> {
    let most = Duration::from_secs(366 * 24 * 60 * 60);
    match humantime::parse_duration(text) {
        Ok(time) if time >= Duration::from_secs(1) && time <= most => Ok(time),
        _ => Err("it has to be a time between a second and a year, such as 30m, 12h or 7d".into()),
    }
}

pub async fn run(args: MeshArgs, output: &Output) -> Result<(), Failure> {
    let home = Home::usual().map_err(|error| failure(&error))?;
    match args.command {
        MeshCommand::Create { name } => {
            let membership = home.create(&name).map_err(|error| failure(&error))?;
            output.line(format_args!("created the mesh `{}`", membership.mesh_name));
            output.line("next: mesh-llm serve, and beside it mesh-llm mesh invite for each machine that shall join");
        }
        MeshCommand::Invite { expires, once } => {
            let own = home.node_key().map_err(|error| failure(&error))?.public();
            let address = home.address().map_err(|error| failure(&error))?;
            if address.is_none() {
                tracing::warn!(
                    "no server has run here yet, so the ticket holds no address: it is good on the same local network, while one \
                     runs"
                );
            }
            let at = address.unwrap_or(EndpointAddr::new(own));
            let ticket = home.invite(at, expires, once).map_err(|error| failure(&error))?;
            // Alone on standard output, to be handed on by other programs.
            output.line(ticket);
        }
        MeshCommand::Status { json, server } => {
            let status = status(&server).await?;
            match json {
                true => output.line(serde_json::to_string_pretty(&status).unwrap_or_default()),
                false => output.line(table(&status)),
            }
        }
        MeshCommand::Leave { forget_key } => {
            let membership = home.leave(forget_key).map_err(|error| failure(&error))?;
            output.line(format_args!("left the mesh `{}`", membership.mesh_name));
        }
        MeshCommand::Revoke { node, server } => {
            let id = match node.parse::<EndpointId>() {
                Ok(id) => id,
                Err(_) => named(&status(&server).await?, &node)?,
            };
            if id == home.node_key().map_err(|error| failure(&error))?.public() {
                let failure = Failure::new(Exit::Usage, "this is the machine itself");
                return Err(failure.hint("to take it out of the mesh, run: mesh-llm mesh leave"));
            }
            home.revoke(id).map_err(|error| failure(&error))?;
            output.line(format_args!("revoked {id}; the server on this machine tells the others"));
        }
    }
    Ok(())
}

/// What the server on this machine says of the mesh.
async fn status(server: &ServerArgs) -> Result<Value, Failure> {
    let url = match &server.url {
        Some(url) => url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
        None => format!("http://{}", plan::local_address(&Config::read(None)?)),
    };
    let body = told(&url, "/v1/mesh").await?;
    let sources = body["sources"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mesh = sources.iter().find(|source| source["kind"] == "mesh").map(|source| source["status"].clone());
    mesh.ok_or_else(|| {
        Failure::new(Exit::Mesh, "the server takes part in no mesh")
            .hint("run `mesh-llm mesh create` or `mesh-llm serve --join TICKET`, and start it again")
    })
}

/// What the server at `url` tells.
pub async fn told(url: &str, path: &str) -> Result<Value, Failure> {
    let unreachable = |error: reqwest::Error| {
        Failure::new(Exit::Failure, format!("no server answers at {url}: {error}"))
            .hint("start one with `mesh-llm serve`, or say where it is with --url")
    };
    let mut request = reqwest::Client::new().get(format!("{url}{path}")).timeout(ANSWER_MAX);
    if let Ok(key) = std::env::var("MESH_LLM_API_KEY") {
        request = request.bearer_auth(key);
    }
    let answer = request.send().await.map_err(unreachable)?;
    let status = answer.status();
    let body: Value = answer.json().await.map_err(unreachable)?;
    if !status.is_success() {
        let why = body["error"]["message"].as_str().unwrap_or("it says no more").to_owned();
        return Err(Failure::new(Exit::Failure, format!("the server answers {status}: {why}"))
            .hint("where it asks for a key, set MESH_LLM_API_KEY"));
    }
    Ok(body)
}

/// The id of the node of that name.
fn named(status: &Value, name: &str) -> Result<EndpointId, Failure> {
    let nodes = status["nodes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let known = |node: &&Value| {
        node["name"] == name || node["id"].as_str().is_some_and(|id| name.len() >= 8 && id.starts_with(name))
    };
    let mut found = nodes.iter().filter(known).filter_map(|node| node["id"].as_str()?.parse().ok());
    match (found.next(), found.next()) {
        (Some(id), None) => Ok(id),
        (None, _) => Err(Failure::new(Exit::Usage, format!("no node of the mesh is called `{name}`"))
            .hint("`mesh-llm mesh status` shows names and ids; one that is away has to be named by its whole id")),
        (Some(_), Some(_)) => Err(Failure::new(Exit::Usage, format!("several nodes are called `{name}`"))
            .hint("give the whole id, as `mesh-llm mesh status --json` shows it")),
    }
}

fn table(status: &Value) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["NODE", "ID", "MODELS", "HEARD", "ROUND TRIP", "SENT", "FAILED", "SERVED"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let short = |value: &Value| text(value).chars().take(10).collect::<String>();
    let own = &status["node"];
    table.add_row([text(&own["name"]), short(&own["id"]), String::new(), "this one".into()]);
    for node in status["nodes"].as_array().into_iter().flatten() {
        let offers = node["offers"].as_array().map(Vec::as_slice).unwrap_or_default();
        let models: Vec<String> = offers.iter().map(|offer| text(&offer["name"])).collect();
        let heard = format!("{:.1} s ago", node["age_s"].as_f64().unwrap_or_default());
        let trip = node["round_trip_ms"].as_f64().map_or("-".into(), |trip| format!("{trip:.1} ms"));
        let count = |key: &str| node[key].as_u64().unwrap_or_default().to_string();
        let state = if node["routable"] == json!(true) { heard } else { "lost".into() };
        table.add_row([
            text(&node["name"]),
            short(&node["id"]),
            models.join(", "),
            state,
            trip,
            count("sent"),
            count("failed"),
            count("served"),
        ]);
    }
    let title = format!("mesh {}", text(&status["mesh"]));
    let lines = table.to_string();
    let lines = lines.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    format!("{title}\n{lines}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Value {
        let id = |byte: u8| mesh_backend_mesh::SecretKey::from_bytes(&[byte; 32]).public().to_string();
        json!({
            "mesh": "home",
            "node": { "id": id(1), "name": "laptop" },
            "nodes": [
                { "id": id(2), "name": "tower", "offers": [{ "name": "Qwen3-8B" }, { "name": "SmolLM2" }], "age_s": 0.25,
                  "round_trip_ms": 0.41, "connected": true, "routable": true, "sent": 12, "failed": 1, "served": 0 },
                { "id": id(3), "name": "attic", "offers": [], "age_s": 4.0, "round_trip_ms": null, "routable": false },
            ],
        })
    }

    #[test]
    fn the_mesh_is_shown_as_a_table() {
        insta::assert_snapshot!(table(&example()));
    }

    #[test]
    fn nodes_are_found_by_name_and_id() {
        let status = example();
        let tower = status["nodes"][0]["id"].as_str().unwrap().to_owned();
        assert_eq!(named(&status, "tower").unwrap().to_string(), tower);
        assert_eq!(named(&status, &tower[..8]).unwrap().to_string(), tower);
        assert!(named(&status, &tower[..7]).unwrap_err().message.contains("no node"));
        assert!(named(&status, "cellar").unwrap_err().hint.unwrap().contains("mesh status"));
    }

    #[test]
    fn times_are_read_with_their_units() {
        assert_eq!(lasting("12h"), Ok(Duration::from_secs(12 * 60 * 60)));
        for bad in ["", "0s", "10", "2000y", "soon"] {
            assert!(lasting(bad).unwrap_err().contains("30m"), "{bad}");
        }
    }
}
