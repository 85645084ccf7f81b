//! Mixtures of experts: a router, and MLPs of which each token goes through a few.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

use crate::{
    config::DecoderConfig,
    elementwise::Activation,
    ffi,
    linear::{Bias, Linear},
    mlp::Mlp,
    model::GraphError,
    router::RouterSpec,
    weights::{Matrix, Weights},
};

/// From this many pairs of token and expert on, tokens are sorted by expert, so that each expert's weights are read once.
const SORT_FROM: usize = 64;

/// What stands between the projections of an expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExpertActivation {
    /// `activation(gate) · up`.
    Gated(Activation),
    /// gpt-oss': `gate` is clipped from above and `up` on both sides, `(up + 1) · gate · sigmoid(alpha · gate)`.
    Clipped {
        /// Where values are clipped.
        limit: f32,
        /// Steepness of the sigmoid.
        alpha: f32,
    },
}

impl ExpertActivation {
    fn forward(self, gate: &Array, up: &Array) -> Result<Array, Exception> {
        match self {
            Self::Gated(activation) => activation.forward(gate)?.multiply(up),
            Self::Clipped { limit, alpha } => {
                // Half floats would be rounded at each of these.
                let (gate, up) = (gate.as_dtype(Dtype::Float32)?, up.as_dtype(Dtype::Float32)?);
                let (most, least) = (Array::from_f32(limit), Array::from_f32(-limit));
                let gate = ops::minimum(gate, &most)?;
                let up = ops::maximum(ops::minimum(up, &most)?, least)?;
                let gated = gate.multiply(ops::sigmoid(gate.multiply(Array::from_f32(alpha))?)?)?;
                up.add(Array::from_f32(1.0))?.multiply(gated)
            }
        }
    }
}

/// The experts' MLPs, their matrices stacked.
#[derive(Debug)]
pub struct SwitchGlu {
    gate_proj: SwitchLinear,
    up_proj: SwitchLinear,
    down_proj: SwitchLinear,
    activation: ExpertActivation,
}

impl SwitchGlu {
    /// Takes `gate_proj`, `up_proj` and `down_proj` of the experts at `{name}.switch_mlp`, or of each at
    /// `{name}.experts`.
    pub fn new(
        weights: &mut Weights,
        name: &str,
        sizes: ExpertSizes,
        bias: Bias,
        activation: ExpertActivation,
    ) -> Result<Self, GraphError> {
        let ExpertSizes { experts, hidden, inner } = sizes;
        if inner <= 0 {
            return Err(GraphError::Config(format!("experts cannot be {inner} wide inside")));
        }
        let mut linear = |part, out, inner| SwitchLinear::new(weights, name, part, [experts, out, inner], bias);
        Ok(Self {
            gate_proj: linear("gate_proj", inner, hidden)?,
            up_proj: linear("up_proj", inner, hidden)?,
            down_proj: linear("down_proj", hidden, inner)?,
            activation,
        })
    }

    /// What each of the chosen experts (`[batch, time, top_k]`) makes of `x` (`[batch, time, hidden]`), summed with
    /// `weights`: `[batch, time, hidden]`, f32.
    pub fn forward(&self, x: &Array, chosen: &Array, weights: &Array) -> Result<Array, Exception> {
        let (hidden, top_k) = (x.dim(-1), chosen.dim(-1));
        let out = if chosen.size() < SORT_FROM {
            let x = x.expand_dims(-2)?.expand_dims(-2)?;
            self.experts(&x, chosen, false)?.squeeze_axes(&[-2])?
        } else {
            let flat = chosen.reshape(&[-1])?;
            let order = ops::argsort_axis(&flat, 0)?;
            let token = ops::floor_divide(&order, Array::from_int(top_k).as_dtype(order.dtype())?)?;
            let x = indexing::take_axis(x.reshape(&[-1, 1, hidden])?, &token, 0)?;
            let sorted = indexing::take_axis(&flat, &order, 0)?;
            let out = self.experts(&x, &sorted, true)?;
            let back = ops::argsort_axis(&order, 0)?;
            let shape = [chosen.shape(), &[hidden]].concat();
            indexing::take_axis(&out, &back, 0)?.reshape(&shape)?
        };
        // Weights are f32, and so is the sum.
        out.multiply(weights.expand_dims(-1)?)?.sum_axis(-2, false)
    }

    fn experts(&self, x: &Array, chosen: &Array, sorted: bool) -> Result<Array, Exception> {
        let gate = self.gate_proj.forward(x, chosen, sorted)?;
        let up = self.up_proj.forward(x, chosen, sorted)?;
        let inner = self.activation.forward(&gate, &up)?.as_dtype(x.dtype())?;
        self.down_proj.forward(&inner, chosen, sorted)
    }
}

/// Sizes of a mixture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertSizes {
    /// How many experts there are.
    pub experts: i32,
    /// Width of the residual stream.
    pub hidden: i32,
    /// Width inside an expert.
    pub inner: i32,
}

/// A linear map for each expert.
#[derive(Debug)]
struct SwitchLinear {
    weight: SwitchWeight,
    /// F32, and what is added to becomes so.
    bias: Option<Array>,
}

#[derive(Debug)]
enum SwitchWeight {
    /// `[experts, in, out]`.
    Plain(Array),
    Packed(ffi::Packed),
}

