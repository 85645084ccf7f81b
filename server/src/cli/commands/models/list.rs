//! `mesh-llm models list`.

use mesh_models::{Listed, Origin};
use serde_json::{Value, json};

use super::{facts, print};
use crate::cli::{
    failure::Failure,
    output::{Output, bytes},
    plan::Setting,
};

pub fn run(setting: &Setting, json: bool, output: &Output) -> Result<(), Failure> {
    let listed = setting.store.list()?;
    if json {
        let models: Vec<Value> = listed.iter().map(as_json).collect();
        output.line(json!({ "models": models }));
        return Ok(());
    }
    let rows = listed.into_iter().map(|model| {
        let on_disk = if model.root.is_some() { "yes" } else { "no" };
        let size = model.weight_bytes.map(bytes).unwrap_or_default();
        let origin = origin(model.origin).to_owned();
        vec![model.reference, origin, model.format.to_string(), size, on_disk.to_owned(), model.about]
    });
    print(rows, &["model", "from", "format", "size", "on disk", "about"], output);
    Ok(())
}

fn origin(origin: Origin) -> &'static str {
    match origin {
        Origin::Configured => "config",
        Origin::Catalog => "catalog",
        Origin::Imported => "imported",
        Origin::Hub => "hub",
    }
}

fn as_json(model: &Listed) -> Value {
    json!({
        "model": model.reference,
        "from": origin(model.origin),
        "format": model.format.to_string(),
        "weight_bytes": model.weight_bytes,
        "path": model.root,
        "about": model.about,
        "entry": model.entry.as_ref().map(facts),
    })
}
