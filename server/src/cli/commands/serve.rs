//! `mesh-llm serve`.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    sync::{
        Arc, Once,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use mesh_core::Hint;
use mesh_llm::{
    listen::{self, Options},
    slots::{Keeping, Observer, RemoteModels, Slot, SlotPlan, SlotState, Slots, StartStep},
    tls::Tls,
};
use tokio::{net::TcpListener, sync::mpsc};

use crate::cli::{
    access,
    args::{ClientArgs, ServeArgs},
    failure::{Exit, Failure},
    mesh::{self, Others},
    output::{Output, bytes},
    plan::{KeptPlan, Setting, reachable},
};

/// How long running requests may take once the server is told to stop.
const GRACE: Duration = Duration::from_secs(30);

pub async fn run(args: ServeArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::limited(&args.environment, &args.limits)?;
    let shares = !args.mesh.share.is_empty() || !setting.config.share.is_empty();
    let kept = if shares && setting.names_no_model(&args.model) { Vec::new() } else { setting.kept(&args.model)? };
    let wanted = setting.address(args.host, args.port);
    let options = access::options(&args.access, &setting.config.access, wanted.ip())?;
    // Bound before anything is loaded: a model takes its time, an address does not.
    let listener = listen::bind(wanted).await.map_err(|error| in_words(wanted, &error))?;
    let address = listener.local_addr().unwrap_or(wanted);
    let others = Others {
        shared: mesh::shared(&args.mesh, &setting.config.share, address).await?,
        mesh: mesh::mesh(&args.mesh, &setting.config.mesh).await?,
    };
    others.announce(output);
    let kept = loaded_here(kept, &others, &setting)?;

    let (steps, mut outcomes) = mpsc::unbounded_channel();
    let notice = Arc::new(Once::new());
    let mut plans = Vec::new();
    for (index, KeptPlan { plan, name, pinned, share_bytes }) in kept.into_iter().enumerate() {
        let at_start = index == 0 || pinned;
        let (own_name, profile) = if at_start { (None, None) } else { setting.local(&plan).await };
        let (said, steps) = (observer(output.clone(), notice.clone()), steps.clone());
        let observer: Observer = Arc::new(move |step| {
            said(step);
            // Two kinds of steps end a start; the channel holds as many as there were starts.
            if matches!(step, StartStep::Ready(_) | StartStep::Failed(_)) {
                steps.send((index, step.clone())).ok();
            }
        });
        let starter = setting.starter(&plan, output.progress(), observer);
        plans.push(SlotPlan { starter, name, own_name, profile, pinned, share_bytes, at_start });
    }
    let remote = RemoteModels::new(others.sources(), setting.config.api.manner());
    let slots = Slots::spawn_beside(plans, setting.keeping(args.memory, args.idle_ttl), remote);
    others.serve(&slots);
    let first = slots.clone();
    let load = tokio::spawn(async move {
        for slot in first.iter().filter(|slot| slot.at_start()) {
            // Said by the observer, whatever comes of it.
            slot.model(None).await.ok();
        }
    });

    let scheme = if options.tls.is_some() { "https" } else { "http" };
    let key = if options.policy.keys.is_empty() { "" } else { " -H 'authorization: Bearer KEY'" };
    let failed = async {
        let mut starting: Vec<usize> =
            slots.iter().enumerate().filter(|(_, slot)| slot.at_start()).map(|(index, _)| index).collect();
        let mut failures = Vec::new();
        while !starting.is_empty() {
            let Some((index, step)) = outcomes.recv().await else { break };
            starting.retain(|other| *other != index);
            if let StartStep::Failed(error) = &step {
                failures.push(Failure::from(&**error));
                // The only one ends the program, which says why.
                if slots.iter().count() > 1 {
                    log(&slots, index, &step);
                }
            }
        }
        if !failures.is_empty() && failures.len() >= slots.iter().count() {
            return failures.swap_remove(0);
        }
        announce(output, address, scheme, key, &slots);
        // From here on a failure is the next request's to repair.
        while let Some((index, step)) = outcomes.recv().await {
            log(&slots, index, &step);
        }
        std::future::pending().await
    };
    let outcome = tokio::select! {
        failure = failed => Err(failure),
        () = serve(listener, slots.clone(), options, output) => Ok(()),
    };
    load.abort();
    if outcome.is_err() {
        slots.drain(Duration::ZERO).await;
    }
    others.leave().await;
    outcome
}

