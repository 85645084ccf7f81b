//! `mesh-llm models verify`.

use mesh_models::{Checked, Verdict};
use serde_json::{Value, json};

use super::print;
use crate::cli::{
    failure::{Exit, Failure},
    output::{Output, bytes},
    plan::Setting,
};

pub async fn run(setting: &Setting, model: Option<&str>, json: bool, output: &Output) -> Result<(), Failure> {
    let checked = setting.store.verify(model, &output.progress_beside(json)).await?;
    if json {
        let files: Vec<Value> = checked.iter().map(as_json).collect();
        output.line(json!({ "files": files }));
    } else {
        let row = |one: &Checked| vec![one.model.clone(), one.file.clone(), bytes(one.bytes), said(&one.verdict)];
        print(checked.iter().map(row), &["model", "file", "size", "verdict"], output);
    }
    let bad = |one: &&Checked| matches!(one.verdict, Verdict::Damaged { .. } | Verdict::Missing);
    let Some(first) = checked.iter().find(bad) else { return Ok(()) };
    let count = checked.iter().filter(bad).count();
    let files = if count == 1 { "file is" } else { "files are" };
    let model = &first.model;
    Err(Failure::new(Exit::Model, format!("{count} {files} not as published"))
        .hint(format!("run: mesh-llm models remove {model} && mesh-llm models download {model}")))
}

fn said(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Sound => "sound".into(),
        Verdict::Damaged { expected, actual } => format!("damaged: {actual}; expected {expected}"),
        Verdict::Missing => "missing".into(),
        Verdict::Unknown => "unknown: nothing says what its hash should be".into(),
    }
}

fn as_json(one: &Checked) -> Value {
    let (verdict, hashes) = match &one.verdict {
        Verdict::Sound => ("sound", Value::Null),
        Verdict::Damaged { expected, actual } => ("damaged", json!({ "expected": expected, "actual": actual })),
        Verdict::Missing => ("missing", Value::Null),
        Verdict::Unknown => ("unknown", Value::Null),
    };
    json!({ "model": one.model, "file": one.file, "bytes": one.bytes, "verdict": verdict, "hashes": hashes })
}
