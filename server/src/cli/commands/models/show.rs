//! `mesh-llm models show`: what a model is, what it can do, what memory it takes, and who would serve it. From headers
//! alone.

use clap::Args;
use comfy_table::{Table, presets};
use mesh_core::{Host, ModelProfile, Need};
use mesh_llm::talk::{self, Ability};
use serde_json::{Value, json};

use crate::cli::{
    args::ChoiceArgs,
    commands::explain::{Judged, pretty, text},
    failure::{Exit, Failure},
    output::{Output, bytes},
    plan::Setting,
};

/// Context whose memory is shown beside the model's own, in tokens.
const CONTEXT_TOKENS_USUAL: u32 = 8192;

/// `mesh-llm models show`.
#[derive(Clone, Debug, Args)]
pub struct ShowArgs {
    /// A catalog name, a path, or a repository
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// The context whose memory is shown, in tokens; 8192 and the model's own if absent
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    pub ctx: Option<u32>,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub choice: ChoiceArgs,
}

/// What a context takes on a backend.
struct Memory {
    backend: &'static str,
    context_tokens: u32,
    need: Option<Need>,
}

pub async fn run(setting: &Setting, args: ShowArgs, output: &Output) -> Result<(), Failure> {
    let plan = setting.choose(args.model, &args.choice)?;
    let judged = Judged::of(setting, &plan, output.progress_beside(args.json)).await?;
    let profile = &judged.profile;
    let abilities = talk::abilities(profile, setting.electorate.family(profile))
        .map_err(|error| Failure::new(Exit::Failure, error))?;
    let memory = memory(setting, profile, &judged.votes.hosts, &contexts(profile, args.ctx));
    if args.json {
        let mut whole = judged.as_json();
        whole["abilities"] = json!(abilities);
        whole["stored"] = json!(profile.stored);
        whole["kept"] = json!(profile.kept);
        whole["memory"] = memory.iter().map(as_json).collect();
        output.line(pretty(&whole)?);
        return Ok(());
    }
    let rows: Vec<_> = abilities.iter().map(row).collect();
    output.line(text([judged.head(), judged.facts(&rows), parts(profile), table(&memory), judged.verdicts()]));
    Ok(())
}

/// The contexts to show: the one asked for, or a usual one and the model's own.
fn contexts(profile: &ModelProfile, asked: Option<u32>) -> Vec<u32> {
    let own = profile.context_tokens_max.as_ref().map(|fact| fact.value);
    match (asked, own) {
        (Some(asked), _) => vec![asked],
        (None, Some(own)) if own <= CONTEXT_TOKENS_USUAL => vec![own],
        (None, own) => std::iter::once(CONTEXT_TOKENS_USUAL).chain(own).collect(),
    }
}

/// What each backend that reads these weights would take.
fn memory(setting: &Setting, profile: &ModelProfile, hosts: &[Host], contexts: &[u32]) -> Vec<Memory> {
    let backends = setting.electorate.backends().iter().zip(hosts);
    let backends = backends.filter(|(backend, _)| backend.info().formats.contains(&profile.format.value));
    let needs = backends.flat_map(|(backend, host)| {
        contexts.iter().map(|context_tokens| Memory {
            backend: backend.info().id,
            context_tokens: *context_tokens,
            need: backend.need(profile, host, *context_tokens),
        })
    });
    needs.collect()
}

fn as_json(Memory { backend, context_tokens, need }: &Memory) -> Value {
    json!({ "backend": backend, "context_tokens": context_tokens, "need": need })
}

fn row(Ability { name, there, why }: &Ability) -> [String; 3] {
    [(*name).to_owned(), if *there { "yes" } else { "no" }.to_owned(), why.clone()]
}

fn parts(profile: &ModelProfile) -> String {
    let Some(stored) = &profile.stored else { return String::new() };
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["part", "stored as", "tensors", "parameters", "size"]);
    for row in &stored.value {
        let (tensors, parameters) = (row.tensors.to_string(), row.parameters.to_string());
        table.add_row([row.part.to_string(), row.form.clone(), tensors, parameters, bytes(row.bytes)]);
    }
    table.to_string()
}

fn table(memory: &[Memory]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["memory on", "context", "weights", "sequence", "computing", "device needs"]);
    for Memory { backend, context_tokens, need } in memory {
        let unknown = || "cannot be told".to_owned();
        let of = |part: fn(&Need) -> u64| need.as_ref().map_or_else(unknown, |need| bytes(part(need)));
        table.add_row([
            (*backend).to_owned(),
            format!("{context_tokens} tokens"),
            of(|need| need.weights_bytes),
            of(|need| need.cache_bytes),
            of(|need| need.workspace_bytes),
            of(|need| need.device_bytes),
        ]);
    }
    table.to_string()
}
