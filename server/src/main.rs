//! `mesh-llm`: serves local language models over an OpenAI-compatible API.

mod cli;

use std::io::Write;

fn main() {
    let code = cli::main();
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    // MLX keeps CUDA streams in C++ statics, whose destructors abort the process because the driver is gone before they
    // run. Everything of ours is drained by now, so the process ends without them.
    // SAFETY: plain exit; nothing is used afterwards.
    unsafe { libc::_exit(code.into()) }
}
