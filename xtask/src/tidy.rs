//! Rules that can be checked: which crate may depend on which, how long files get, and words that must not appear.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::Result;

/// The crates of this workspace that each may depend on, in what is built to be shipped.
const ALLOWED: &[(&str, &[&str])] = &[
    ("mesh-core", &[]),
    ("mesh-text", &["mesh-core"]),
    ("mesh-models", &["mesh-core"]),
    ("mesh-graph", &["mesh-core"]),
    ("mesh-peers", &["mesh-core"]),
    ("mesh-dialects", &["mesh-core", "mesh-text"]),
    ("mesh-families", &["mesh-core", "mesh-graph", "mesh-text", "mesh-dialects"]),
    ("mesh-backend-mlx", &["mesh-core", "mesh-graph"]),
    ("mesh-backend-llama-server", &["mesh-core"]),
    ("mesh-backend-mesh", &["mesh-core", "mesh-peers"]),
    ("mesh-backend-openai", &["mesh-core"]),
    (
        "mesh-llm",
        &[
            "mesh-core",
            "mesh-text",
            "mesh-models",
            "mesh-peers",
            "mesh-dialects",
            "mesh-families",
            "mesh-backend-mlx",
            "mesh-backend-llama-server",
            "mesh-backend-mesh",
            "mesh-backend-openai",
        ],
    ),
    ("conformance", &["mesh-core"]),
    ("xtask", &[]),
];

/// What the server's library must not name: only the binary, under `cli`, knows backends and plugins.
const NOT_IN_THE_LIBRARY: &[&str] = &["mesh_backend_", "mesh_families", "mesh_dialects", "mesh_graph"];

/// Lines a source file may have before it needs a second noun.
const LINES_MAX: usize = 600;

/// Lines a family's file may have.
const FAMILY_LINES_MAX: usize = 300;

/// Checks everything, and lists what does not hold.
pub fn check(root: &Path) -> Result<()> {
    let mut faults = direction(&metadata(root)?);
    for path in sources(root)? {
        let text = fs::read_to_string(&path)?;
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        faults.extend(file(&name, &text));
    }
    if faults.is_empty() {
        println!("tidy");
        return Ok(());
    }
    Err(faults.join("\n").into())
}

/// What a package is called, and which of this workspace it is built with.
type Dependencies = BTreeMap<String, BTreeSet<String>>;

fn metadata(root: &Path) -> Result<Dependencies> {
    let output = Command::new(env::var("CARGO").unwrap_or("cargo".into()))
        .args(["metadata", "--format-version=1", "--locked", "--no-deps"])
        .current_dir(root)
        .stderr(Stdio::inherit())
        .output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"].as_array().ok_or("cargo metadata lists no packages")?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let names: BTreeSet<String> = packages.iter().map(|package| text(&package["name"])).collect();
    let needs = |package: &serde_json::Value| {
        let all = package["dependencies"].as_array().into_iter().flatten();
        // Tests may use anything.
        let shipped = all.filter(|dependency| dependency["kind"].as_str() != Some("dev"));
        shipped.map(|dependency| text(&dependency["name"])).filter(|name| names.contains(name)).collect()
    };
    Ok(packages.iter().map(|package| (text(&package["name"]), needs(package))).collect())
}

fn direction(dependencies: &Dependencies) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, needs) in dependencies {
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| known == name) else {
            faults.push(format!("{name} is not in the table of allowed dependencies (xtask/src/tidy.rs)"));
            continue;
        };
        let bad = needs.iter().filter(|need| !allowed.contains(&need.as_str()));
        faults.extend(bad.map(|need| format!("{name} must not depend on {need}")));
    }
    faults
}

fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["core", "backends", "plugins", "server", "tests", "xtask"].iter().map(|name| root.join(name)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn file(name: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let lines = text.lines().count();
    let family = name.starts_with("plugins/families/src/");
    let max = if family { FAMILY_LINES_MAX } else { LINES_MAX };
    if lines > max {
        faults.push(format!("{name} has {lines} lines, over {max}"));
    }
    if name.starts_with("server/src/") && !name.starts_with("server/src/cli/") {
        let named = NOT_IN_THE_LIBRARY.iter().filter(|word| text.contains(*word));
        faults.extend(named.map(|word| format!("{name} names {word}, which only the binary may")));
    }
    if name != "xtask/src/tidy.rs" {
        // Company mirrors have to work: pip and cargo know where packages come from, this tree does not.
        let hosts = ["pypi", "pythonhosted"].map(|host| format!("{host}.org"));
        let stubs = ["#[ignore", "todo!(", "unimplemented!("].map(str::to_owned);
        let words = hosts.iter().chain(&stubs).filter(|word| text.contains(*word));
        faults.extend(words.map(|word| format!("{name} contains {word}")));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(pairs: &[(&str, &[&str])]) -> Dependencies {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        pairs.iter().map(|(name, needs)| ((*name).to_owned(), owned(needs))).collect()
    }

    #[test]
    fn the_wrong_direction_is_a_fault() {
        assert!(direction(&graph(&[("mesh-graph", &["mesh-core"])])).is_empty());
        assert_eq!(direction(&graph(&[("mesh-core", &["mesh-graph"])])), ["mesh-core must not depend on mesh-graph"]);
        assert_eq!(direction(&graph(&[("mesh-backend-mlx", &["mesh-families"])])).len(), 1);
        assert_eq!(direction(&graph(&[("new", &[])])).len(), 1);
    }

    #[test]
    fn the_library_names_no_backend() {
        assert_eq!(file("server/src/slots.rs", "use mesh_backend_mlx as _;").len(), 1);
        assert!(file("server/src/cli/linked.rs", "use mesh_backend_mlx as _;").is_empty());
    }

    #[test]
    fn long_families_are_faults() {
        let long = "\n".repeat(FAMILY_LINES_MAX + 1);
        assert_eq!(file("plugins/families/src/a.rs", &long).len(), 1);
        assert!(file("core/graph/src/a.rs", &long).is_empty());
    }

    #[test]
    fn this_workspace_is_tidy() {
        check(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
    }
}
