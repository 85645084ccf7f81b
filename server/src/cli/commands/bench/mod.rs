//! `mesh-llm bench`: how fast a model, or the shape of one, reads and writes.

mod constrained;
mod report;

use std::sync::Arc;

use comfy_table::{Table, presets};
use mesh_backend_mlx::bench::{RandomWeights, Shape, random_engine, shapes, take_peak_bytes};
use mesh_core::{Device, Engine, EngineHandle, Grammar, registry};
use mesh_llm::measure::{
    Conversation, MeasureError, Workload, measure, measure_behind, measure_conversation, measure_crowd,
    resume_conversation,
};
use serde_json::{Value, json};

use crate::cli::{
    args::{BenchArgs, BenchDevice},
    failure::{Exit, Failure},
    output::{Output, bytes},
    plan::{ModelPlan, Setting},
};

/// After a restart, an engine brings back what its files hold while nobody waits.
const PAUSE_AFTER_RESTART: std::time::Duration = std::time::Duration::from_secs(3);

/// How long an engine may take to stop.
const GRACE: std::time::Duration = std::time::Duration::from_secs(5);

/// The backend whose memory is this process's.
const MLX: &str = "mlx";

pub async fn run(args: BenchArgs, output: &Output) -> Result<(), Failure> {
    let (name, handle, vocab_size) = started(&args, output).await?;
    let workload = Workload {
        prompt_tokens: args.prompt_tokens,
        generate_tokens: args.generate_tokens,
        runs: args.runs,
        vocab_size,
    };
    take_peak_bytes();
    let schema = |text: &String| {
        let schema = serde_json::from_str(text).map_err(|error| Failure::new(Exit::Usage, error))?;
        Ok::<_, Failure>(Grammar::JsonSchema(Arc::new(schema)))
    };
    let grammar = args.constrain.clone().map(|regex| Ok(Grammar::Regex(regex.into())));
    let grammar = grammar.or_else(|| args.constrain_schema.as_ref().map(schema)).transpose()?;
    let constrained = match (grammar, &args.tokenizer) {
        (Some(grammar), Some(path)) => Some(constrained::Constrained::new(&*handle, path, grammar)?),
        _ => None,
    };
    let engine: &dyn Engine = constrained.as_ref().map_or(&*handle, |engine| engine);
    let measured = match (&args.streams[..], args.behind, args.conversation) {
        (_, Some(tokens), _) => {
            measure_behind(engine, workload, tokens).await.map(|runs| report::behind(tokens, &runs))
        }
        (_, _, Some(turns)) => {
            let conversation =
                Conversation { turns, tokens: args.prompt_tokens, answer_tokens: args.generate_tokens, vocab_size };
            measure_conversation(engine, conversation).await.map(report::conversation)
        }
        ([], ..) => measure(engine, workload).await.map(|runs| report::runs(&runs)),
        (streams, ..) => crowds(engine, workload, streams).await,
    };
    let peak = (handle.backend.id == MLX).then(take_peak_bytes).filter(|peak| *peak > 0);
    handle.drain(GRACE).await;
    let mut measured = measured.map_err(|error| Failure::new(Exit::Failure, error))?;
    if let Some(prompt) = measured.resume.take() {
        // What is known after a restart: nothing, unless prefixes are kept in files.
        let (_, again, _) = started(&args, output).await?;
        tokio::time::sleep(PAUSE_AFTER_RESTART).await;
        let resumed = resume_conversation(&*again, &prompt).await;
        again.drain(GRACE).await;
        let (ttft_s, cached_tokens) = resumed.map_err(|error| Failure::new(Exit::Failure, error))?;
        measured.after_restart(ttft_s, cached_tokens);
    }
    let report = Report { name, handle: &handle, workload, measured, peak_bytes: peak };
    match args.json {
        true => output
            .line(serde_json::to_string_pretty(&report.json()).map_err(|error| Failure::new(Exit::Failure, error))?),
        false => output.line(report.text()),
    }
    Ok(())
}

async fn started(args: &BenchArgs, output: &Output) -> Result<(String, EngineHandle, u32), Failure> {
    let Some(name) = &args.shape else {
        let setting = Setting::new(&args.environment)?;
        let plan = ModelPlan::new(&args.model, &setting.config, |id| setting.formats(id));
        let starter = setting.starter(&plan, output.progress_beside(args.json), Arc::new(|_| {}));
        let served = starter.start().await.map_err(|error| Failure::from(&error))?;
        let vocab_size = served.profile.vocab_size.as_ref().map_or(1000, |fact| fact.value);
        return Ok((served.profile.name.clone(), served.handle.clone(), vocab_size));
    };
    let shape = shape(name)?;
    let vocab_size = shape.config["vocab_size"].as_u64().unwrap_or(1) as u32;
    let weights = RandomWeights { bits: args.bits, seed: args.seed, kernels: !args.no_kernels };
    let handle = random_engine(&shape, weights, device(args.device)?, &settings(&args.settings)?)
        .await
        .map_err(|error| Failure::new(Exit::Load, error))?;
    Ok((format!("{name}, {} bits, random weights", args.bits), handle, vocab_size))
}

/// Each `KEY=VALUE`, the value being JSON or else a string.
fn settings(given: &[String]) -> Result<Value, Failure> {
    let mut settings = serde_json::Map::new();
    for setting in given {
        let Some((key, value)) = setting.split_once('=') else {
            return Err(
                Failure::new(Exit::Usage, format!("`--set {setting}` has no `=`")).hint("write --set KEY=VALUE")
            );
        };
        settings.insert(key.to_owned(), serde_json::from_str(value).unwrap_or_else(|_| value.into()));
    }
    Ok(Value::Object(settings))
}

async fn crowds(engine: &dyn Engine, workload: Workload, streams: &[u32]) -> Result<report::Measured, MeasureError> {
    let mut all = Vec::new();
    for count in streams {
        all.push(measure_crowd(engine, workload, *count).await?);
    }
    Ok(report::crowds(&all))
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
    measured: report::Measured,
    peak_bytes: Option<u64>,
}

impl Report<'_> {
    fn json(&self) -> Value {
        let mut whole = json!({
            "model": self.name,
            "backend": self.handle.backend.id,
            "device": self.handle.device,
            "prompt_tokens": self.workload.prompt_tokens,
            "generate_tokens": self.workload.generate_tokens,
            "peak_bytes": self.peak_bytes,
        });
        if let (Some(whole), Value::Object(own)) = (whole.as_object_mut(), self.measured.json.clone()) {
            whole.extend(own);
        }
        whole
    }

    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(&self.measured.header);
        for row in &self.measured.rows {
            table.add_row(row);
        }
        let table = table.to_string();
        let table = table.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
        let memory = self.peak_bytes.map(|peak| format!("\npeak memory: {}", bytes(peak))).unwrap_or_default();
        format!(
            "{} by {} on {} ({})\n{} tokens read, {} written, {}\n{table}{memory}",
            self.name,
            self.handle.backend.id,
            self.handle.device.name,
            self.handle.device.kind,
            self.workload.prompt_tokens,
            self.workload.generate_tokens,
            self.measured.what,
        )
    }
}
