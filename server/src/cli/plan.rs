//! What the command line and the configuration file come to.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bytesize::ByteSize;
use mesh_core::{ElectionError, ModelProfile, ProgressSink, WeightFormat, registry};
use mesh_llm::{
    slots::{Keeping, Observer, StartError, Starter, StoreLocate},
    voting::Electorate,
};
use mesh_models::{DEFAULT_MODEL, Store, StoreOptions, Want, probe, reference::Reference};
use serde_json::{Value, json};

use super::{
    args::{ChoiceArgs, EnvironmentArgs, LimitArgs, ModelArgs, ServedArgs, WeightsArgs},
    config::{Config, ModelTable},
    failure::{Exit, Failure},
};

/// The port to listen on if none is named.
pub const PORT: u16 = 9337;
/// The backend that `--mlx` names.
pub const MLX: &str = "mlx";
/// The backend that `--llama-server` and `--no-install` are about.
pub const LLAMA_SERVER: &str = "llama-server";
/// The word that stands for "the best one, experimental ones included".
const AUTO: &str = "auto";

/// Which model shall be served, and by whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPlan {
    /// The model as the user spelled it.
    pub reference: String,
    /// Which weights.
    pub want: Want,
    /// True if `want` follows from the backend that was named, rather than being asked for.
    pub want_implied: bool,
    /// The backend that has to serve it.
    pub forced: Option<String>,
    /// Whether backends that have to be asked for may be elected unasked.
    pub opt_in: bool,
    /// Context asked for, in tokens.
    pub context_tokens: Option<u32>,
}

impl ModelPlan {
    /// From flags and configuration. `formats` tells what weights a backend reads.
    pub fn new(args: &ModelArgs, config: &Config, formats: impl Fn(&str) -> Vec<WeightFormat>) -> Self {
        let first = || config.models.first().map(|table| table.model.clone());
        let asked = asked(args.model.as_slice(), &args.weights, config).pop();
        let reference = asked.or_else(first).unwrap_or_else(|| DEFAULT_MODEL.to_owned());
        let table = match lookup(&reference, config) {
            Some(at) => config.models[at].clone(),
            None => ModelTable { model: reference, ..ModelTable::default() },
        };
        Self::listed(table, &args.weights, config, &formats).plan
    }

    /// A model with all that the configuration says of it. Flags go first.
    fn listed(
        table: ModelTable,
        weights: &WeightsArgs,
        config: &Config,
        formats: &impl Fn(&str) -> Vec<WeightFormat>,
    ) -> KeptPlan {
        let mlx = weights.choice.mlx || weights.mlx_file.is_some();
        let gguf = weights.choice.gguf || weights.gguf_file.is_some();
        let choice = ChoiceArgs { mlx, gguf, backend: weights.choice.backend.clone() };
        let backend = table.backend.or_else(|| config.backend.clone());
        let context_tokens = weights.ctx.or(table.ctx).or(config.ctx);
        let plan = Self::choose(table.model, &choice, backend, context_tokens, formats);
        KeptPlan { plan, name: table.name, pinned: table.pin, share_bytes: table.memory.map(|bytes| bytes.as_u64()) }
    }

    /// The same for commands that take the model as an argument. `configured` is the backend that the file names.
    pub fn choose(
        reference: String,
        choice: &ChoiceArgs,
        configured: Option<String>,
        context_tokens: Option<u32>,
        formats: impl Fn(&str) -> Vec<WeightFormat>,
    ) -> Self {
        // A flag about weights overrides a backend that only the file names.
        let configured = configured.filter(|_| !choice.gguf);
        let backend = if choice.mlx { Some(MLX.to_owned()) } else { choice.backend.clone().or(configured) };
        let opt_in = backend.as_deref() == Some(AUTO);
        let forced = backend.filter(|_| !opt_in);
        let (want, want_implied) = match (choice.mlx, choice.gguf) {
            (true, _) => (Want::Safetensors, false),
            (_, true) => (Want::Gguf, false),
            _ => match forced.as_deref().map(formats).as_deref() {
                Some([WeightFormat::Safetensors]) => (Want::Safetensors, true),
                Some([WeightFormat::Gguf]) => (Want::Gguf, true),
                _ => (Want::Any, false),
            },
        };
        Self { reference, want, want_implied, forced, opt_in, context_tokens }
    }
}

