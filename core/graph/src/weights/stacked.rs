//! Matrices that stand in a stack: one for each expert, or for each head.

use mlx_rs::{Array, ops};

use super::{Matrix, Source, Tensor, Weights};
use crate::model::GraphError;

impl Weights {
    /// Takes `{name}.weight` of `[count, out, in]`, packed or plain.
    pub fn take_stack(&mut self, name: &str, count: i32, out: i32, inner: i32) -> Result<Matrix, GraphError> {
        self.take_matrices(name, &[count, out], inner)
    }

    /// Takes the experts' matrices of one kind, under `{name}.switch_mlp.{part}` where they are stacked, or under
    /// `{name}.experts.{expert}.{part}`.
    pub fn take_experts(
        &mut self,
        name: &str,
        part: &str,
        count: i32,
        out: i32,
        inner: i32,
    ) -> Result<Matrix, GraphError> {
        let stacked = format!("{name}.switch_mlp.{part}");
        let single = |expert: i32| format!("{name}.experts.{expert}.{part}");
        let separate = match &self.source {
            Source::Files(tensors) => {
                let prefix = format!("{name}.experts.");
                !self.has(&format!("{stacked}.weight")) && tensors.keys().any(|name| name.starts_with(&prefix))
            }
            Source::Random { .. } => false,
        };
        if separate {
            for expert in 0..count {
                self.unpack_fp8(&single(expert))?;
            }
            for kind in ["weight", "scales", "biases"] {
                let shape = (kind == "weight").then_some([out, inner]);
                self.stack(&format!("{stacked}.{kind}"), shape, count, |expert| format!("{}.{kind}", single(expert)))?;
            }
        }
        self.take_stack(&stacked, count, out, inner)
    }

    fn stack(
        &mut self,
        to: &str,
        required: Option<[i32; 2]>,
        count: i32,
        name: impl Fn(i32) -> String,
    ) -> Result<(), GraphError> {
        let Source::Files(tensors) = &mut self.source else { return Ok(()) };
        if required.is_none() && !tensors.contains_key(&name(0)) {
            return Ok(());
        }
        let mut found: Vec<Tensor> = Vec::new();
        for expert in 0..count {
            match tensors.remove(&name(expert)) {
                Some(tensor) => found.push(tensor),
                None => {
                    let name = self.published(&name(expert));
                    let shape = required.map_or(String::new(), |shape| format!(" of shape {shape:?}"));
                    return Err(GraphError::Weights(format!("tensor `{name}`{shape} is missing")));
                }
            }
        }
        let Some(first) = found.first() else { return Ok(()) };
        let published = first.published.clone();
        if let Some(other) = found.iter().find(|tensor| tensor.array.shape() != first.array.shape()) {
            let (name, shape) = (&other.published, other.array.shape());
            let expected = first.array.shape();
            return Err(GraphError::Weights(format!("tensor `{name}` has shape {shape:?}, not {expected:?}")));
        }
        let arrays: Vec<Array> = found.into_iter().map(|tensor| tensor.array).collect();
        let array = ops::stack(&arrays, 0)?;
        tensors.insert(to.to_owned(), Tensor { array, published });
        Ok(())
    }
}
