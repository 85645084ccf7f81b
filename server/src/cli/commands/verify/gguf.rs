//! A GGUF, computed by mlx and by llama-server: both have to choose the same tokens.
//!
//! mlx computes the imported directory, llama-server the same weights as 32-bit floats, so that neither rounds them; the
//! two are loaded one after the other. Both get the same prompt tokens. Where they choose differently, llama-server's
//! probabilities tell whether the choice was a close one, which the order of additions may decide.

use std::time::Duration;

use comfy_table::{Table, presets};
use console::style;
use futures::StreamExt;
use mesh_backend_llama_server::{BACKEND as LLAMA_SERVER_BACKEND, Candidate, LlamaEngine};
use mesh_core::{
    ElectionError, Engine, Event, InferenceBackend, Job, LoadPlan, ModelProfile, Offer, Prompt, Sampling, Verdict,
};
use mesh_llm::slots::StartError;
use mesh_models::{Artifact, probe};
use mesh_text::Tokenizer;
use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::{
    args::{BenchDevice, VerifyArgs},
    failure::{Exit, Failure},
    output::Output,
    plan::{LLAMA_SERVER, MLX, Setting},
};

const PROMPTS: [&str; 3] = ["The capital of France is", "def fibonacci(n):\n", "Water boils at a temperature of"];
/// Tokens written after each prompt.
const TOKENS: usize = 32;
/// Most tokens of a prompt and its continuation together: what models are loaded for.
const CONTEXT_TOKENS: u32 = 256;
/// How many of the likeliest tokens llama-server is asked for.
const CANDIDATES: u32 = 8;
/// Largest margin of a choice that may fall either way.
const MARGIN: f32 = 0.05;
/// How long an engine may take to stop.
const GRACE: Duration = Duration::from_secs(5);

pub async fn run(args: VerifyArgs, output: &Output) -> Result<(), Failure> {
    if args.bf16 || args.no_kernels {
        let flag = if args.bf16 { "--bf16" } else { "--no-kernels" };
        return Err(Failure::new(Exit::Usage, format!("{flag} is about directories; {} is a GGUF", args.model)));
    }
    let margin = args.tolerance.unwrap_or(MARGIN);
    let setting = Setting::new(&args.environment)?;
    let forms = setting.store.exact(&args.model, &output.progress_beside(args.json)).await?;
    let (imported, unpacked) = (profile(forms.imported).await?, profile(forms.unpacked).await?);
    let tokenizer = tokenizer(&imported)?;
    let prompts = encode(&tokenizer)?;

    let mut mlx_settings = setting.electorate.settings(MLX);
    match args.device {
        BenchDevice::Auto => {}
        BenchDevice::Cpu => set(&mut mlx_settings, "device", "cpu".into()),
        BenchDevice::Gpu => set(&mut mlx_settings, "device", "gpu".into()),
    }
    let backend = setting.electorate.backend(MLX).ok_or_else(|| Failure::new(Exit::Backend, "mlx is not linked"))?;
    let plan = plan(&setting, backend, imported, mlx_settings, &args.model)?;
    let handle = backend.load(plan.clone(), output.progress_beside(args.json)).await.map_err(load_failure)?;
    let chosen = continue_all(&*handle, &prompts).await;
    handle.drain(GRACE).await;
    let chosen = chosen?;

    let mut settings = setting.electorate.settings(LLAMA_SERVER);
    exact_cache(&mut settings);
    one_slot(&mut settings);
    let reference = self::plan(&setting, &LLAMA_SERVER_BACKEND, unpacked, settings, &args.model)?;
    let engine =
        LLAMA_SERVER_BACKEND.load_engine(&reference, output.progress_beside(args.json)).await.map_err(load_failure)?;
    let compared = compare_all(&engine, &prompts, &chosen, margin).await;
    engine.drain(GRACE).await;
    let compared = compared?;

    let passed = compared.iter().all(|compared| compared.passed);
    if args.json {
        let whole = json!({
            "model": plan.profile.name, "margin": margin, "device": plan.offer.device.kind, "passed": passed,
            "prompts": compared,
        });
        output.line(serde_json::to_string_pretty(&whole).map_err(|error| Failure::new(Exit::Failure, error))?);
    } else {
        output.line(text(&compared));
        let device = plan.offer.device.kind;
        output.line(format_args!("mlx on {device} against llama-server on 32-bit floats, margin {margin}"));
    }
    match passed {
        true => Ok(()),
        false => Err(Failure::new(Exit::Failure, "mlx and llama-server compute different tokens")),
    }
}