/// A model of a server, and how it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeptPlan {
    /// The model.
    pub plan: ModelPlan,
    /// The name to ask for it by, if not its own.
    pub name: Option<String>,
    /// Whether it stays in memory whatever comes.
    pub pinned: bool,
    /// Memory it shall have, in bytes, if not what it needs for itself.
    pub share_bytes: Option<u64>,
}

/// The models that are asked for, as the user spelled them: those of the command line, or else the file's one.
fn asked(models: &[String], weights: &WeightsArgs, config: &Config) -> Vec<String> {
    let file = weights.mlx_file.as_ref().or(weights.gguf_file.as_ref());
    match file {
        Some(file) => vec![file.display().to_string()],
        None if models.is_empty() => config.model.iter().cloned().collect(),
        None => models.to_vec(),
    }
}

/// The table of the configuration that a model was asked for by: by its name, or else by the model itself.
fn lookup(reference: &str, config: &Config) -> Option<usize> {
    let named = |table: &ModelTable| table.name.as_deref() == Some(reference);
    let same = |table: &ModelTable| table.model == reference;
    config.models.iter().position(named).or_else(|| config.models.iter().position(same))
}

/// The models of a server: those asked for, and then the others that the file lists. The first is the default.
pub fn kept(
    args: &ServedArgs,
    config: &Config,
    formats: impl Fn(&str) -> Vec<WeightFormat>,
) -> Result<Vec<KeptPlan>, Failure> {
    let mut asked = asked(&args.model, &args.weights, config);
    if asked.is_empty() && config.models.is_empty() {
        asked.push(DEFAULT_MODEL.to_owned());
    }
    let mut rest: Vec<_> = config.models.iter().cloned().map(Some).collect();
    let mut kept = Vec::new();
    for reference in asked {
        let table = lookup(&reference, config).and_then(|at| rest[at].take());
        let table = table.unwrap_or_else(|| ModelTable { model: reference, ..ModelTable::default() });
        kept.push(ModelPlan::listed(table, &args.weights, config, &formats));
    }
    // Flags of the command line are about the command line's models.
    let others = rest.into_iter().flatten();
    kept.extend(others.map(|table| ModelPlan::listed(table, &WeightsArgs::default(), config, &formats)));
    let mut names = BTreeSet::new();
    let handle = |kept: &KeptPlan| kept.name.clone().unwrap_or_else(|| kept.plan.reference.clone());
    if let Some(twice) = kept.iter().map(handle).find(|name| !names.insert(name.clone())) {
        return Err(Failure::new(Exit::Usage, format!("two models are called `{twice}`"))
            .hint("leave one of them out, or give it a `name` of its own in the configuration file"));
    }
    let reference_of = |name: &str, one: &KeptPlan| one.name.as_deref() != Some(name) && one.plan.reference == name;
    let is_anothers = |name: &&String| kept.iter().any(|one| reference_of(name, one));
    if let Some(name) = kept.iter().filter_map(|one| one.name.as_ref()).find(is_anothers) {
        return Err(Failure::new(Exit::Usage, format!("`{name}` names one model, and is another one"))
            .hint("give it another `name` in the configuration file"));
    }
    Ok(kept)
}

/// Everything commands work with.
pub struct Setting {
    /// The configuration file.
    pub config: Config,
    /// Models on disk and beyond.
    pub store: Arc<Store>,
    /// Who may serve.
    pub electorate: Arc<Electorate>,
}

