//! What the command line and the configuration file come to.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
};

use mesh_core::{ElectionError, ProgressSink, WeightFormat, registry};
use mesh_llm::{
    slots::{Observer, StartError, Starter, StoreLocate},
    voting::Electorate,
};
use mesh_models::{DEFAULT_MODEL, Store, StoreOptions, Want};
use serde_json::{Value, json};

use super::{
    args::{ChoiceArgs, EnvironmentArgs, LimitArgs, ModelArgs},
    config::Config,
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
        let file = args.mlx_file.as_ref().or(args.gguf_file.as_ref());
        let reference = match (file, &args.model, &config.model) {
            (Some(file), ..) => file.display().to_string(),
            (None, Some(model), _) | (None, None, Some(model)) => model.clone(),
            (None, None, None) => DEFAULT_MODEL.to_owned(),
        };
        let mlx = args.choice.mlx || args.mlx_file.is_some();
        let gguf = args.choice.gguf || args.gguf_file.is_some();
        let choice = ChoiceArgs { mlx, gguf, backend: args.choice.backend.clone() };
        Self::choose(reference, &choice, config, args.ctx.or(config.ctx), formats)
    }

    /// The same for commands that take the model as an argument.
    pub fn choose(
        reference: String,
        choice: &ChoiceArgs,
        config: &Config,
        context_tokens: Option<u32>,
        formats: impl Fn(&str) -> Vec<WeightFormat>,
    ) -> Self {
        // A flag about weights overrides a backend that only the file names.
        let configured = config.backend.clone().filter(|_| !choice.gguf);
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
        let known = registry::backends()?.ids();
        if let Some(name) = config.backends.keys().find(|name| !known.contains(&name.as_str())) {
            let message = format!("the configuration file has settings for a backend called `{name}`");
            return Err(Failure::new(Exit::Usage, message).hint(format!("backends are: {}", known.join(", "))));
        }
        let settings = settings(&config, args, limits);
        let offline = args.offline || config.offline.unwrap_or(false);
        let store = Store::new(StoreOptions { cache: config.cache.clone(), offline })?;
        let electorate = Electorate::linked(settings)?;
        Ok(Self { config, store: Arc::new(store), electorate: Arc::new(electorate) })
    }

    /// The plan for a model, if its backend exists.
    pub fn plan(&self, args: &ModelArgs) -> Result<ModelPlan, Failure> {
        self.checked(ModelPlan::new(args, &self.config, |id| self.formats(id)))
    }

    /// The same for commands that take the model as an argument.
    pub fn choose(&self, reference: String, choice: &ChoiceArgs) -> Result<ModelPlan, Failure> {
        self.checked(ModelPlan::choose(reference, choice, &self.config, self.config.ctx, |id| self.formats(id)))
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
            progress,
            observer,
        }
    }

    /// The address to listen on.
    pub fn address(&self, host: Option<IpAddr>, port: Option<u16>) -> SocketAddr {
        let host = host.or(self.config.host).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        SocketAddr::new(host, port.or(self.config.port).unwrap_or(PORT))
    }
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

    use super::{super::args::Cli, *};

    fn plan_with(line: &str, config: &str) -> ModelPlan {
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        let config: Config = toml::from_str(config).unwrap();
        ModelPlan::new(&cli.serve.model, &config, |id| match id {
            "mlx" => vec![WeightFormat::Safetensors],
            "llama-server" => vec![WeightFormat::Gguf],
            _ => vec![],
        })
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