async fn profile(artifact: Artifact) -> Result<ModelProfile, Failure> {
    let probed = tokio::task::spawn_blocking(move || probe(&artifact)).await;
    probed.map_err(|error| Failure::new(Exit::Failure, error))?.map_err(|error| Failure::from(&StartError::from(error)))
}

fn tokenizer(profile: &ModelProfile) -> Result<Tokenizer, Failure> {
    let path = profile.tokenizer.as_ref().ok_or_else(|| Failure::new(Exit::Model, "the import has no tokenizer"))?;
    Tokenizer::from_file(&path.value).map_err(|error| Failure::new(Exit::Model, error))
}

fn encode(tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, Failure> {
    let encode = |prompt: &&str| tokenizer.encode(prompt, true);
    PROMPTS.iter().map(encode).collect::<Result<_, _>>().map_err(|error| Failure::new(Exit::Model, error))
}

fn set(settings: &mut Value, key: &str, value: Value) {
    if !settings.is_object() {
        *settings = json!({});
    }
    settings[key] = value;
}

/// Has llama-server keep keys and values as they are; its default is 16-bit floats.
fn exact_cache(settings: &mut Value) {
    let mut args = settings["args"].as_array().cloned().unwrap_or_default();
    args.extend(["--cache-type-k", "f32", "--cache-type-v", "f32"].map(Value::from));
    set(settings, "args", args.into());
}

/// Has llama-server make room for one request, as there is never another.
fn one_slot(settings: &mut Value) {
    if let Some(section) = settings.as_object_mut() {
        section.remove("parallel");
    }
    set(settings, "parallel_requests_max", 1.into());
}

fn plan(
    setting: &Setting,
    backend: &dyn InferenceBackend,
    profile: ModelProfile,
    settings: Value,
    model: &str,
) -> Result<LoadPlan, Failure> {
    let family = setting.electorate.family(&profile);
    let host = backend.host(&settings);
    let offer: Offer = match backend.judge(&profile, family, &host) {
        Verdict::Serve(offer) => offer,
        Verdict::Refuse(refusal) => {
            let (model, backend) = (model.to_owned(), backend.info().id);
            let error = ElectionError::ForcedRefused { model, backend, refusal, command: None };
            return Err(Failure::from(&StartError::Election(error)));
        }
    };
    let own = profile.context_tokens_max.as_ref().map_or(CONTEXT_TOKENS, |own| own.value);
    let context_tokens = Some(own.min(CONTEXT_TOKENS));
    Ok(LoadPlan { profile: profile.into(), family, offer, context_tokens, memory_bytes: None, settings })
}

fn load_failure(error: mesh_core::LoadError) -> Failure {
    Failure::from(&StartError::Load(error))
}

/// The likeliest tokens after each prompt, one after the other, past any end of text.
async fn continue_all(engine: &dyn Engine, prompts: &[Vec<u32>]) -> Result<Vec<Vec<u32>>, Failure> {
    let mut all = Vec::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let job = Job {
            sampling: Sampling::greedy(),
            tokens_max: Some(TOKENS as u32),
            ignore_eos: true,
            ..Job::new(format!("verify-{index}"), Prompt::Tokens(prompt.clone()))
        };
        let mut events = engine.submit(job).await.map_err(|error| Failure::new(Exit::Failure, error))?;
        let mut tokens = Vec::with_capacity(TOKENS);
        while let Some(event) = events.next().await {
            if let Event::Token { id, .. } = event.map_err(|error| Failure::new(Exit::Failure, error))? {
                tokens.push(id);
            }
        }
        all.push(tokens);
    }
    Ok(all)
}

/// What came of one prompt.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Compared {
    prompt: &'static str,
    /// Tokens that were equal before the first that was not.
    equal: usize,
    /// Tokens that were to be compared.
    of: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Difference>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<String>,
    passed: bool,
}

/// The first token that was chosen differently.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Difference {
    mlx: u32,
    llama_server: u32,
    /// How much likelier llama-server finds its choice, as a difference of natural logarithms; absent where mlx's is not
    /// among the likeliest at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    margin: Option<f32>,
}

