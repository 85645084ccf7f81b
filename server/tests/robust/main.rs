//! The program under load: many requests of every kind, clients that leave, engines that die. What is asserted holds for
//! any backend; see `load`.
#![cfg(target_os = "linux")]

mod load;
mod program;

use std::{
    path::Path,
    sync::atomic::{AtomicU32, Ordering::SeqCst},
    time::Duration,
};

use conformance::shared::golden;
use load::{Storm, Target};
use program::Program;

const LLAMA_SERVER: &str = "install_dir = {DIR}\nargs = [\"--threads\", \"1\"]\n";

fn llama_server(gguf: &Path, limits: &[&str]) -> Program {
    let file = gguf.to_string_lossy();
    let args = [&["--gguf-file", &file, "--ctx", "256"], limits].concat();
    Program::start(&args, &format!("[backends.llama-server]\n{LLAMA_SERVER}"))
}

fn mlx(weights: &Path, limits: &[&str]) -> Program {
    let file = weights.to_string_lossy();
    let args = [&["--mlx-file", &file, "--ctx", "256"], limits].concat();
    // What is remembered has a bound of its own, which is reached soon.
    Program::start(&args, "[backends.mlx]\ndevice = \"cpu\"\nprefix_bytes_max = 1048576\n")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// 2,000 requests, and llama-server killed ten times among them.
#[test]
fn only_requests_in_flight_notice_that_llama_server_was_killed() {
    const REQUESTS: u32 = 2000;
    const KILLS: u32 = 10;
    let Some(gguf) = golden("llama/model.gguf") else {
        return;
    };
    let mut program = llama_server(&gguf, &["--max-parallel", "4", "--max-queue", "32"]);
    let resident = std::sync::Mutex::new(Vec::new());
    let (killed, noticed) = (AtomicU32::new(0), AtomicU32::new(0));
    let report = runtime().block_on(async {
        let target = Target::of(&program.url, 256).await;
        let storm = Storm { target: &target, requests: REQUESTS, at_once: 16, killed: &killed, noticed: &noticed };
        let killer = async |done: &AtomicU32| {
            for kill in 1..=KILLS {
                while done.load(SeqCst) < kill * REQUESTS / (KILLS + 1) {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                let child = program.only_child().await;
                killed.fetch_add(1, SeqCst);
                program::kill(child);
                program.child_other_than(child).await;
                noticed.fetch_add(1, SeqCst);
            }
        };
        let report = storm.run(killer, || resident.lock().unwrap().push(program.resident_bytes())).await;
        target.all_at_once(4 + 32).await;
        report
    });
    println!("{report:?}");
    assert_eq!(killed.into_inner(), KILLS);
    // No more than are computed at a time; who waits is handed to the next engine.
    assert!((1..=KILLS * 4).contains(&report.broken), "{} were in flight when it was killed", report.broken);
    load::assert_flat(&resident.into_inner().unwrap());
    program.ends();
}

#[test]
fn a_crowd_before_llama_server_is_answered_or_told_to_come_back() {
    let Some(gguf) = golden("llama/model.gguf") else {
        return;
    };
    let mut program = llama_server(&gguf, &["--max-parallel", "4", "--max-queue", "16"]);
    runtime().block_on(async {
        let target = Target::of(&program.url, 256).await;
        target.crowd(200, 4 + 16).await;
        target.all_at_once(4 + 16).await;
    });
    program.ends();
}

/// As many requests of every kind, and a crowd, before an engine within the program.
#[test]
fn mlx_is_after_2000_requests_what_it_was_before() {
    let Some(weights) = golden("llama/model.safetensors") else { return };
    let mut program = mlx(&weights, &["--max-parallel", "4", "--max-queue", "32"]);
    let resident = std::sync::Mutex::new(Vec::new());
    let never = AtomicU32::new(0);
    let report = runtime().block_on(async {
        let target = Target::of(&program.url, 256).await;
        let storm = Storm { target: &target, requests: 2000, at_once: 16, killed: &never, noticed: &never };
        let report = storm.run(async |_| {}, || resident.lock().unwrap().push(program.resident_bytes())).await;
        target.all_at_once(4 + 32).await;
        report
    });
    println!("{report:?}");
    assert_eq!(report.broken, 0);
    load::assert_flat(&resident.into_inner().unwrap());
    program.ends();
}

#[test]
fn a_crowd_before_mlx_is_answered_or_told_to_come_back() {
    let Some(weights) = golden("llama/model.safetensors") else {
        return;
    };
    let mut program = mlx(&weights, &["--max-parallel", "4", "--max-queue", "16"]);
    runtime().block_on(async {
        let target = Target::of(&program.url, 256).await;
        target.crowd(200, 4 + 16).await;
        target.all_at_once(4 + 16).await;
    });
    program.ends();
}
