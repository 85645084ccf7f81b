//! One look at the server: is it there, what kind is it, which models has it, and what is known of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use mesh_core::Knob;
use serde_json::{Value, json};

use crate::{
    client::Upstream,
    error::Trouble,
    kind::{self, Asked, Kind, Manners, Thinking},
    probe,
    wire::Models,
};

/// Most models of a server that are offered.
pub(crate) const MODELS_MAX: usize = 256;
/// Longest name of a model, in bytes.
const NAME_BYTES_MAX: usize = 256;
/// Largest list of models that is read, in bytes.
const LIST_BYTES_MAX: usize = 4 << 20;
/// Largest answer about one model that is read, in bytes.
const DETAIL_BYTES_MAX: usize = 2 << 20;
/// How long what is known of models holds.
const DETAILS_MAX: Duration = Duration::from_secs(30);
/// Models that are asked about at the same time.
const AT_ONCE_MAX: usize = 4;
/// Most abilities of a model that are read.
const ABILITIES_MAX: usize = 32;
/// Models that are asked whether they give embeddings, where only asking tells.
const EMBEDDERS_ASKED_MAX: usize = 16;
/// The context of a model whose server does not tell, in tokens: what Ollama gives a model unless told otherwise, and no more
/// than any model of today has.
pub(crate) const CONTEXT_UNTOLD: u32 = 4096;

/// What one look found.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Found {
    pub kind: Kind,
    pub version: Option<String>,
    pub models: Vec<Facts>,
    /// Models beyond those that are offered, or with names that are none.
    pub left_out: usize,
}

/// What is known of a model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Facts {
    /// What it is offered as.
    pub name: String,
    /// What the server calls it, and how it tells of itself.
    pub id: String,
    pub manners: Manners,
    /// As the server says.
    pub context_tokens: Option<u32>,
    /// Requests computed at the same time, as it says.
    pub parallel: Option<u32>,
    /// Where the model is from, as it says.
    pub reference: Option<String>,
    pub quantization: Option<String>,
    pub parameters: Option<u64>,
    pub weight_bytes: Option<u64>,
    /// As another mesh-llm says.
    pub reasoning: Option<String>,
}

/// Looks, and remembers what need not be asked anew.
pub(crate) struct Looker {
    within: Duration,
    /// What the server that looks is called by itself.
    own: Option<String>,
    known: Option<Known>,
}

struct Known {
    kind: Kind,
    version: Option<String>,
    honoured: Vec<Asked>,
    /// Whether models give embeddings, where that had to be asked.
    embedders: BTreeMap<String, bool>,
    details: Details,
    at: Instant,
}

/// What a server tells of its models beside the list.
#[derive(Default)]
struct Details {
    ids: BTreeSet<String>,
    /// llama-server's `/props`.
    props: Value,
    /// LM Studio's `/api/v0/models`, by model.
    of: BTreeMap<String, Value>,
    /// Ollama's `/api/show`, by model.
    shown: BTreeMap<String, Shown>,
    /// Ollama's `/api/ps`: the contexts of loaded models.
    loaded: BTreeMap<String, u32>,
}

/// What is read of one answer of `/api/show`. A whole one holds licences and templates.
#[derive(Default)]
struct Shown {
    can: Option<Vec<String>>,
    /// The context that the model was made for.
    made_for: Option<u32>,
    /// The one that is set for it.
    set: Option<u32>,
    quantization: Option<String>,
    parameters: Option<u64>,
}

impl Looker {
    pub fn new(within: Duration, own: Option<String>) -> Self {
        Self { within, own, known: None }
    }

    /// Forgets what the server was: another may be in its place.
    pub fn forget(&mut self) {
        self.known = None;
    }

