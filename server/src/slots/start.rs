//! The start of a model: locate, probe, judge, elect, load.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use mesh_core::{Device, Elected, ElectionRequest, Fact, LoadPlan, ModelFamily, ModelProfile, ProgressSink, Source};
use mesh_models::{FetchError, Store, Want, probe};

use super::StartError;
use crate::{
    defaults::Manner,
    served::{ServedModel, Voice},
    voting::Electorate,
};

/// Finds a model and what is known about it.
#[async_trait]
pub trait Locate: Send + Sync {
    /// May download; reports that to `progress`.
    async fn locate(&self, progress: &ProgressSink) -> Result<ModelProfile, StartError>;
}

/// Finds a model in the store.
pub struct StoreLocate {
    /// The store.
    pub store: Arc<Store>,
    /// The model as the user spelled it.
    pub reference: String,
    /// Which weights, where it has several kinds.
    pub want: Want,
    /// True if `want` only follows from the backend that was named. Where the model has no such weights, it is that
    /// backend that says so.
    pub want_implied: bool,
}

#[async_trait]
impl Locate for StoreLocate {
    async fn locate(&self, progress: &ProgressSink) -> Result<ModelProfile, StartError> {
        let artifact = match self.store.locate(&self.reference, self.want, progress).await {
            Err(FetchError::WrongFormat { .. }) if self.want_implied => {
                self.store.locate(&self.reference, Want::Any, progress).await?
            }
            outcome => outcome?,
        };
        let profile = tokio::task::spawn_blocking(move || probe(&artifact)).await;
        Ok(profile.map_err(|_| StartError::Panicked { what: "reading the model's headers" })??)
    }
}

/// How far a start has come.
#[derive(Clone, Debug)]
pub enum StartStep {
    /// The model is being looked for.
    Locating {
        /// As the user spelled it.
        reference: String,
    },
    /// It was found.
    Located(Arc<ModelProfile>),
    /// It will be served by this backend.
    Elected(Elected),
    /// It is ready.
    Ready(Arc<ServedModel>),
    /// It failed.
    Failed(Arc<StartError>),
}

/// Who is told how far a start has come, and with that who logs it. Must return quickly.
pub type Observer = Arc<dyn Fn(&StartStep) + Send + Sync>;

/// Everything needed to start one model, as often as it takes.
#[derive(Clone)]
pub struct Starter {
    /// The model as the user spelled it.
    pub reference: String,
    /// Finds it.
    pub locate: Arc<dyn Locate>,
    /// Who may serve it.
    pub electorate: Arc<Electorate>,
    /// The backend that has to serve it, if one was named.
    pub forced: Option<String>,
    /// Whether backends that have to be asked for may be elected unasked.
    pub opt_in: bool,
    /// Context asked for, in tokens.
    pub context_tokens: Option<u32>,
    /// How it is presented to clients.
    pub manner: Manner,
    /// Told about downloads and loads.
    pub progress: ProgressSink,
    /// Told about steps.
    pub observer: Observer,
}

impl fmt::Debug for Starter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Starter").field("reference", &self.reference).field("forced", &self.forced).finish()
    }
}

impl Starter {
    /// The election this start asks for.
    pub fn election_request(&self) -> ElectionRequest {
        ElectionRequest { model: self.reference.clone(), forced: self.forced.clone(), opt_in: self.opt_in }
    }

    /// Gets the model ready, however much room it takes. Dropping the future abandons the start.
    pub async fn start(&self) -> Result<Arc<ServedModel>, StartError> {
        let candidate = self.elect(|device| device.memory_bytes).await?;
        self.load(candidate, None).await
    }

    /// Finds the model, and who serves it. `memory_bytes` is what a device has for models, as backends shall see it.
    pub async fn elect(
        &self,
        memory_bytes: impl Fn(&Device) -> Option<u64> + Send + 'static,
    ) -> Result<Candidate, StartError> {
        (self.observer)(&StartStep::Locating { reference: self.reference.clone() });
        let profile = Arc::new(self.locate.locate(&self.progress).await?);
        (self.observer)(&StartStep::Located(profile.clone()));

        let (electorate, judged) = (self.electorate.clone(), self.judged(&profile));
        let votes = tokio::task::spawn_blocking(move || electorate.votes(&judged, memory_bytes))
            .await
            .map_err(|_| StartError::Panicked { what: "asking the backends" })?;
        let elected = votes.elect(&self.election_request())?;
        let id = elected.backend.id;
        for reason in &elected.offer.reasons {
            tracing::debug!(backend = id, %reason, "elected");
        }
        (self.observer)(&StartStep::Elected(elected.clone()));

        let family = self.electorate.family(&profile);
        let voice = Voice::of(&profile, family)?;
        Ok(Candidate { profile, family, voice, elected })
    }

    /// The model as backends shall judge it: with the context it will have, so that their arithmetic is about that.
    fn judged(&self, profile: &Arc<ModelProfile>) -> Arc<ModelProfile> {
        let own = profile.context_tokens_max.as_ref();
        match (self.context_tokens, own) {
            (Some(asked), Some(own)) if asked < own.value => {
                let context_tokens_max = Some(Fact::new(asked, Source::file("as asked for")));
                Arc::new(ModelProfile { context_tokens_max, ..ModelProfile::clone(profile) })
            }
            _ => profile.clone(),
        }
    }

    /// Loads it. The engine may hold `memory_bytes`, or all its device has.
    pub async fn load(&self, candidate: Candidate, memory_bytes: Option<u64>) -> Result<Arc<ServedModel>, StartError> {
        let Candidate { profile, family, voice, elected } = candidate;
        let id = elected.backend.id;
        let backend =
            self.electorate.backend(id).ok_or(StartError::Panicked { what: "finding the elected backend" })?;
        let plan = LoadPlan {
            profile: profile.clone(),
            family,
            offer: elected.offer,
            context_tokens: self.context_tokens,
            memory_bytes,
            settings: self.electorate.settings(id),
        };
        let handle = backend.load(plan, self.progress.clone()).await?;
        let manner = self.manner;
        let model = tokio::task::spawn_blocking(move || ServedModel::new(profile, voice, handle, manner))
            .await
            .map_err(|_| StartError::Panicked { what: "reading the tokenizer" })??;
        Ok(Arc::new(model))
    }
}

/// A model that was found, and who will serve it.
pub struct Candidate {
    /// What is known about it.
    pub profile: Arc<ModelProfile>,
    /// Who serves it, and how.
    pub elected: Elected,
    family: Option<&'static dyn ModelFamily>,
    voice: Voice,
}