impl Setting {
    /// From flags and configuration.
    pub fn new(args: &EnvironmentArgs) -> Result<Self, Failure> {
        Self::limited(args, &LimitArgs::default())
    }

    /// The same for commands that say how many requests are served at once.
    pub fn limited(args: &EnvironmentArgs, limits: &LimitArgs) -> Result<Self, Failure> {
        let config = Config::read(args.config.as_deref())?;
        let loading = registry::backends()?.iter().map(|backend| backend.info());
        // What needs no weights loads nothing, and has nothing to set.
        let known: Vec<&str> = loading.filter(|info| !info.formats.is_empty()).map(|info| info.id).collect();
        if let Some(name) = config.backends.keys().find(|name| !known.contains(&name.as_str())) {
            let message = format!("the configuration file has settings for a backend called `{name}`");
            return Err(Failure::new(Exit::Usage, message).hint(format!("backends are: {}", known.join(", "))));
        }
        let settings = settings(&config, args, limits);
        let offline = args.offline || config.offline.unwrap_or(false);
        let store = Store::new(StoreOptions {
            cache: config.cache.clone(),
            offline,
            catalog: config.catalog.clone(),
            memory_bytes: config.memory.map(|bytes| bytes.as_u64()),
            context_tokens: config.ctx,
        })?;
        let electorate = Electorate::linked(settings)?;
        Ok(Self { config, store: Arc::new(store), electorate: Arc::new(electorate) })
    }

    /// The same, with what a server knows of other machines' models.
    pub fn told(self, told: Value) -> Self {
        let electorate = Electorate::clone(&self.electorate).with_settings(mesh_backend_mesh::backend::INFO.id, told);
        Self { electorate: Arc::new(electorate), ..self }
    }

    /// The plan for a model, if its backend exists.
    pub fn plan(&self, args: &ModelArgs) -> Result<ModelPlan, Failure> {
        self.checked(ModelPlan::new(args, &self.config, |id| self.formats(id)))
    }

    /// Whether neither the command line nor the configuration file says which model to serve.
    pub fn names_no_model(&self, args: &ServedArgs) -> bool {
        self.config.models.is_empty() && asked(&args.model, &args.weights, &self.config).is_empty()
    }

    /// The plans for a server's models, if their backends exist.
    pub fn kept(&self, args: &ServedArgs) -> Result<Vec<KeptPlan>, Failure> {
        let kept = kept(args, &self.config, |id| self.formats(id))?;
        kept.into_iter().map(|kept| Ok(KeptPlan { plan: self.checked(kept.plan)?, ..kept })).collect()
    }

    /// The same for commands that take the model as an argument.
    pub fn choose(&self, reference: String, choice: &ChoiceArgs) -> Result<ModelPlan, Failure> {
        let (backend, context_tokens) = (self.config.backend.clone(), self.config.ctx);
        self.checked(ModelPlan::choose(reference, choice, backend, context_tokens, |id| self.formats(id)))
    }

    /// The name of a model on disk and what is known about it, which costs no more than a look at its headers.
    pub async fn local(&self, plan: &ModelPlan) -> (Option<String>, Option<Arc<ModelProfile>>) {
        let Ok(Reference::Path(_)) = Reference::parse(&plan.reference, Path::exists) else { return (None, None) };
        let artifact = self.store.locate(&plan.reference, plan.want, &ProgressSink::silent()).await;
        let Ok(artifact) = artifact else { return (None, None) };
        let name = artifact.name.clone();
        let profile = tokio::task::spawn_blocking(move || probe(&artifact).ok().map(Arc::new)).await;
        (Some(name), profile.ok().flatten())
    }

    /// How much of models is kept, and how long.
    pub fn keeping(&self, memory: Option<ByteSize>, idle_ttl_s: Option<u64>) -> Keeping {
        Keeping {
            memory_bytes: memory.or(self.config.memory).map(|bytes| bytes.as_u64()),
            idle_ttl: idle_ttl_s.or(self.config.idle_ttl_s).map(Duration::from_secs),
        }
    }