/// Those of the models that this machine has to load: what other machines are to serve is listed while they offer it.
fn loaded_here(kept: Vec<KeptPlan>, others: &Others, setting: &Setting) -> Result<Vec<KeptPlan>, Failure> {
    let needs_weights = |plan: &KeptPlan| plan.plan.forced.as_ref().is_none_or(|id| !setting.formats(id).is_empty());
    let (here, there): (Vec<_>, Vec<_>) = kept.into_iter().partition(needs_weights);
    for plan in &there {
        let reference = &plan.plan.reference;
        if plan.name.is_some() || plan.pinned || plan.share_bytes.is_some() || plan.plan.context_tokens.is_some() {
            let message =
                format!("other machines are to serve `{reference}`: its name, context and memory are theirs to set");
            return Err(Failure::new(Exit::Usage, message)
                .hint("leave `name`, `ctx`, `memory` and `pin` out, or name another backend"));
        }
        if others.mesh.is_none() {
            let message = format!("other machines are to serve `{reference}`, and this one takes part in no mesh");
            return Err(Failure::new(Exit::Usage, message)
                .hint("mesh-llm mesh create, or mesh-llm serve --join TICKET; or name another backend"));
        }
    }
    Ok(here)
}

/// `mesh-llm client`: what others serve, and nothing of this machine's own.
pub async fn client(args: ClientArgs, output: &Output) -> Result<(), Failure> {
    let setting = Setting::new(&args.environment)?;
    let wanted = setting.address(args.host, args.port);
    let options = access::options(&args.access, &setting.config.access, wanted.ip())?;
    let listener = listen::bind(wanted).await.map_err(|error| in_words(wanted, &error))?;
    let address = listener.local_addr().unwrap_or(wanted);
    let mesh = mesh::mesh(&args.mesh, &setting.config.mesh).await?;
    let Some(mesh) = mesh else {
        return Err(mesh::failure(&mesh_backend_mesh::HomeError::NoMesh));
    };
    let shared = mesh::shared(&args.mesh, &setting.config.share, address).await?;
    let others = Others { shared, mesh: Some(mesh) };
    others.announce(output);
    let remote = RemoteModels::new(others.sources(), setting.config.api.manner());
    let slots = Slots::spawn_beside(Vec::new(), Keeping::default(), remote);
    others.serve(&slots);
    let scheme = if options.tls.is_some() { "https" } else { "http" };
    output.line(format_args!("listening on {scheme}://{address}"));
    output.line(format_args!("the models of the other machines: curl {scheme}://{}/v1/models", reachable(address)));
    serve(listener, slots, options, output).await;
    others.leave().await;
    Ok(())
}

async fn serve(listener: TcpListener, slots: Slots, options: Options, output: &Output) {
    let reload = options.tls.clone().map(|tls| tokio::spawn(reload(tls)));
    let stop = async {
        interrupted().await;
        output.line("stopping; running answers have 30 s, a second signal ends at once");
        tokio::spawn(async {
            interrupted().await;
            // SAFETY: plain exit; nothing is used afterwards. The destructors of C++ that a usual one runs do not survive it
            // while the device works.
            unsafe { libc::_exit(130) }
        });
    };
    listen::serve_with(listener, slots, options, stop, GRACE).await;
    if let Some(reload) = reload {
        reload.abort();
    }
}

/// Reads certificates again whenever it is told to.
async fn reload(tls: Tls) {
    #[cfg(unix)]
    if let Ok(mut hangup) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()) {
        while hangup.recv().await.is_some() {
            match tls.reload() {
                Ok(()) => tracing::info!("the certificates were read again"),
                Err(error) => tracing::error!(%error, hint = error.hint(), "the certificates stay as they were"),
            }
        }
    }
    #[cfg(not(unix))]
    drop(tls);
}

/// Returns on Ctrl-C or, where there is such a thing, a request to terminate.
pub(super) async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    tokio::signal::ctrl_c().await.ok();
}

