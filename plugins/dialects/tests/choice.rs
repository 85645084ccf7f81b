//! Which dialect a published template's model speaks, and by which variable its reasoning is switched.

use std::{env, fs, path::PathBuf};

use mesh_core::Thinking;
use mesh_text::{choice, dialects};

const ENABLE: Thinking = Thinking::Variable("enable_thinking");
const THINKING: Thinking = Thinking::Variable("thinking");
const EFFORT: Thinking = Thinking::Effort("reasoning_effort");
const FIXED: Thinking = Thinking::Fixed;

/// Dialect and switch.
type Manner = (&'static str, Thinking);

/// Template; what its model's family is known for, if there is one; the dialect and the switch to be found.
const TABLE: &[(&str, Option<Manner>, &str, Thinking)] = &[
    ("Apriel-1.6-15b-Thinker-fixed", Some(("mistral", FIXED)), "hermes", FIXED),
    ("Bielik-11B-v3.0-Instruct", Some(("llama3_json", FIXED)), "hermes", ENABLE),
    ("GLM-4.7-Flash", Some(("glm", ENABLE)), "glm", ENABLE),
    // Calls in a message of a role of its own, which is no dialect here.
    ("GigaChat3-10B-A1.8B", Some(("deepseek", THINKING)), "deepseek", FIXED),
    ("GigaChat3.1-10B-A1.8B", Some(("deepseek", THINKING)), "deepseek", FIXED),
    // The template offers no tools; its family's dialect reads the reasoning it shows.
    ("HuggingFaceTB-SmolLM3-3B", Some(("hermes", ENABLE)), "hermes", ENABLE),
    ("Kimi-K2-Thinking", Some(("kimi_k2", THINKING)), "kimi_k2", FIXED),
    ("LFM2.5-8B-A1B", Some(("pythonic", FIXED)), "pythonic", FIXED),
    ("MiMo-VL", None, "hermes", FIXED),
    ("MiniMax-M3", None, "minimax_m3", FIXED),
    ("Mistral-Small-3.2-24B-Instruct-2506", Some(("mistral", FIXED)), "mistral", FIXED),
    ("NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", None, "qwen3_coder", ENABLE),
    ("NVIDIA-Nemotron-Nano-v2", None, "hermes", FIXED),
    ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", Some(("llama3_json", FIXED)), "hermes", FIXED),
    ("Qwen-QwQ-32B", Some(("hermes", FIXED)), "hermes", ENABLE),
    ("Qwen-Qwen2.5-7B-Instruct", Some(("hermes", FIXED)), "hermes", FIXED),
    ("Qwen-Qwen3-0.6B", Some(("hermes", ENABLE)), "hermes", ENABLE),
    ("Qwen3.5-4B", Some(("qwen3_coder", ENABLE)), "qwen3_coder", ENABLE),
    ("Spark2.5", None, "glm", ENABLE),
    ("StepFun3.5-Flash", Some(("hermes", ENABLE)), "qwen3_coder", FIXED),
    ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", Some(("llama3_json", FIXED)), "deepseek", FIXED),
    ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", Some(("hermes", FIXED)), "deepseek", ENABLE),
    ("deepseek-ai-DeepSeek-V3.1", Some(("deepseek", THINKING)), "deepseek", THINKING),
    // `functools[…]`, which is no dialect here.
    ("fireworks-ai-llama-3-firefunction-v2", Some(("llama3_json", FIXED)), "llama3_json", FIXED),
    ("google-gemma-4-31B-it-interleaved", Some(("gemma4", ENABLE)), "gemma4", ENABLE),
    ("ibm-granite-granite-4.0", Some(("hermes", THINKING)), "hermes", FIXED),
    ("ibm-granite-granite-4.1", None, "hermes", FIXED),
    ("llama-cpp-deepseek-r1", Some(("deepseek", THINKING)), "deepseek", FIXED),
    ("llm-jp-llm-jp-4.1-8b-thinking", Some(("llama3_json", FIXED)), "harmony", EFFORT),
    ("meta-llama-Llama-3.1-8B-Instruct", Some(("llama3_json", FIXED)), "llama3_json", FIXED),
    ("meta-llama-Llama-3.2-3B-Instruct", None, "llama3_json", FIXED),
    ("meta-llama-Llama-3.3-70B-Instruct", Some(("llama3_json", FIXED)), "llama3_json", FIXED),
    ("microsoft-Phi-3.5-mini-instruct", Some(("plain", FIXED)), "plain", FIXED),
    ("mistralai-Ministral-3-14B-Reasoning-2512", Some(("mistral", FIXED)), "mistral", FIXED),
    ("mistralai-Mistral-Nemo-Instruct-2407", None, "mistral", FIXED),
    ("moonshotai-Kimi-K2", Some(("kimi_k2", THINKING)), "kimi_k2", FIXED),
    // `<function name="…"><param name="…">`, which is no dialect here; its reasoning is known.
    ("openbmb-MiniCPM5-1B", Some(("llama3_json", FIXED)), "think", ENABLE),
    ("poolside-Laguna-S-2.1", None, "glm", ENABLE),
    ("poolside-Laguna-XS-2.1", None, "glm", ENABLE),
    ("poolside-Laguna-XS.2", None, "glm", ENABLE),
    // Tags with a suffix, which are no dialect here.
    ("tencent-Hy3", None, "plain", EFFORT),
    ("unsloth-Apriel-1.5", Some(("mistral", FIXED)), "hermes", FIXED),
    // `<|tool_call:begin|>`, which is no dialect here.
    ("upstage-Solar-Open-100B", None, "plain", EFFORT),
];

#[test]
fn published_templates_speak_for_their_dialects() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/templates");
    let Ok(entries) = fs::read_dir(&root) else {
        assert!(env::var_os("CI").is_none(), "{}: not there", root.display());
        println!("skipped: templates ({} is not there)", root.display());
        return;
    };
    assert_eq!(dialects().unwrap().len(), mesh_dialects::linked());
    let mut failures = Vec::new();
    for path in entries.map(|entry| entry.expect("a directory entry").path()) {
        if path.extension().is_none_or(|extension| extension != "jinja") {
            continue;
        }
        let template = fs::read_to_string(&path).expect("readable");
        let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
        let Some((_, own, dialect, switch)) = TABLE.iter().find(|(template, ..)| *template == name) else {
            failures.push(format!("{name} is not in the table"));
            continue;
        };
        let choice = choice::choose(dialects().unwrap(), own.map(|(dialect, _)| dialect), &[&template]).unwrap();
        let thinking = choice::thinking(own.map_or(FIXED, |(_, thinking)| thinking), &[&template]);
        if (choice.dialect.id(), thinking) != (*dialect, *switch) {
            failures.push(format!("{name}: {} ({}), {thinking:?}", choice.dialect.id(), choice.why));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
