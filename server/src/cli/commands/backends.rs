//! `mesh-llm backends`.

use console::style;
use mesh_backend_llama_server::{InstallOptions, Settings, default_install_dir, install};

use crate::cli::{
    args::{BackendsArgs, BackendsCommand},
    failure::{Exit, Failure},
    output::Output,
    plan::{LLAMA_SERVER, Setting},
};

pub async fn run(args: BackendsArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::new(&args.environment)?;
    match args.command.unwrap_or(BackendsCommand::List) {
        BackendsCommand::List => {
            list(&setting, output);
            Ok(())
        }
        BackendsCommand::Install { name } => install_for(&name, &setting, output).await,
    }
}

fn list(setting: &Setting, output: &Output) {
    for backend in setting.electorate.backends() {
        let info = backend.info();
        let host = setting.electorate.host(*backend);
        let formats = info.formats.iter().map(ToString::to_string);
        let opt_in = info.opt_in.map(|opt_in| format!("asked for with {}", opt_in.flag));
        let remarks: Vec<_> = formats.chain(opt_in).collect();
        output.line(format_args!("{}: {} ({})", style(info.id).bold(), info.title, remarks.join(", ")));
        match &host.device {
            Ok(device) => output.line(format_args!("  device: {} ({})", device.name, device.kind)),
            Err(why) => output.line(format_args!("  {}: {why}", style("cannot run here").yellow())),
        }
        for note in &host.notes {
            output.line(format_args!("  {note}"));
        }
    }
}

async fn install_for(name: &str, setting: &Setting, output: &Output) -> Result<(), Failure> {
    if name != LLAMA_SERVER {
        let ids: Vec<_> = setting.electorate.backends().iter().map(|backend| backend.info().id).collect();
        let failure = if ids.contains(&name) {
            Failure::new(Exit::Usage, format!("{name} needs nothing installed"))
        } else {
            Failure::new(Exit::Usage, format!("no backend is called `{name}`; there are: {}", ids.join(", ")))
        };
        return Err(failure);
    }
    let settings = Settings::parse(&setting.electorate.settings(LLAMA_SERVER))
        .map_err(|error| Failure::new(Exit::Usage, format!("settings of {LLAMA_SERVER}: {error}")))?;
    let dir = settings.install_dir.or_else(default_install_dir).ok_or_else(|| {
        Failure::new(Exit::Failure, "this user has no data directory")
            .hint("set `install_dir` in [backends.llama-server]")
    })?;
    let installed = install(&InstallOptions::new(dir), &output.progress())
        .await
        .map_err(|error| Failure::new(Exit::Failure, error))?;
    output.step(
        "installed",
        format_args!("{} ({}): {}", installed.package, installed.version, installed.binary.display()),
    );
    Ok(())
}
