#![no_main]
//! tokenizer_config.json, and the chat template in it, which is compiled and rendered.

use libfuzzer_sys::fuzz_target;
use mesh_text::{Template, TemplateInput};

fuzz_target!(|content: &[u8]| {
    let weights = mesh_fuzz::weights();
    let files = [("model.safetensors", &weights[..]), ("tokenizer_config.json", content)];
    let Some(template) = mesh_fuzz::understood(&files).and_then(|profile| profile.chat_template) else { return };
    let Ok(template) = Template::compile(&template.value.default) else { return };
    let messages =
        serde_json::json!([{ "role": "user", "content": "hello" }, { "role": "assistant", "content": "hi" }]);
    let rendered = template.render(&TemplateInput {
        messages: &messages,
        tools: None,
        add_generation_prompt: true,
        bos_token: Some("<s>"),
        eos_token: Some("</s>"),
        kwargs: &serde_json::Map::new(),
        now: chrono::NaiveDateTime::default(),
    });
    if let Ok(prompt) = rendered {
        assert!(prompt.len() <= mesh_text::template::OUTPUT_BYTES_MAX);
    }
});
