//! `mesh-llm bench`: how fast a model, or the shape of one, reads and writes.

use std::sync::Arc;

use comfy_table::{Table, presets};
use mesh_backend_mlx::bench::{RandomWeights, Shape, random_engine, shapes, take_peak_bytes};
use mesh_core::{Device, EngineHandle, registry};
use mesh_llm::measure::{Run, Spread, Workload, measure};
use serde_json::{Value, json};

use crate::cli::{
    args::{BenchArgs, BenchDevice},
    failure::{Exit, Failure},
    output::{Output, bytes},
    plan::{ModelPlan, Setting},
};

/// How long an engine may take to stop.
const GRACE: std::time::Duration = std::time::Duration::from_secs(5);

/// The backend whose memory is this process's.
const MLX: &str = "mlx";

pub async fn run(args: BenchArgs, output: &Output) -> Result<(), Failure> {
    let (name, handle, vocab_size) = match &args.shape {
        Some(name) => {
            let shape = shape(name)?;
            let vocab_size = shape.config["vocab_size"].as_u64().unwrap_or(1) as u32;
            let weights = RandomWeights { bits: args.bits, seed: args.seed, kernels: !args.no_kernels };
            let handle = random_engine(&shape, weights, device(args.device)?)
                .await
                .map_err(|error| Failure::new(Exit::Load, error))?;
            (format!("{name}, {} bits, random weights", args.bits), handle, vocab_size)
        }
        None => {
            let setting = Setting::new(&args.environment)?;
            let plan = ModelPlan::new(&args.model, &setting.config, |id| setting.formats(id));
            let starter = setting.starter(&plan, output.progress_beside(args.json), Arc::new(|_| {}));
            let served = starter.start().await.map_err(|error| Failure::from(&error))?;
            let vocab_size = served.profile.vocab_size.as_ref().map_or(1000, |fact| fact.value);
            (served.profile.name.clone(), served.handle.clone(), vocab_size)
        }
    };
    let workload = Workload {
        prompt_tokens: args.prompt_tokens,
        generate_tokens: args.generate_tokens,
        runs: args.runs,
        vocab_size,
    };
    take_peak_bytes();
    let runs = measure(&*handle, workload).await.map_err(|error| Failure::new(Exit::Failure, error));
    let peak = (handle.backend.id == MLX).then(take_peak_bytes).filter(|peak| *peak > 0);
    handle.drain(GRACE).await;
    let runs = runs?;
    let report = Report { name, handle: &handle, workload, runs, peak_bytes: peak };
    match args.json {
        true => output
            .line(serde_json::to_string_pretty(&report.json()).map_err(|error| Failure::new(Exit::Failure, error))?),
        false => output.line(report.text()),
    }
    Ok(())
}

fn shape(name: &str) -> Result<Shape, Failure> {
    let all = shapes();
    let known: Vec<_> = all.iter().map(|shape| shape.name).collect();
    let unknown = Failure::new(Exit::Usage, format!("no shape is called `{name}`"))
        .hint(format!("shapes are: {}", known.join(", ")));
    all.into_iter().find(|shape| shape.name == name).ok_or(unknown)
}

/// The device that MLX would use.
pub fn device(choice: BenchDevice) -> Result<Device, Failure> {
    let settings = match choice {
        BenchDevice::Auto => Value::Null,
        BenchDevice::Cpu => json!({ "device": "cpu" }),
        BenchDevice::Gpu => json!({ "device": "gpu" }),
    };
    let backend = registry::backends()?.get(MLX).map_err(|error| Failure::new(Exit::Backend, error))?;
    backend.host(&settings).device.map_err(|why| Failure::new(Exit::Backend, why))
}

struct Report<'a> {
    name: String,
    handle: &'a EngineHandle,
    workload: Workload,
    runs: Vec<Run>,
    peak_bytes: Option<u64>,
}

impl Report<'_> {
    fn spreads(&self) -> [(&'static str, Spread); 3] {
        let spread = |value: fn(&Run) -> f64| Spread::of(self.runs.iter().map(value));
        [
            ("prefill_tokens_per_s", spread(|run| run.prefill_tokens_per_s)),
            ("decode_tokens_per_s", spread(|run| run.decode_tokens_per_s)),
            ("ttft_s", spread(|run| run.ttft_s)),
        ]
    }

    fn json(&self) -> Value {
        let mut whole = json!({
            "model": self.name,
            "backend": self.handle.backend.id,
            "device": self.handle.device,
            "prompt_tokens": self.workload.prompt_tokens,
            "generate_tokens": self.workload.generate_tokens,
            "runs": self.runs,
            "peak_bytes": self.peak_bytes,
        });
        for (name, spread) in self.spreads() {
            whole[name] = json!(spread);
        }
        whole
    }

    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(["", "median", "min", "max"]);
        for (name, spread) in self.spreads() {
            let (label, scale) = match name {
                "prefill_tokens_per_s" => ("prefill, tokens/s", 1.0),
                "decode_tokens_per_s" => ("decode, tokens/s", 1.0),
                _ => ("time to first token, ms", 1000.0),
            };
            let cell = |value: f64| format!("{:.1}", value * scale);
            table.add_row([label.into(), cell(spread.median), cell(spread.min), cell(spread.max)]);
        }
        let table = table.to_string();
        let table = table.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
        let memory = self.peak_bytes.map(|peak| format!("\npeak memory: {}", bytes(peak))).unwrap_or_default();
        format!(
            "{} by {} on {} ({})\n{} tokens read, {} written, {} runs\n{table}{memory}",
            self.name,
            self.handle.backend.id,
            self.handle.device.name,
            self.handle.device.kind,
            self.workload.prompt_tokens,
            self.workload.generate_tokens,
            self.runs.len(),
        )
    }
}