    pub async fn look(&mut self, upstream: &Upstream) -> Result<Found, Trouble> {
        let list: Models = upstream.get_json("/v1/models", self.within, LIST_BYTES_MAX).await?;
        let listed = list.data.len();
        let mut names = BTreeSet::new();
        let mut entries = list.data;
        entries.retain(|entry| serves(entry) && id(entry).is_some_and(|id| names.insert(offered(id).to_owned())));
        entries.truncate(MODELS_MAX);
        let ids: BTreeSet<String> = entries.iter().filter_map(id).map(str::to_owned).collect();
        if self.known.as_ref().is_some_and(|known| owner(&entries).is_some_and(|owner| owner != known.kind)) {
            self.forget();
        }
        let mut known = match self.known.take() {
            Some(known) => known,
            None => self.identify(upstream, &entries).await?,
        };
        if matches!(known.kind, Kind::LlamaServer | Kind::Vllm) {
            // The list is there before the model is, and after it broke.
            match upstream.get("/health", self.within, DETAIL_BYTES_MAX).await {
                // Whatever stands before the server does not let that through.
                Ok(_) | Err(Trouble::Refused { status: 400..=499, .. }) => {}
                Err(trouble) => return Err(trouble),
            }
        }
        if known.details.ids != ids || known.at.elapsed() > DETAILS_MAX {
            known.details = self.details(upstream, known.kind, ids).await?;
            known.at = Instant::now();
            self.ask_for_embeddings(upstream, &mut known).await?;
        }
        let models: Vec<Facts> = entries.iter().filter_map(|entry| facts(&known, entry)).collect();
        let (kind, version) = (known.kind, known.version.clone());
        // What an empty server is cannot be told for long.
        self.known = Some(known).filter(|_| !models.is_empty());
        Ok(Found { kind, version, left_out: listed - models.len(), models })
    }

    async fn identify(&self, upstream: &Upstream, entries: &[Value]) -> Result<Known, Trouble> {
        let (kind, version) = self.kind(upstream, entries).await?;
        let first = entries.iter().find_map(id).unwrap_or_default();
        let honoured =
            if first.is_empty() { Vec::new() } else { probe::honoured(upstream, kind, first, self.within).await? };
        tracing::debug!(%kind, ?honoured, "the shared server was asked what it honours");
        let details = Details::default();
        Ok(Known { kind, version, honoured, embedders: BTreeMap::new(), details, at: Instant::now() })
    }

    async fn kind(&self, upstream: &Upstream, entries: &[Value]) -> Result<(Kind, Option<String>), Trouble> {
        let version = |value: &Value| value.get("version").and_then(Value::as_str).map(short);
        let owner = owner(entries);
        if let Some(kind @ (Kind::Vllm | Kind::MeshLlm)) = owner {
            let told = self.told(upstream, "/version").await?;
            self.not_itself(&told)?;
            return Ok((kind, version(&told)));
        }
        if entries.is_empty() {
            // As a server does that has no model of its own, and lists what it has from elsewhere.
            self.not_itself(&self.told(upstream, "/version").await?)?;
        }
        let props = self.told(upstream, "/props").await?;
        if owner == Some(Kind::LlamaServer) || props.get("default_generation_settings").is_some() {
            return Ok((Kind::LlamaServer, props.get("build_info").and_then(Value::as_str).map(short)));
        }
        let home = sure(upstream.get("/", self.within, DETAIL_BYTES_MAX).await)?.unwrap_or_default();
        if home.starts_with(b"Ollama is running") {
            let told = self.told(upstream, "/api/version").await?;
            return Ok((Kind::Ollama, version(&told)));
        }
        let listed = self.told(upstream, "/api/v0/models").await?;
        let of_lm_studio = |entry: &Value| entry.get("max_context_length").is_some() && entry.get("state").is_some();
        if listed.get("data").and_then(Value::as_array).is_some_and(|data| data.iter().any(of_lm_studio)) {
            return Ok((Kind::LmStudio, None));
        }
        Ok((Kind::Other, None))
    }

    /// The address may be another one than the server listens on, and lead to it.
    fn not_itself(&self, version: &Value) -> Result<(), Trouble> {
        let instance = version.get("instance").and_then(Value::as_str);
        match &self.own {
            Some(own) if instance == Some(own) => Err(Trouble::Itself),
            _ => Ok(()),
        }
    }