impl SwitchLinear {
    fn new(
        weights: &mut Weights,
        name: &str,
        part: &str,
        [experts, out, inner]: [i32; 3],
        bias: Bias,
    ) -> Result<Self, GraphError> {
        let weight = match weights.take_experts(name, part, experts, out, inner)? {
            Matrix::Plain(weight) => SwitchWeight::Plain(weight.swap_axes(-1, -2)?),
            Matrix::Packed(packed) => SwitchWeight::Packed(packed),
        };
        let bias = match bias {
            Bias::Yes => Some(weights.take_f32(&format!("{name}.switch_mlp.{part}.bias"), &[experts, out])?),
            Bias::No => None,
        };
        Ok(Self { weight, bias })
    }

    /// `x` is `[…, 1, in]`; its axes before the last two meet those of `chosen`.
    fn forward(&self, x: &Array, chosen: &Array, sorted: bool) -> Result<Array, Exception> {
        let out = match &self.weight {
            SwitchWeight::Plain(weight) => ops::gather_mm(x, weight, None, chosen, sorted)?,
            SwitchWeight::Packed(packed) => ffi::gather_quantized_matmul(x, packed, chosen, sorted)?,
        };
        match &self.bias {
            Some(bias) => out.add(indexing::take_axis(bias, chosen, 0)?.expand_dims(-2)?),
            None => Ok(out),
        }
    }
}

/// A router, its experts, and what every token goes through besides.
#[derive(Debug)]
pub struct Moe {
    spec: RouterSpec,
    gate: Linear,
    correction_bias: Option<Array>,
    per_expert_scale: Option<Array>,
    experts: SwitchGlu,
    shared: Option<Mlp>,
    shared_gate: Option<Linear>,
}

/// What a mixture looks like.
#[derive(Clone, Debug)]
pub struct MoeSpec {
    /// How experts are chosen.
    pub router: RouterSpec,
    /// Width inside an expert.
    pub inner: i32,
    /// The router's name, such as `gate`.
    pub gate: &'static str,
    /// Bias on the router and the experts.
    pub bias: Bias,
    /// Name of a bias that takes part in choosing alone.
    pub correction_bias: Option<&'static str>,
    /// Name of a factor for each expert, which multiplies its weight.
    pub per_expert_scale: Option<&'static str>,
    /// What stands between an expert's projections.
    pub activation: ExpertActivation,
    /// Name and inner width of an MLP that every token goes through.
    pub shared: Option<(&'static str, i32)>,
    /// Name of a map to one number whose sigmoid multiplies what the shared MLP gives.
    pub shared_gate: Option<&'static str>,
}

impl MoeSpec {
    /// SwiGLU experts behind a router called `gate`, and nothing else.
    pub fn new(router: RouterSpec, inner: i32) -> Self {
        Self {
            router,
            inner,
            gate: "gate",
            bias: Bias::No,
            correction_bias: None,
            per_expert_scale: None,
            activation: ExpertActivation::Gated(Activation::Silu),
            shared: None,
            shared_gate: None,
        }
    }
}

impl Moe {
    /// Takes the tensors under `{name}.`.
    pub fn new(weights: &mut Weights, name: &str, config: &DecoderConfig, spec: MoeSpec) -> Result<Self, GraphError> {
        let (hidden, experts) = (config.hidden_size, spec.router.experts);
        let gate = Linear::new(weights, &format!("{name}.{}", spec.gate), experts, hidden, spec.bias)?.in_f32()?;
        let mut of_experts = |part: Option<&str>| match part {
            Some(part) => Ok(Some(weights.take_f32(&format!("{name}.{part}"), &[experts])?)),
            None => Ok::<_, GraphError>(None),
        };
        let correction_bias = of_experts(spec.correction_bias)?;
        let per_expert_scale = of_experts(spec.per_expert_scale)?;
        let sizes = ExpertSizes { experts, hidden, inner: spec.inner };
        let stack = SwitchGlu::new(weights, name, sizes, spec.bias, spec.activation)?;
        let shared = match spec.shared {
            Some((shared, inner)) => Some(Mlp::sized(weights, &format!("{name}.{shared}"), config, inner)?),
            None => None,
        };
        let shared_gate = match spec.shared_gate {
            Some(gate) => Some(Linear::new(weights, &format!("{name}.{gate}"), 1, hidden, Bias::No)?),
            None => None,
        };
        Ok(Self { spec: spec.router, gate, correction_bias, per_expert_scale, experts: stack, shared, shared_gate })
    }

    /// `[batch, time, hidden]` to the same, in f32.
    pub fn forward(&self, x: &Array) -> Result<Array, Exception> {
        self.forward_routed(x, x)
    }

    /// The same, where the router sees something else.
    pub fn forward_routed(&self, x: &Array, seen: &Array) -> Result<Array, Exception> {
        // A plain gate is f32, and makes its product so.
        let logits = self.gate.forward(seen)?;
        let (chosen, weights) = self.spec.route(&logits, self.correction_bias.as_ref())?;
        let weights = match &self.per_expert_scale {
            Some(scale) => weights.multiply(indexing::take_axis(scale, &chosen, 0)?)?,
            None => weights,
        };
        let out = self.experts.forward(x, &chosen, &weights)?;
        let Some(shared) = &self.shared else { return Ok(out) };
        let shared = shared.forward(x)?;
        match &self.shared_gate {
            Some(gate) => out.add(shared.multiply(ops::sigmoid(gate.forward(x)?)?)?),
            None => out.add(shared),
        }
    }
}