    /// A backend that does not exist is an error before anything is downloaded.
    fn checked(&self, plan: ModelPlan) -> Result<ModelPlan, Failure> {
        match &plan.forced {
            Some(name) if self.electorate.backend(name).is_none() => {
                let known = self.electorate.backends().iter().map(|backend| backend.info().id).collect();
                let error = ElectionError::UnknownBackend { name: name.clone(), known };
                Err(Failure::from(&StartError::Election(error)))
            }
            _ => Ok(plan),
        }
    }

    /// The weights a backend reads; none for a backend that does not exist.
    pub fn formats(&self, id: &str) -> Vec<WeightFormat> {
        self.electorate.backend(id).map(|backend| backend.info().formats.to_vec()).unwrap_or_default()
    }

    /// The start of a model.
    pub fn starter(&self, plan: &ModelPlan, progress: ProgressSink, observer: Observer) -> Starter {
        let locate = StoreLocate {
            store: self.store.clone(),
            reference: plan.reference.clone(),
            want: plan.want,
            want_implied: plan.want_implied,
        };
        Starter {
            reference: plan.reference.clone(),
            locate: Arc::new(locate),
            electorate: self.electorate.clone(),
            forced: plan.forced.clone(),
            opt_in: plan.opt_in,
            context_tokens: plan.context_tokens,
            manner: self.config.api.manner(),
            progress,
            observer,
        }
    }

    /// The address to listen on.
    pub fn address(&self, host: Option<IpAddr>, port: Option<u16>) -> SocketAddr {
        address(&self.config, host, port)
    }
}

fn address(config: &Config, host: Option<IpAddr>, port: Option<u16>) -> SocketAddr {
    let host = host.or(config.host).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    SocketAddr::new(host, port.or(config.port).unwrap_or(PORT))
}

/// Where this machine reaches its own server, as the configuration file has it.
pub fn local_address(config: &Config) -> SocketAddr {
    reachable(address(config, None, None))
}

/// The address under which this machine reaches a server that listens on all of its addresses.
pub fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => address.set_ip(std::net::Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// Backends whose engines have places and a line, and thus the two keys below.
const QUEUED: [&str; 2] = [MLX, LLAMA_SERVER];
/// Their key for `--max-parallel`.
const PARALLEL_KEY: &str = "parallel_requests_max";
/// An older name of it.
const PARALLEL_ALIAS: &str = "parallel";
/// Their key for `--max-queue`.
const QUEUE_KEY: &str = "queue_requests_max";

fn settings(config: &Config, args: &EnvironmentArgs, limits: &LimitArgs) -> BTreeMap<String, Value> {
    let mut settings = config.backends.clone();
    let mut section = |id: &str, change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let section = settings.entry(id.to_owned()).or_insert_with(|| json!({}));
        section.as_object_mut().map(change);
    };
    if let Some(path) = &args.llama_server {
        section(LLAMA_SERVER, &|section| drop(section.insert("path".into(), path_value(path))));
    }
    if args.no_install {
        section(LLAMA_SERVER, &|section| drop(section.insert("install".into(), false.into())));
    }
    // A flag goes before a backend's section, and that before the file's word for all backends.
    for id in QUEUED {
        if let Some(flag) = limits.max_parallel {
            section(id, &|section| {
                section.remove(PARALLEL_ALIAS);
                section.insert(PARALLEL_KEY.into(), flag.into());
            });
        } else if let Some(all) = config.max_parallel {
            section(id, &|section| {
                if !section.contains_key(PARALLEL_ALIAS) {
                    section.entry(PARALLEL_KEY).or_insert(all.into());
                }
            });
        }
        if let Some(flag) = limits.max_queue {
            section(id, &|section| drop(section.insert(QUEUE_KEY.into(), flag.into())));
        } else if let Some(all) = config.max_queue {
            section(id, &|section| {
                section.entry(QUEUE_KEY).or_insert(all.into());
            });
        }
    }
    settings
}