    async fn details(&self, upstream: &Upstream, kind: Kind, ids: BTreeSet<String>) -> Result<Details, Trouble> {
        let mut details = Details::default();
        match kind {
            Kind::LlamaServer => details.props = self.told(upstream, "/props").await?,
            Kind::LmStudio => {
                let listed = self.told(upstream, "/api/v0/models").await?;
                let data = listed.get("data").and_then(Value::as_array).cloned().unwrap_or_default();
                details.of = data.into_iter().filter_map(|entry| Some((id(&entry)?.to_owned(), entry))).collect();
            }
            Kind::Ollama => {
                let loaded = self.told(upstream, "/api/ps").await?;
                let loaded = loaded.get("models").and_then(Value::as_array).cloned().unwrap_or_default();
                let context = |model: &Value| {
                    let name = model.get("name").or(model.get("model"))?.as_str()?.to_owned();
                    Some((name, number(model.get("context_length"))?))
                };
                details.loaded = loaded.iter().filter_map(context).collect();
                let shown = stream::iter(ids.clone()).map(|id| async move {
                    let body = json!({ "model": id });
                    let shown = upstream.post::<Value>("/api/show", &body, self.within, DETAIL_BYTES_MAX).await;
                    Ok::<_, Trouble>((id, Shown::of(&sure(shown)?.unwrap_or_default())))
                });
                let shown: Vec<_> = shown.buffer_unordered(AT_ONCE_MAX).collect().await;
                details.shown = shown.into_iter().collect::<Result<_, _>>()?;
            }
            Kind::Vllm | Kind::MeshLlm | Kind::Other => {}
        }
        Ok(Details { ids, ..details })
    }

    /// Where neither the list nor the details tell, a request does.
    async fn ask_for_embeddings(&self, upstream: &Upstream, known: &mut Known) -> Result<(), Trouble> {
        if !matches!(known.kind, Kind::Vllm | Kind::LlamaServer | Kind::Other) {
            return Ok(());
        }
        known.embedders.retain(|id, _| known.details.ids.contains(id));
        let new: Vec<_> = known.details.ids.iter().filter(|id| !known.embedders.contains_key(*id)).collect();
        for id in new.into_iter().take(EMBEDDERS_ASKED_MAX) {
            let body = json!({ "model": id, "input": "a" });
            let answer = upstream.post::<Value>("/v1/embeddings", &body, self.within, DETAIL_BYTES_MAX).await;
            let vector = sure(answer)?.unwrap_or_default();
            let gives = vector.pointer("/data/0/embedding").is_some_and(Value::is_array);
            known.embedders.insert(id.clone(), gives);
        }
        Ok(())
    }

    /// What is said at `path`; null where it is refused.
    async fn told(&self, upstream: &Upstream, path: &str) -> Result<Value, Trouble> {
        Ok(sure(upstream.get_json(path, self.within, DETAIL_BYTES_MAX).await)?.unwrap_or_default())
    }
}

/// An answer, or none where the server has none to this question. That it is gone is something else.
fn sure<T>(answer: Result<T, Trouble>) -> Result<Option<T>, Trouble> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error @ (Trouble::Unreachable(_) | Trouble::Broke(_) | Trouble::Silent(_))) => Err(error),
        Err(_) => Ok(None),
    }
}

fn id(entry: &Value) -> Option<&str> {
    let id = entry.get("id")?.as_str()?;
    let fine = !offered(id).is_empty() && id.len() <= NAME_BYTES_MAX && !id.contains(char::is_control);
    fine.then_some(id)
}

/// What the model of that id is offered as: the id, unless that is a place in the files of the server's machine, as llama-server and
/// vLLM call what they were given as one. Of that the last part is what a model is called.
fn offered(id: &str) -> &str {
    let windows = id.get(1..3).is_some_and(|drive| matches!(drive, ":\\" | ":/"));
    if !id.starts_with('/') && !windows {
        return id;
    }
    let last = id.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or_default();
    last.strip_suffix(".gguf").unwrap_or(last)
}

