//! CUDA kernels of our own for decoding one token: fewer launches a layer than MLX's operations need, which is what
//! bounds decoding on a GPU, and a faster 4-bit matrix-vector product.
//!
//! They are compiled at first use by MLX's own NVRTC path. Everything here has an equivalent in plain operations, which
//! runs everywhere else and for prompts; [`layer::FusedLayer`] is only built where all its preconditions hold.

mod heads;
pub mod layer;
mod matvec;

use std::ffi::c_char;

use mlx_rs::{Array, Dtype, Stream, error::Exception};

use crate::ffi;

/// A value fixed when a kernel is compiled.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Constant {
    Type(Dtype),
    Int(i32),
    Bool(bool),
}

/// One output of a kernel.
pub(crate) struct Output<'a> {
    pub name: &'a str,
    pub shape: &'a [i32],
    pub dtype: Dtype,
}

/// What a kernel is made of and how it is launched.
pub(crate) struct Recipe<'a> {
    pub name: &'a str,
    /// Put before the kernel: helpers.
    pub header: &'a str,
    /// The kernel's body; sees inputs, outputs and constants by name.
    pub body: &'a str,
    pub inputs: &'a [&'a str],
    pub outputs: &'a [Output<'a>],
    pub constants: &'a [(&'a str, Constant)],
    pub blocks: i32,
    pub threads_per_block: i32,
}

/// A kernel with its launch fixed; only inputs change.
pub(crate) struct Kernel {
    kernel: mlx_sys::mlx_fast_cuda_kernel,
    launch: mlx_sys::mlx_fast_cuda_kernel_config,
    outputs: usize,
}

impl Kernel {
    pub(crate) fn new(recipe: &Recipe<'_>) -> Result<Self, Exception> {
        ffi::init();
        let (name, header, body) =
            (ffi::c_string(recipe.name), ffi::c_string(recipe.header), ffi::c_string(recipe.body));
        let outputs: Vec<&str> = recipe.outputs.iter().map(|output| output.name).collect();
        // SAFETY: the strings outlive the call, which copies them; the vectors are freed once.
        let kernel = unsafe {
            let (inputs, outputs) = (strings(recipe.inputs), strings(&outputs));
            let kernel = mlx_sys::mlx_fast_cuda_kernel_new(
                name.as_ptr(),
                inputs,
                outputs,
                body.as_ptr(),
                header.as_ptr(),
                true,
                0,
            );
            mlx_sys::mlx_vector_string_free(inputs);
            mlx_sys::mlx_vector_string_free(outputs);
            kernel
        };
        if kernel.ctx.is_null() {
            return Err(ffi::last_error("making a CUDA kernel"));
        }
        // SAFETY: `launch` is filled before it is used, by calls that copy what they are given.
        let launch = unsafe { mlx_sys::mlx_fast_cuda_kernel_config_new() };
        let this = Self { kernel, launch, outputs: recipe.outputs.len() };
        let threads = recipe.blocks * recipe.threads_per_block;
        let mut status = 0;
        // SAFETY: as above.
        unsafe {
            for output in recipe.outputs {
                let dtype = output.dtype.into();
                status |= mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(
                    launch,
                    output.shape.as_ptr(),
                    output.shape.len(),
                    dtype,
                );
            }
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_grid(launch, threads, 1, 1);
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(launch, recipe.threads_per_block, 1, 1);
            for (name, value) in recipe.constants {
                let name = ffi::c_string(name);
                let name: *const c_char = name.as_ptr();
                status |= match *value {
                    Constant::Type(dtype) => {
                        mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_dtype(launch, name, dtype.into())
                    }
                    Constant::Int(value) => {
                        mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_int(launch, name, value)
                    }
                    Constant::Bool(value) => {
                        mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_bool(launch, name, value)
                    }
                };
            }
        }
        if status == 0 { Ok(this) } else { Err(ffi::last_error("setting up a CUDA kernel")) }
    }

    /// Queues the kernel. `inputs` are as many, and of such shapes, as the recipe's body reads.
    pub(crate) fn apply(&self, inputs: &[&Array]) -> Result<Vec<Array>, Exception> {
        let handles: Vec<mlx_sys::mlx_array> = inputs.iter().map(|array| array.as_ptr()).collect();
        let stream = Stream::thread_local_or_default();
        // SAFETY: the handles live through the call, which keeps references of its own; each vector is freed once, and
        // each array is taken out of `made` as a new reference.
        unsafe {
            let inputs = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut made = mlx_sys::mlx_vector_array_new();
            let status =
                mlx_sys::mlx_fast_cuda_kernel_apply(&mut made, self.kernel, inputs, self.launch, stream.as_ptr());
            mlx_sys::mlx_vector_array_free(inputs);
            let outputs = (status == 0).then(|| {
                (0..self.outputs)
                    .map(|index| {
                        let mut out = mlx_sys::mlx_array_new();
                        mlx_sys::mlx_vector_array_get(&mut out, made, index);
                        Array::from_ptr(out)
                    })
                    .collect()
            });
            mlx_sys::mlx_vector_array_free(made);
            outputs.ok_or_else(|| ffi::last_error("queueing a CUDA kernel"))
        }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: both were made by `new` and are freed here alone.
        unsafe {
            mlx_sys::mlx_fast_cuda_kernel_config_free(self.launch);
            mlx_sys::mlx_fast_cuda_kernel_free(self.kernel);
        }
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernel")
    }
}

unsafe fn strings(texts: &[&str]) -> mlx_sys::mlx_vector_string {
    // SAFETY: the vector copies each string; the caller frees it.
    unsafe {
        let vector = mlx_sys::mlx_vector_string_new();
        for text in texts {
            mlx_sys::mlx_vector_string_append_value(vector, ffi::c_string(text).as_ptr());
        }
        vector
    }
}