fn path_value(path: &Path) -> Value {
    path.display().to_string().into()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{
        super::args::{Cli, Command},
        *,
    };

    fn formats(id: &str) -> Vec<WeightFormat> {
        match id {
            "mlx" => vec![WeightFormat::Safetensors],
            "llama-server" => vec![WeightFormat::Gguf],
            _ => vec![],
        }
    }

    fn kept_with(line: &str, config: &str) -> Result<Vec<KeptPlan>, Failure> {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        kept(&cli.serve.model, &toml::from_str(config).unwrap(), formats)
    }

    fn plan_with(line: &str, config: &str) -> ModelPlan {
        let plan = kept_with(line, config).unwrap().remove(0).plan;
        let chat = line.replacen("mesh-llm", "mesh-llm chat", 1);
        let Some(Command::Chat(chat)) = Cli::try_parse_from(chat.split_whitespace()).unwrap().command else { panic!() };
        let one = ModelPlan::new(&chat.model, &toml::from_str(config).unwrap(), formats);
        assert_eq!(one, plan, "chat and serve understand `{line}` differently");
        plan
    }

    fn plan(line: &str) -> ModelPlan {
        plan_with(line, "")
    }

    #[test]
    fn the_documented_command_lines_mean_what_they_say() {
        let mlx = plan("mesh-llm --model Qwen3-4B-MLX --mlx");
        assert_eq!((mlx.want, mlx.forced.as_deref()), (Want::Safetensors, Some("mlx")));
        let gguf = plan("mesh-llm --model some-org/some-repo --gguf");
        assert_eq!((gguf.want, gguf.forced), (Want::Gguf, None));
        let file = plan("mesh-llm --gguf-file models/custom.gguf");
        assert_eq!((file.reference.as_str(), file.want, file.forced), ("models/custom.gguf", Want::Gguf, None));
        let file = plan("mesh-llm --mlx-file qwen-mlx/model.safetensors");
        assert_eq!((file.want, file.forced.as_deref()), (Want::Safetensors, Some("mlx")));
        let none = plan("mesh-llm");
        assert_eq!((none.reference.as_str(), none.want, none.opt_in), (DEFAULT_MODEL, Want::Any, false));
    }

    #[test]
    fn a_backend_implies_the_weights_it_reads() {
        let plan = plan("mesh-llm --backend mlx");
        assert_eq!((plan.want, plan.want_implied), (Want::Safetensors, true));
    }

    #[test]
    fn auto_opts_in_and_forces_nobody() {
        for plan in [plan("mesh-llm --backend auto"), plan_with("mesh-llm", "backend = \"auto\"")] {
            assert_eq!((plan.opt_in, plan.forced, plan.want), (true, None, Want::Any));
        }
    }

    #[test]
    fn the_command_line_goes_before_the_file() {
        let file = "model = \"a\"\nbackend = \"mlx\"\nctx = 100";
        let plan = plan_with("mesh-llm --model b --gguf --ctx 200", file);
        assert_eq!((plan.reference.as_str(), plan.forced, plan.context_tokens), ("b", None, Some(200)));
        assert_eq!(plan_with("mesh-llm", file).forced.as_deref(), Some("mlx"));
    }

    /// What models come to: their handles, with a `!` where they are pinned.
    fn said(line: &str, config: &str) -> String {
        match kept_with(line, config) {
            Ok(kept) => {
                let said = kept.iter().map(|KeptPlan { plan, name, pinned, .. }| {
                    let name = name.as_ref().map(|name| format!("{name}=")).unwrap_or_default();
                    let backend = plan.forced.as_ref().map(|id| format!(" by {id}")).unwrap_or_default();
                    let context = plan.context_tokens.map(|tokens| format!(" ctx {tokens}")).unwrap_or_default();
                    format!("{name}{}{backend}{context}{}", plan.reference, if *pinned { "!" } else { "" })
                });
                said.collect::<Vec<_>>().join(", ")
            }
            Err(failure) => failure.message,
        }
    }

    #[test]
    fn several_models_come_from_both_places_and_the_first_is_the_default() {
        let file = "ctx = 9\n[[models]]\nmodel = \"a\"\nname = \"x\"\nbackend = \"mlx\"\n\
                    [[models]]\nmodel = \"b\"\nctx = 7\npin = true";
        for (line, config, want) in [
            ("mesh-llm --model a --model b --mlx", "", "a by mlx, b by mlx"),
            ("mesh-llm", file, "x=a by mlx ctx 9, b ctx 7!"),
            ("mesh-llm --model c --gguf --ctx 5", file, "c ctx 5, x=a by mlx ctx 9, b ctx 7!"),
            // Asked for by either name, the file's model is the default.
            ("mesh-llm --model b", file, "b ctx 7!, x=a by mlx ctx 9"),
            ("mesh-llm --model x --ctx 5", file, "x=a by mlx ctx 5, b ctx 7!"),
            ("mesh-llm --model a", file, "x=a by mlx ctx 9, b ctx 7!"),
            ("mesh-llm", "model = \"b\"\n[[models]]\nmodel = \"a\"", "b, a"),
        ] {
            assert_eq!(said(line, config), want, "{line} with {config}");
        }
    }

    #[test]
    fn names_are_one_models() {
        let table = |name: &str| format!("[[models]]\nmodel = \"a\"\nname = \"{name}\"\n");
        assert_eq!(said("mesh-llm --model a --model a", ""), "two models are called `a`");
        assert_eq!(said("mesh-llm", &(table("x") + &table("x"))), "two models are called `x`");
        assert_eq!(said("mesh-llm", &(table("x") + &table("y"))), "x=a, y=a");
        assert_eq!(said("mesh-llm --model b", &table("b")), "b=a");
        let shadowed = table("b") + "[[models]]\nmodel = \"b\"\nname = \"c\"";
        assert_eq!(said("mesh-llm", &shadowed), "`b` names one model, and is another one");
    }

    #[test]
    fn llama_servers_flags_land_in_its_section() {
        let args = EnvironmentArgs { llama_server: Some("bin/x".into()), no_install: true, ..Default::default() };
        let config: Config = toml::from_str("[backends.llama-server]\nparallel = 2").unwrap();
        let settings = settings(&config, &args, &LimitArgs::default());
        assert_eq!(settings["llama-server"], json!({ "parallel": 2, "path": "bin/x", "install": false }));
        assert!(!settings.contains_key("mlx"));
    }

    #[test]
    fn limits_reach_every_backend_that_has_a_line() {
        let limited = |line: &str, file: &str| {
            let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
            let settings = settings(&toml::from_str(file).unwrap(), &EnvironmentArgs::default(), &cli.serve.limits);
            (settings.get("llama-server").cloned(), settings.get("mlx").cloned())
        };
        let both = |section: Value| (Some(section.clone()), Some(section));
        assert_eq!(limited("mesh-llm", ""), (None, None));
        let keys = json!({ "parallel_requests_max": 3, "queue_requests_max": 0 });
        assert_eq!(limited("mesh-llm --max-parallel 3 --max-queue 0", ""), both(keys.clone()));
        assert_eq!(limited("mesh-llm", "max_parallel = 3\nmax_queue = 0"), both(keys.clone()));
        assert_eq!(
            limited(
                "mesh-llm --max-parallel 3",
                "max_queue = 0\nmax_parallel = 9\n[backends.llama-server]\nparallel = 2"
            ),
            both(keys)
        );
        let (llama_server, mlx) = limited("mesh-llm", "max_parallel = 9\n[backends.llama-server]\nparallel = 2");
        assert_eq!((llama_server, mlx), (Some(json!({ "parallel": 2 })), Some(json!({ "parallel_requests_max": 9 }))));
    }
}
