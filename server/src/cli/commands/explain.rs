//! `mesh-llm explain`: facts, verdicts, and who would be elected.

use std::sync::Arc;

use comfy_table::{Table, presets};
use console::style;
use mesh_core::{Elected, ElectionError, Hint, ModelProfile, Verdict};
use mesh_llm::voting::Votes;
use serde_json::{Value, json};

use crate::cli::{
    args::ExplainArgs,
    failure::{Exit, Failure},
    output::Output,
    plan::Setting,
};

pub async fn run(args: ExplainArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::new(&args.environment)?;
    let plan = setting.choose(args.model.clone(), &args.choice)?;
    let starter = setting.starter(&plan, output.progress_beside(args.json), Arc::new(|_| {}));
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
    if args.json {
        let text = serde_json::to_string_pretty(&as_json(&profile, family, &votes, &outcome));
        output.line(text.map_err(|error| Failure::new(Exit::Failure, error))?);
    } else {
        output.line(as_text(&profile, family, &votes, &outcome));
    }
    Ok(())
}

/// The model's family as id and title.
type Family = Option<(&'static str, &'static str)>;

fn as_json(profile: &ModelProfile, family: Family, votes: &Votes, outcome: &Result<Elected, ElectionError>) -> Value {
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

fn as_text(profile: &ModelProfile, family: Family, votes: &Votes, outcome: &Result<Elected, ElectionError>) -> String {
    let mut lines = vec![format!("{} at {}", style(&profile.name).bold(), profile.root.display())];
    lines.push(match family {
        Some((id, title)) => format!("family {title} ({id})"),
        None => "no linked family claims it".into(),
    });
    lines.push(String::new());
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["fact", "value", "source"]);
    for (name, value, source) in profile.facts() {
        table.add_row([name.to_owned(), value, source.to_string()]);
    }
    lines.push(table.to_string());
    for (ballot, host) in votes.ballots.iter().zip(&votes.hosts) {
        lines.push(String::new());
        let id = style(ballot.backend.id).bold();
        let (head, reasons, hint) = match &ballot.verdict {
            Verdict::Serve(offer) => {
                let memory = offer.memory_bytes.map(|count| format!(", about {}", crate::cli::output::bytes(count)));
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
    }
    lines.push(String::new());
    lines.push(match outcome {
        Ok(elected) => format!("elected: {}", style(elected.backend.id).green().bold()),
        Err(error) => {
            let hint = error.hint().map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
            format!("nobody is elected: {error}{hint}")
        }
    });
    // Tables pad their last column.
    let text = lines.join("\n");
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}