/// Whether a model of the list can be asked for. Another mesh-llm lists those that failed, too, and those that it has from
/// elsewhere: two that share each other would offer such a model for as long as both live, whoever had it.
fn serves(entry: &Value) -> bool {
    let word = |key: &str| entry.get(key).and_then(Value::as_str);
    let from_elsewhere = word("owned_by") == Some("mesh-llm") && matches!(word("backend"), Some("share" | "mesh"));
    !from_elsewhere && !matches!(word("status"), Some("failed" | "stopped"))
}

/// The kind that the models' owner tells.
fn owner(entries: &[Value]) -> Option<Kind> {
    match entries.iter().find_map(|entry| entry.get("owned_by")?.as_str())? {
        "vllm" => Some(Kind::Vllm),
        "llamacpp" => Some(Kind::LlamaServer),
        "mesh-llm" => Some(Kind::MeshLlm),
        _ => None,
    }
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

/// A number of tokens or places, if it is one and above 0.
fn number(value: Option<&Value>) -> Option<u32> {
    u32::try_from(value?.as_u64()?).ok().filter(|number| *number > 0)
}

fn words(value: Option<&Value>) -> Option<impl Iterator<Item = &str>> {
    Some(value?.as_array()?.iter().filter_map(Value::as_str))
}

fn facts(known: &Known, entry: &Value) -> Option<Facts> {
    let id = id(entry)?.to_owned();
    let mut manners = known.kind.manners();
    known.honoured.iter().for_each(|asked| asked.settle(&mut manners));
    manners.embeddings = known.embedders.get(&id).copied().unwrap_or(false);
    let text = |key: &str| entry.get(key).and_then(Value::as_str).filter(|text| text.len() <= NAME_BYTES_MAX);
    let mut facts = Facts {
        manners,
        context_tokens: None,
        parallel: None,
        reference: None,
        quantization: None,
        parameters: None,
        weight_bytes: None,
        reasoning: None,
        name: offered(&id).to_owned(),
        id,
    };
    match known.kind {
        Kind::Vllm => {
            facts.context_tokens = number(entry.get("max_model_len"));
            // It serves a model for the one or the other.
            let embeds = facts.manners.embeddings;
            (facts.manners.chat, facts.manners.text) = (!embeds, !embeds);
        }
        Kind::LlamaServer => of_llama_server(&mut facts, entry, known),
        Kind::Ollama => of_ollama(&mut facts, known),
        Kind::LmStudio => of_lm_studio(&mut facts, known),
        Kind::MeshLlm => {
            facts.quantization = text("quantization").map(str::to_owned);
            facts.parameters = entry.get("parameters").and_then(Value::as_u64);
            facts.weight_bytes = entry.get("weight_bytes").and_then(Value::as_u64);
            facts.context_tokens = number(entry.get("context_length"));
            of_mesh_llm(&mut facts, entry.get("capabilities").unwrap_or(&Value::Null));
        }
        Kind::Other => {
            let keys = ["max_model_len", "context_length", "context_window", "max_context_length"];
            let trained = || number(entry.pointer("/meta/n_ctx_train"));
            facts.context_tokens = keys.iter().find_map(|key| number(entry.get(*key))).or_else(trained);
        }
    }
    Some(facts)
}

fn of_llama_server(facts: &mut Facts, entry: &Value, known: &Known) {
    let props = &known.details.props;
    facts.parameters = entry.pointer("/meta/n_params").and_then(Value::as_u64);
    facts.weight_bytes = entry.pointer("/meta/size").and_then(Value::as_u64);
    let meta = |key: &str| number(entry.pointer(key));
    facts.context_tokens = meta("/meta/n_ctx").or_else(|| meta("/meta/n_ctx_train"));
    // With several models the settings are nobody's in particular.
    if known.details.ids.len() == 1 {
        facts.context_tokens =
            number(props.pointer("/default_generation_settings/n_ctx")).or(facts.context_tokens.take());
        facts.parallel = number(props.get("total_slots"));
        if let Some(template) = props.get("chat_template").and_then(Value::as_str) {
            let (switch, effort) = (template.contains("enable_thinking"), template.contains("reasoning_effort"));
            if switch || effort {
                facts.manners.thinking = Thinking::Variables { switch, effort };
            }
        }
    }
}

impl Shown {
    fn of(shown: &Value) -> Self {
        let text = |key: &str| shown.pointer(key).and_then(Value::as_str).filter(|text| text.len() <= 64);
        let parameters = shown.get("parameters").and_then(Value::as_str).unwrap_or_default();
        let made_for = text("/model_info/general.architecture")
            .and_then(|architecture| number(shown.get("model_info")?.get(format!("{architecture}.context_length"))));
        let can = words(shown.get("capabilities"));
        Self {
            can: can.map(|can| can.take(ABILITIES_MAX).map(short).collect()),
            made_for,
            set: parameters.lines().find_map(|line| line.trim().strip_prefix("num_ctx")?.trim().parse().ok()),
            quantization: text("/details/quantization_level").map(str::to_owned),
            parameters: shown.pointer("/model_info/general.parameter_count").and_then(Value::as_u64),
        }
    }
}

fn of_ollama(facts: &mut Facts, known: &Known) {
    let loaded = known.details.loaded.get(&facts.id).copied();
    let none = Shown::default();
    let shown = known.details.shown.get(&facts.id).unwrap_or(&none);
    facts.quantization = shown.quantization.clone();
    facts.parameters = shown.parameters;
    // What the model was made for is not what it is given: that is what is set, or 4096 tokens, and more is cut off.
    let made_for = || shown.made_for.filter(|tokens| *tokens <= CONTEXT_UNTOLD);
    facts.context_tokens = loaded.or(shown.set.filter(|set| *set > 0)).or_else(made_for);
    if let Some(can) = &shown.can {
        let can = |word: &str| can.iter().any(|one| one == word);
        let manners = &mut facts.manners;
        (manners.chat, manners.text) = (can("completion"), can("completion"));
        manners.tools = can("tools");
        manners.embeddings = can("embedding");
        if can("thinking") {
            manners.thinking = Thinking::Effort;
        }
    }
}

fn of_lm_studio(facts: &mut Facts, known: &Known) {
    let none = Value::Null;
    let listed = known.details.of.get(&facts.id).unwrap_or(&none);
    let text = |key: &str| listed.get(key).and_then(Value::as_str).filter(|text| text.len() <= 64);
    facts.quantization = text("quantization").map(str::to_owned);
    // A model that is not loaded gets a context when it is, which may be less than what it was made for.
    let own = || number(listed.get("max_context_length")).filter(|own| *own <= CONTEXT_UNTOLD);
    facts.context_tokens = number(listed.get("loaded_context_length")).or_else(own);
    if text("type") == Some("embeddings") {
        facts.manners.embeddings = true;
        (facts.manners.chat, facts.manners.text) = (false, false);
    }
}

fn of_mesh_llm(facts: &mut Facts, can: &Value) {
    let says = |key: &str| can.get(key).and_then(Value::as_bool);
    let manners = &mut facts.manners;
    manners.chat = says("chat").unwrap_or(true);
    manners.tools = says("tools").unwrap_or(true);
    manners.embeddings = says("embeddings").unwrap_or(false);
    facts.reasoning = can.get("reasoning").and_then(Value::as_str).map(short);
    if let Some(parameters) = words(can.get("parameters")) {
        manners.knobs = parameters.filter_map(kind::knob).collect();
        let grammar = |word: &str| match word {
            "json_schema" => Some(Knob::JsonSchema),
            "regex" => Some(Knob::Regex),
            "lark" => Some(Knob::Lark),
            _ => None,
        };
        let grammars = words(can.get("grammars")).into_iter().flatten().filter_map(grammar);
        manners.knobs.extend(grammars);
    }
}
