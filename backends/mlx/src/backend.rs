//! The backend's registration.

use async_trait::async_trait;
use mesh_core::{
    BackendInfo, EngineHandle, Host, InferenceBackend, LoadError, LoadPlan, ModelFamily, ModelProfile, Need, OptIn,
    ProgressSink, Verdict, WeightFormat,
};
use serde_json::Value;

use crate::{device, host, judge};

/// Identity of the mlx backend.
pub static INFO: BackendInfo = BackendInfo {
    id: "mlx",
    title: "MLX in this process: Metal on macOS, CUDA or CPU on Linux",
    formats: &[WeightFormat::Safetensors],
    opt_in: Some(OptIn { flag: "--mlx", notice: "the MLX backend is experimental: please report what goes wrong" }),
};

struct Mlx;
mesh_core::register_backend!(&Mlx);

#[async_trait]
impl InferenceBackend for Mlx {
    fn info(&self) -> &'static BackendInfo {
        &INFO
    }

    fn host(&self, settings: &Value) -> Host {
        host::host(settings)
    }

    fn judge(&self, profile: &ModelProfile, family: Option<&dyn ModelFamily>, host: &Host) -> Verdict {
        judge::judge(profile, family, host)
    }

    fn need(&self, profile: &ModelProfile, host: &Host, context_tokens: u32) -> Option<Need> {
        judge::need(profile, host, context_tokens)
    }

    async fn load(&self, plan: LoadPlan, progress: ProgressSink) -> Result<EngineHandle, LoadError> {
        device::load(plan, progress).await
    }
}
