//! What was measured, as a table and as JSON.

use mesh_llm::measure::{BehindRun, ConversationRun, CrowdRun, Run, Spread};
use serde_json::{Value, json};

/// What was measured.
pub struct Measured {
    /// What was done, in words.
    pub what: String,
    /// The columns.
    pub header: Vec<String>,
    /// The rows, each with a label first.
    pub rows: Vec<Vec<String>>,
    /// The same, and all single runs.
    pub json: Value,
    /// A prompt to be asked again after a restart.
    pub resume: Option<Vec<u32>>,
}

fn spreads(what: String, rows: &[(&str, f64, Spread)], json: Value) -> Measured {
    let cells = |(label, scale, spread): &(&str, f64, Spread)| {
        let cell = |value: f64| format!("{:.1}", value * scale);
        vec![(*label).to_owned(), cell(spread.median), cell(spread.min), cell(spread.max)]
    };
    let header = ["", "median", "min", "max"].map(str::to_owned).to_vec();
    Measured { what, header, rows: rows.iter().map(cells).collect(), json, resume: None }
}

/// One request at a time.
pub fn runs(runs: &[Run]) -> Measured {
    let spread = |value: fn(&Run) -> f64| Spread::of(runs.iter().map(value));
    let (prefill, decode, ttft) =
        (spread(|run| run.prefill_tokens_per_s), spread(|run| run.decode_tokens_per_s), spread(|run| run.ttft_s));
    let rows = [
        ("prefill, tokens/s", 1.0, prefill),
        ("decode, tokens/s", 1.0, decode),
        ("time to first token, ms", 1000.0, ttft),
    ];
    let json = json!({ "runs": runs, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode, "ttft_s": ttft });
    spreads(format!("{} runs", runs.len()), &rows, json)
}

/// Several at once, for each number of them.
pub fn crowds(all: &[Vec<CrowdRun>]) -> Measured {
    let header = ["requests at once", "tokens/s", "min", "max", "with prompts", "time to first token, ms", "p95"];
    let mut rows = Vec::new();
    let mut json = Vec::new();
    for runs in all {
        let streams = runs.first().map_or(0, |run| run.streams);
        let decode = Spread::of(runs.iter().map(|run| run.decode_tokens_per_s));
        let total = Spread::of(runs.iter().map(|run| run.total_tokens_per_s));
        let ttft: Vec<f64> = runs.iter().flat_map(|run| run.ttft_s.iter().copied()).collect();
        let cells = [
            decode.median,
            decode.min,
            decode.max,
            total.median,
            Spread::of(ttft.iter().copied()).median * 1000.0,
            Spread::p95(ttft.iter().copied()) * 1000.0,
        ];
        rows.push([streams.to_string()].into_iter().chain(cells.map(|cell| format!("{cell:.1}"))).collect());
        json.push(json!({
            "streams": streams,
            "decode_tokens_per_s": decode,
            "total_tokens_per_s": total,
            "ttft_s": Spread::of(ttft.iter().copied()),
            "ttft_p95_s": Spread::p95(ttft),
            "runs": runs,
        }));
    }
    let what = format!("{} runs", all.first().map_or(0, Vec::len));
    let header = header.map(str::to_owned).to_vec();
    Measured { what, header, rows, json: json!({ "crowds": json }), resume: None }
}

/// A short request behind a long one.
pub fn behind(tokens: u32, runs: &[BehindRun]) -> Measured {
    let ttft = Spread::of(runs.iter().map(|run| run.ttft_s));
    let long = Spread::of(runs.iter().map(|run| run.long_ttft_s));
    let p95 = Spread::p95(runs.iter().map(|run| run.ttft_s));
    let rows = [
        ("time to first token, ms", 1000.0, ttft),
        ("of which 95 % within, ms", 1000.0, Spread { median: p95, min: p95, max: p95 }),
        ("of the long prompt, ms", 1000.0, long),
    ];
    let json = json!({ "behind_tokens": tokens, "runs": runs, "ttft_s": ttft, "ttft_p95_s": p95, "long_ttft_s": long });
    spreads(format!("{} runs, each behind a prompt of {tokens} tokens", runs.len()), &rows, json)
}

/// A conversation.
pub fn conversation(run: ConversationRun) -> Measured {
    let header = ["turn", "prompt tokens", "shared", "not computed", "time to first token, ms"].map(str::to_owned);
    let mut rows: Vec<Vec<String>> = run
        .turns
        .iter()
        .enumerate()
        .map(|(index, turn)| {
            let counts = [turn.prompt_tokens, turn.shared_tokens, turn.cached_tokens].map(|count| count.to_string());
            let ttft = format!("{:.1}", turn.ttft_s * 1000.0);
            [(index + 1).to_string()].into_iter().chain(counts).chain([ttft]).collect()
        })
        .collect();
    let row = |label: &str, ttft_s: f64| {
        vec![label.into(), String::new(), String::new(), String::new(), format!("{:.1}", ttft_s * 1000.0)]
    };
    rows.push(row("the last, again", run.warm_ttft_s));
    rows.push(row("unknown, as long", run.cold_ttft_s));
    let (reused, ratio) = (run.reused_min(), run.warm_ttft_s / run.cold_ttft_s.max(f64::EPSILON));
    let what = format!(
        "{} turns; of what turns share at least {:.1} % was not computed; warm takes {:.2} % of cold",
        run.turns.len(),
        reused * 100.0,
        ratio * 100.0
    );
    let json = json!({ "conversation": run, "reused_min": reused, "warm_over_cold": ratio });
    Measured { what, header: header.to_vec(), rows, json, resume: Some(run.last_prompt) }
}

impl Measured {
    /// Adds how the last prompt went with another engine.
    pub fn after_restart(&mut self, ttft_s: f64, cached_tokens: u32) {
        let cached = cached_tokens.to_string();
        let ttft = format!("{:.1}", ttft_s * 1000.0);
        self.rows.push(vec!["after a restart".into(), String::new(), String::new(), cached, ttft]);
        self.json["after_restart"] = json!({ "ttft_s": ttft_s, "cached_tokens": cached_tokens });
    }
}
