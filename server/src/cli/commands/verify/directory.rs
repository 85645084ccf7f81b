//! A model directory against its own reference.

use std::{fs, path::Path};

use comfy_table::{Table, presets};
use console::style;
use mesh_backend_mlx::verify::{Comparison, Precision, verify};
use mesh_core::{WeightFormat, registry};
use mesh_models::{Artifact, Store, StoreOptions, Want, probe};
use serde_json::json;

use crate::cli::{
    args::VerifyArgs,
    commands::bench::device,
    failure::{Exit, Failure},
    output::Output,
};

/// Where neither the command line nor the directory names one.
const TOLERANCE: f32 = 2e-4;

pub async fn run(args: VerifyArgs, output: &Output) -> Result<(), Failure> {
    let tolerance = match args.tolerance {
        Some(tolerance) => tolerance,
        None => own_tolerance(Path::new(&args.model)).unwrap_or(TOLERANCE),
    };
    let store = Store::new(StoreOptions { offline: true, ..StoreOptions::default() })?;
    let artifact: Artifact = store.locate(&args.model, Want::Safetensors, &output.progress()).await?;
    debug_assert_eq!(artifact.format, WeightFormat::Safetensors);
    let profile = probe(&artifact).map_err(|error| Failure::new(Exit::Model, error))?;
    let family = registry::family_of(registry::families()?, &profile);
    let kind = device(args.device)?.kind;
    let precision = if args.bf16 { Precision::Bf16 } else { Precision::Exact };
    let comparison = Comparison { device: kind, precision, kernels: !args.no_kernels, tolerance };
    let checks = tokio::task::spawn_blocking(move || verify(&profile, family, comparison))
        .await
        .map_err(|error| Failure::new(Exit::Failure, error))?
        .map_err(|error| Failure::new(Exit::Failure, error))?;
    let passed = checks.iter().all(|check| check.passed);
    if args.json {
        let whole = json!({ "tolerance": tolerance, "device": kind, "passed": passed, "checks": checks });
        output.line(serde_json::to_string_pretty(&whole).map_err(|error| Failure::new(Exit::Failure, error))?);
    } else {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["check", "max |difference|", "median", "", ""]);
        for check in &checks {
            let verdict = if check.passed { style("ok").green() } else { style("FAILED").red() };
            table.add_row([
                check.name.clone(),
                format!("{:.2e}", check.max_abs_diff),
                format!("{:.2e}", check.median_abs_diff),
                verdict.to_string(),
                check.fault.clone().unwrap_or_default(),
            ]);
        }
        let text = table.to_string();
        output.line(text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n"));
        output.line(format_args!("tolerance {tolerance:.0e}, on {kind}"));
    }
    match passed {
        true => Ok(()),
        false => Err(Failure::new(Exit::Failure, "the model's logits are not those of its reference")),
    }
}

/// The tolerance that a golden directory suggests for itself.
fn own_tolerance(dir: &Path) -> Option<f32> {
    fs::read_to_string(dir.join("tolerance")).ok()?.trim().parse().ok()
}