/// How `chosen` differs from the likeliest of `candidates`, if it does.
fn difference(candidates: &[Candidate], chosen: u32) -> Option<Difference> {
    let best = candidates.first()?;
    let own = candidates.iter().find(|candidate| candidate.id == chosen);
    let margin = own.map(|own| best.logprob - own.logprob);
    (best.id != chosen).then_some(Difference { mlx: chosen, llama_server: best.id, margin })
}

async fn compare_all(
    engine: &LlamaEngine,
    prompts: &[Vec<u32>],
    chosen: &[Vec<u32>],
    margin: f32,
) -> Result<Vec<Compared>, Failure> {
    let failed = |error| Failure::new(Exit::Failure, error);
    let mut all = Vec::new();
    for ((text, prompt), chosen) in PROMPTS.iter().copied().zip(prompts).zip(chosen) {
        let mut compared =
            Compared { prompt: text, equal: 0, of: TOKENS, difference: None, fault: None, passed: false };
        let theirs = engine.tokenize(text, true).await.map_err(failed)?;
        if theirs != *prompt {
            compared.fault = Some(format!("the import's tokenizer makes {prompt:?} of it, llama-server {theirs:?}"));
            all.push(compared);
            continue;
        }
        let mut tokens = prompt.clone();
        for id in chosen.iter().take(TOKENS) {
            let candidates = engine.likeliest(&tokens, CANDIDATES).await.map_err(failed)?;
            compared.difference = difference(&candidates, *id);
            if compared.difference.is_some() {
                break;
            }
            compared.equal += 1;
            tokens.push(*id);
        }
        match &compared.difference {
            Some(difference) => compared.passed = difference.margin.is_some_and(|own| own < margin),
            None if compared.equal < TOKENS => compared.fault = Some(format!("mlx wrote {} tokens", chosen.len())),
            None => compared.passed = true,
        }
        all.push(compared);
    }
    Ok(all)
}

fn text(all: &[Compared]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for compared in all {
        let verdict = if compared.passed { style("ok").green() } else { style("FAILED").red() };
        table.add_row([format!("{:?}", compared.prompt), outcome(compared), verdict.to_string()]);
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

fn outcome(compared: &Compared) -> String {
    let Compared { equal, of, .. } = compared;
    if let Some(fault) = &compared.fault {
        return fault.clone();
    }
    let Some(Difference { mlx, llama_server, margin }) = compared.difference else {
        return format!("{equal} of {of} tokens equal");
    };
    let margin = match margin {
        Some(margin) => format!("margin {margin:.4}"),
        None => format!("not among the {CANDIDATES} likeliest"),
    };
    format!("{equal} of {of} tokens equal, then {mlx} instead of {llama_server}: {margin}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_has_the_margin_of_the_choice_that_was_made() {
        let candidates =
            [(5, -0.5), (7, -0.75), (9, -4.0)].map(|(id, logprob)| Candidate { id, bytes: Vec::new(), logprob });
        assert_eq!(difference(&candidates, 5), None);
        let differs = |mlx, margin| Some(Difference { mlx, llama_server: 5, margin });
        assert_eq!(difference(&candidates, 7), differs(7, Some(0.25)));
        assert_eq!(difference(&candidates, 9), differs(9, Some(3.5)));
        assert_eq!(difference(&candidates, 1), differs(1, None));
    }

    #[test]
    fn outcomes_are_said_in_one_line() {
        let whole = Compared { prompt: "a\n", equal: 32, of: 32, difference: None, fault: None, passed: true };
        let differs = |margin, passed| Compared {
            equal: 3,
            difference: Some(Difference { mlx: 7, llama_server: 5, margin }),
            passed,
            ..whole.clone()
        };
        let fault = Compared { fault: Some("it is broken".into()), passed: false, ..whole.clone() };
        let all = [whole.clone(), differs(Some(0.0125), true), differs(None, false), fault];
        insta::assert_snapshot!(console::strip_ansi_codes(&text(&all)));
    }

    #[test]
    fn settings_of_the_user_stay() {
        let mut settings = json!({ "path": "x", "args": ["--threads", "2"] });
        exact_cache(&mut settings);
        let args = ["--threads", "2", "--cache-type-k", "f32", "--cache-type-v", "f32"];
        assert_eq!(settings, json!({ "path": "x", "args": args }));
        let mut none = Value::Null;
        exact_cache(&mut none);
        assert_eq!(none["args"].as_array().unwrap().len(), 4);
    }
}
