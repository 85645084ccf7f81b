//! `mesh-llm models search`.

use mesh_models::Finds;
use serde_json::{Value, json};

use super::{facts, print};
use crate::cli::{
    failure::{Exit, Failure},
    output::Output,
    plan::Setting,
};

/// Most tags of a repository that are shown to people.
const TAGS_MAX: usize = 4;

pub async fn run(setting: &Setting, words: &str, json: bool, output: &Output) -> Result<(), Failure> {
    let Finds { catalog, hub } = setting.store.search(words).await?;
    if json {
        let catalog: Vec<Value> = catalog
            .iter()
            .map(
                |entry| json!({ "model": entry.name, "repo": entry.repo, "format": entry.format.to_string(), "about": entry.about, "entry": facts(entry) }),
            )
            .collect();
        let hub: Vec<Value> = hub
            .iter()
            .map(|found| json!({ "model": found.repo, "downloads": found.downloads, "tags": found.tags }))
            .collect();
        output.line(json!({ "catalog": catalog, "hub": hub }));
        return Ok(());
    }
    if catalog.is_empty() && hub.is_empty() {
        return Err(Failure::new(Exit::Model, format!("nothing is found for `{words}`"))
            .hint("use fewer words; `mesh-llm models list` shows the catalog"));
    }
    let named = catalog.into_iter().map(|entry| vec![entry.name, "catalog".into(), String::new(), entry.about]);
    let found = hub.into_iter().map(|found| {
        let downloads = found.downloads.map(|count| count.to_string()).unwrap_or_default();
        // Tags with a colon are for machines.
        let tags = found.tags.into_iter().filter(|tag| !tag.contains(':')).take(TAGS_MAX);
        vec![found.repo, "hub".into(), downloads, tags.collect::<Vec<_>>().join(", ")]
    });
    print(named.chain(found), &["model", "from", "downloads", "about"], output);
    Ok(())
}