fn in_words(address: SocketAddr, error: &std::io::Error) -> Failure {
    match error.kind() {
        ErrorKind::AddrInUse => Failure::new(Exit::Address, format!("{address} is in use by another process"))
            .hint("stop that process, or choose another port with --port (0 takes any free one)"),
        ErrorKind::PermissionDenied => Failure::new(Exit::Address, format!("{address} may not be listened on"))
            .hint("choose a port above 1023 with --port"),
        ErrorKind::AddrNotAvailable => {
            Failure::new(Exit::Address, format!("{address} is not an address of this machine"))
                .hint("choose one with --host; 0.0.0.0 stands for all of them")
        }
        _ => Failure::new(Exit::Address, format!("{address} cannot be listened on: {error}")),
    }
}

/// Says what a model's first start does, in order. The notice of a backend is printed once for all models.
pub(super) fn observer(output: Output, notice: Arc<Once>) -> Observer {
    let served = AtomicBool::new(false);
    Arc::new(move |step| match step {
        StartStep::Ready(_) => served.store(true, Ordering::Relaxed),
        // What is loaded again after it made room, or broke, is told by the log.
        _ if served.load(Ordering::Relaxed) => {}
        StartStep::Locating { reference } => output.step("model", reference),
        StartStep::Located(profile) => {
            let weights = bytes(profile.weight_bytes.value);
            output.step("found", format_args!("{} ({}, {weights})", profile.root.display(), profile.format.value));
        }
        StartStep::Elected(elected) => {
            // The first reason is the one that decided; `explain` gives them all.
            let reason = elected.offer.reasons.first().map(|reason| format!(": {reason}")).unwrap_or_default();
            let device = &elected.offer.device;
            let text = format!("{} on {} ({}){reason}", elected.backend.id, device.name, device.kind);
            output.step("backend", text);
            if let Some(text) = elected.notice {
                notice.call_once(|| output.notice(text));
            }
        }
        StartStep::Failed(_) => {}
    })
}

/// What the log says of a start after the first ones.
fn log(slots: &Slots, index: usize, step: &StartStep) {
    let model = slots.iter().nth(index).map(Slot::name).unwrap_or_default();
    match step {
        StartStep::Ready(served) => tracing::info!(
            model,
            backend = served.handle.backend.id,
            context_tokens = served.handle.capabilities().context_tokens_max,
            "ready"
        ),
        StartStep::Failed(error) => {
            tracing::error!(model, %error, hint = error.hint(), "the model failed; the next request starts it again");
        }
        StartStep::Locating { .. } | StartStep::Located(_) | StartStep::Elected(_) => {}
    }
}

fn announce(output: &Output, address: SocketAddr, scheme: &str, key: &str, slots: &Slots) {
    output.line(format_args!("listening on {scheme}://{address}"));
    let ready = |slot: &&Slot| matches!(slot.state(), SlotState::Ready(_));
    let own = slots.iter().find(ready).or(slots.iter().next()).map(Slot::name);
    let model = own.or_else(|| slots.remote().names().into_iter().next());
    let body = serde_json::json!({ "model": model, "messages": [{ "role": "user", "content": "Hello" }] });
    let body = body.to_string().replace('\'', r"'\''");
    output.line(format_args!(
        "try: curl {scheme}://{}/v1/chat/completions -H 'content-type: application/json'{key} -d '{body}'",
        reachable(address)
    ));
    let later: Vec<_> = slots.iter().filter(|slot| !slot.at_start()).map(Slot::name).collect();
    if !later.is_empty() {
        output.line(format_args!("loaded when asked for: {}", later.join(", ")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_in_use_is_named_with_a_way_out() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap();
        let failure = in_words(address, &listen::bind(address).await.unwrap_err());
        assert_eq!(failure.exit, Exit::Address);
        assert_eq!(failure.message, format!("{address} is in use by another process"));
        assert!(failure.hint.unwrap().contains("--port"));
    }

    #[test]
    fn all_addresses_are_reached_by_the_local_one() {
        assert_eq!(reachable("0.0.0.0:80".parse().unwrap()).to_string(), "127.0.0.1:80");
        assert_eq!(reachable("[::]:80".parse().unwrap()).to_string(), "[::1]:80");
        assert_eq!(reachable("10.0.0.1:80".parse().unwrap()).to_string(), "10.0.0.1:80");
    }
}
