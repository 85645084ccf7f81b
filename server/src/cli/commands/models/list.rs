//! `mesh-llm models list`.

use comfy_table::{Table, presets};
use mesh_models::Origin;

use crate::cli::{
    failure::Failure,
    output::{Output, bytes},
    plan::Setting,
};

pub fn run(setting: &Setting, output: &Output) -> Result<(), Failure> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(["model", "from", "format", "size", "on disk", "about"]);
    for model in setting.store.list()? {
        let origin = match model.origin {
            Origin::Catalog => "catalog",
            Origin::Imported => "imported",
            Origin::Hub => "hub",
        };
        table.add_row([
            model.reference,
            origin.to_owned(),
            model.format.to_string(),
            model.weight_bytes.map(bytes).unwrap_or_default(),
            if model.root.is_some() { "yes" } else { "no" }.to_owned(),
            model.about,
        ]);
    }
    for line in table.to_string().lines() {
        output.line(line.trim_end());
    }
    Ok(())
}
