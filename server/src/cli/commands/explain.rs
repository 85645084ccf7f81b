//! `mesh-llm explain`: facts, verdicts, and who would be elected.

use std::sync::Arc;

use comfy_table::{Table, presets};
use console::style;
use mesh_backend_mesh::Home;
use mesh_core::{Elected, ElectionError, Hint, ModelProfile, ProgressSink, Verdict};
use mesh_llm::voting::Votes;
use percent_encoding::NON_ALPHANUMERIC;
use serde_json::{Value, json};

use crate::cli::{
    args::ExplainArgs,
    failure::{Exit, Failure},
    output::{Output, bytes},
    plan::{self, ModelPlan, Setting},
};

pub async fn run(args: ExplainArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::new(&args.environment)?;
    let plan = setting.choose(args.model.clone(), &args.choice)?;
    let (setting, routed) = match member() {
        Some(mesh) => {
            let url = url(&setting, &args);
            let told = told(&url).await;
            (told.into_iter().fold(setting, Setting::told), routed(&url, &args.model, mesh).await)
        }
        None => (setting, None),
    };
    let judged = match Judged::of(&setting, &plan, output.progress_beside(args.json)).await {
        Err(failure) if routed.is_none() => return Err(failure),
        // It need not be on this machine, where another one serves it.
        judged => judged,
    };
    if args.json {
        let mut whole = match &judged {
            Ok(judged) => judged.as_json(),
            Err(failure) => {
                json!({ "model": args.model, "error": { "message": failure.message, "hint": failure.hint } })
            }
        };
        if let Some(routed) = routed {
            whole["requests"] = routed;
        }
        output.line(pretty(&whole)?);
        return Ok(());
    }
    let mut sections = match &judged {
        Ok(judged) => vec![judged.head(), judged.facts(&[]), judged.verdicts()],
        Err(failure) => vec![format!("not on this machine: {}", failure.message)],
    };
    sections.extend(routed.as_ref().map(requests));
    output.line(text(sections));
    Ok(())
}

/// The mesh that this machine is in.
fn member() -> Option<String> {
    Some(Home::usual().ok()?.membership().ok()??.mesh_name)
}

fn url(setting: &Setting, args: &ExplainArgs) -> String {
    match &args.url {
        Some(url) => url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
        None => format!("http://{}", plan::local_address(&setting.config)),
    }
}

/// What the server on this machine knows of other machines' models, if one runs that takes part in the mesh.
async fn told(url: &str) -> Option<Value> {
    let mut others = ask(url, "/v1/mesh").await?;
    let mesh = others["sources"].as_array_mut()?.iter_mut().find(|source| source["kind"] == "mesh")?;
    Some(json!({ "mesh": mesh["status"]["mesh"].take(), "offers": mesh["offers"].take() }))
}

/// Where it would send a request for the model.
async fn routed(url: &str, model: &str, mesh: String) -> Option<Value> {
    let model = percent_encoding::utf8_percent_encode(model, NON_ALPHANUMERIC);
    let mut routed = ask(url, &format!("/v1/mesh/routes/{model}")).await?;
    routed["mesh"] = mesh.into();
    Some(routed)
}

async fn ask(url: &str, path: &str) -> Option<Value> {
    let told = super::mesh::told(url, path).await;
    told.inspect_err(|failure| tracing::debug!(path, why = failure.message, "the server does not tell")).ok()
}

