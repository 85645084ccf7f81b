//! The README's table of families and backends says what is linked. `cargo xtask table` writes it.

use std::{fs, path::Path};

use mesh_core::{WeightFormat, registry};
use {mesh_backend_llama_server as _, mesh_backend_mlx as _, mesh_families as _};

const START: &str = "<!-- families: written by `cargo xtask table` -->\n";
const END: &str = "<!-- end of families -->";

fn table() -> String {
    let backends = registry::backends().expect("backends are unique");
    let mut lines = vec![
        format!("| family | `model_type` | {} |", backends.ids().join(" | ")),
        format!("|---|---|{}", "---|".repeat(backends.len())),
    ];
    for family in registry::families().expect("families are unique").iter() {
        let claims = family.claims();
        let graph = mesh_graph::graph_families().is_ok_and(|graphs| graphs.get(family.id()).is_ok());
        let cells = backends.iter().map(|backend| {
            let served = backend.info().formats.iter().any(|format| match format {
                WeightFormat::Safetensors => graph,
                WeightFormat::Gguf => !claims.gguf_architectures.is_empty(),
            });
            if served { "yes" } else { "–" }
        });
        let types: Vec<_> = claims.model_types.iter().map(|name| format!("`{name}`")).collect();
        let cells: Vec<_> = cells.collect();
        lines.push(format!("| {} | {} | {} |", family.title(), types.join(", "), cells.join(" | ")));
    }
    lines.join("\n") + "\n"
}

#[test]
fn the_readme_lists_what_is_linked() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let readme = fs::read_to_string(&path).expect("README.md");
    let start = readme.find(START).expect("the table's start") + START.len();
    let end = readme.find(END).expect("the table's end");
    if std::env::var_os("UPDATE_README").is_some() {
        let text = format!("{}{}{}", &readme[..start], table(), &readme[end..]);
        fs::write(&path, text).expect("README.md is written");
        return;
    }
    assert_eq!(&readme[start..end], table(), "run `cargo xtask table`");
}