fn requests(routed: &Value) -> String {
    let word = |key: &str| routed[key].as_str().unwrap_or_default().to_owned();
    let whither = if routed["elsewhere"] == json!(true) { "to another machine" } else { "to this machine" };
    let machines = routed["machines"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let lines: Vec<String> = machines.map(|machine| format!("  - {machine}")).collect();
    let head = format!("requests go {} (mesh {}): {}", style(whither).green().bold(), word("mesh"), word("why"));
    [&[head], &lines[..]].concat().join("\n")
}

/// A model, and what every backend says of it.
pub struct Judged {
    /// What is known of it.
    pub profile: ModelProfile,
    /// The votes.
    pub votes: Votes,
    family: Family,
    outcome: Result<Elected, ElectionError>,
}

impl Judged {
    /// Finds a model and has it judged.
    pub async fn of(setting: &Setting, plan: &ModelPlan, progress: ProgressSink) -> Result<Self, Failure> {
        let starter = setting.starter(plan, progress, Arc::new(|_| {}));
        let profile = starter.locate.locate(&starter.progress).await.map_err(|error| Failure::from(&error))?;
        let electorate = setting.electorate.clone();
        let (profile, votes) = tokio::task::spawn_blocking(move || {
            let votes = electorate.votes(&profile, |device| device.memory_bytes);
            (profile, votes)
        })
        .await
        .map_err(|error| Failure::new(Exit::Failure, format!("a backend failed while judging: {error}")))?;
        let family = setting.electorate.family(&profile).map(|family| (family.id(), family.title()));
        let outcome = votes.elect(&starter.election_request());
        Ok(Self { profile, votes, family, outcome })
    }
}

/// JSON for people and programs.
pub fn pretty(value: &Value) -> Result<String, Failure> {
    serde_json::to_string_pretty(value).map_err(|error| Failure::new(Exit::Failure, error))
}

/// Sections with empty lines between them. Tables pad their last column.
pub fn text(sections: impl IntoIterator<Item = String>) -> String {
    let sections: Vec<String> = sections.into_iter().filter(|section| !section.is_empty()).collect();
    let text = sections.join("\n\n");
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// The model's family as id and title.
type Family = Option<(&'static str, &'static str)>;

impl Judged {
    /// All of it.
    pub fn as_json(&self) -> Value {
        let Self { profile, votes, family, outcome } = self;
        let facts: Vec<_> = profile
            .facts()
            .into_iter()
            .map(|(name, value, source)| json!({ "name": name, "value": value, "source": source }))
            .collect();
        let ballots: Vec<_> = votes
            .ballots
            .iter()
            .zip(&votes.hosts)
            .map(|(ballot, host)| json!({ "backend": ballot.backend.id, "host": host, "verdict": ballot.verdict }))
            .collect();
        let mut whole = json!({
            "model": profile.name,
            "root": profile.root,
            "weights": profile.weights,
            "family": family.map(|(id, _)| id),
            "facts": facts,
            "ballots": ballots,
        });
        match outcome {
            Ok(elected) => whole["elected"] = elected.backend.id.into(),
            Err(error) => whole["error"] = json!({ "message": error.to_string(), "hint": error.hint() }),
        }
        whole
    }

    /// What it is called, and whose it is.
    pub fn head(&self) -> String {
        let family = match self.family {
            Some((id, title)) => format!("family {title} ({id})"),
            None => "no linked family claims it".into(),
        };
        format!("{} at {}\n{family}", style(&self.profile.name).bold(), self.profile.root.display())
    }

    /// What is known of it and from where, with `more` rows.
    pub fn facts(&self, more: &[[String; 3]]) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["fact", "value", "source"]);
        for (name, value, source) in self.profile.facts() {
            table.add_row([name.to_owned(), value, source.to_string()]);
        }
        table.add_rows(more);
        table.to_string()
    }

    /// Who would serve it, and why.
    pub fn verdicts(&self) -> String {
        let mut lines = Vec::new();
        for (ballot, host) in self.votes.ballots.iter().zip(&self.votes.hosts) {
            let id = style(ballot.backend.id).bold();
            let (head, reasons, hint) = match &ballot.verdict {
                Verdict::Serve(offer) => {
                    let memory = offer.memory_bytes.map(|count| format!(", about {}", bytes(count)));
                    let head = format!(
                        "{id} {} on {} ({}), up to {} tokens{}, score {}",
                        style("would serve it").green(),
                        offer.device.name,
                        offer.device.kind,
                        offer.capabilities.context_tokens_max,
                        memory.unwrap_or_default(),
                        offer.score
                    );
                    (head, &offer.reasons, None)
                }
                Verdict::Refuse(refusal) => {
                    (format!("{id} {}", style("refuses it").yellow()), &refusal.reasons, refusal.hint.as_ref())
                }
            };
            lines.push(head);
            lines.extend(reasons.iter().map(|reason| format!("  - {reason}")));
            let new = host.notes.iter().filter(|note| !reasons.iter().any(|reason| reason.text == **note));
            lines.extend(new.map(|note| format!("  - {note}")));
            lines.extend(hint.map(|hint| format!("  hint: {hint}")));
            lines.push(String::new());
        }
        lines.push(match &self.outcome {
            Ok(elected) => format!("elected: {}", style(elected.backend.id).green().bold()),
            Err(error) => {
                let hint = error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
                format!("nobody is elected: {error}{hint}")
            }
        });
        lines.join("\n")
    }
}
