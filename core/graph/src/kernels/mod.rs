//! CUDA kernels of our own for decoding, one token a row: fewer launches a layer than MLX's operations need, which is
//! what bounds decoding on a GPU, faster 4-bit products, and attention that minds padding without a mask.
//!
//! They are compiled at first use by MLX's own NVRTC path. Everything here has an equivalent in plain operations, which
//! runs everywhere else and for prompts; [`layer::FusedLayer`] is only built where all its preconditions hold.

mod attend;
mod heads;
pub mod layer;
mod matmul;
mod matvec;
mod norm;
mod rows;

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::c_char,
    fs::File,
    io::{self, Write},
    sync::Mutex,
};

use mlx_rs::{Array, Dtype, Stream, error::Exception};

use crate::ffi;

/// A value fixed when a kernel is compiled.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Constant {
    Type(Dtype),
    Int(i32),
    Bool(bool),
}

/// What a kernel is made of.
pub(crate) struct Recipe<'a> {
    pub name: &'a str,
    /// Put before the kernel: helpers.
    pub headers: &'a [&'static str],
    /// The kernel's body; sees inputs, outputs and constants by name.
    pub body: &'a str,
    pub inputs: &'a [&'a str],
    pub outputs: &'a [&'a str],
    /// Copy inputs that are views of something larger; otherwise the body has to read their strides.
    pub contiguous: bool,
}

/// How a kernel is launched.
pub(crate) struct Launch {
    /// Shape and type of each output.
    pub outputs: Vec<(Vec<i32>, Dtype)>,
    pub constants: Vec<(&'static str, Constant)>,
    pub blocks: i32,
    pub threads_per_block: i32,
}

/// What a launch may depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Size {
    pub rows: i32,
    /// Parts that the work of one row is cut into.
    pub parts: i32,
}

impl Size {
    /// One token of one sequence.
    pub(crate) const SINGLE: Self = Self::rows(1);

    pub(crate) const fn rows(rows: i32) -> Self {
        Self { rows, parts: 1 }
    }
}

/// A kernel and its launches so far, by size; only inputs change.
pub(crate) struct Kernel {
    kernel: mlx_sys::mlx_fast_cuda_kernel,
    outputs: usize,
    launch: Box<dyn Fn(Size) -> Launch>,
    launches: RefCell<HashMap<Size, Config>>,
}

/// A launch as MLX takes it.
struct Config(mlx_sys::mlx_fast_cuda_kernel_config);

impl Kernel {
    pub(crate) fn new(recipe: &Recipe<'_>, launch: impl Fn(Size) -> Launch + 'static) -> Result<Self, Exception> {
        ffi::init();
        let header: String =
            recipe.headers.iter().map(|header| include(header).unwrap_or_else(|_| terse(header))).collect();
        let (name, header, body) =
            (ffi::c_string(recipe.name), ffi::c_string(&header), ffi::c_string(&terse(recipe.body)));
        // SAFETY: the strings outlive the call, which copies them; the vectors are freed once.
        let kernel = unsafe {
            let (inputs, outputs) = (strings(recipe.inputs), strings(recipe.outputs));
            let kernel = mlx_sys::mlx_fast_cuda_kernel_new(
                name.as_ptr(),
                inputs,
                outputs,
                body.as_ptr(),
                header.as_ptr(),
                recipe.contiguous,
                0,
            );
            mlx_sys::mlx_vector_string_free(inputs);
            mlx_sys::mlx_vector_string_free(outputs);
            kernel
        };
        if kernel.ctx.is_null() {
            return Err(ffi::last_error("making a CUDA kernel"));
        }
        Ok(Self { kernel, outputs: recipe.outputs.len(), launch: Box::new(launch), launches: RefCell::default() })
    }

    /// Queues the kernel. `inputs` are as many, and of such shapes, as the recipe's body reads.
    pub(crate) fn apply<const N: usize>(&self, size: Size, inputs: &[&Array]) -> Result<[Array; N], Exception> {
        let mut launches = self.launches.borrow_mut();
        let config = match launches.entry(size) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(Config::new(&(self.launch)(size))?),
        };
        let handles: Vec<mlx_sys::mlx_array> = inputs.iter().map(|array| array.as_ptr()).collect();
        let stream = Stream::thread_local_or_default();
        // SAFETY: the handles live through the call, which keeps references of its own; each vector is freed once, and
        // each array is taken out of `made` as a new reference.
        let made: Vec<Array> = unsafe {
            let inputs = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut made = mlx_sys::mlx_vector_array_new();
            let status = mlx_sys::mlx_fast_cuda_kernel_apply(&mut made, self.kernel, inputs, config.0, stream.as_ptr());
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
            outputs.ok_or_else(|| ffi::last_error("queueing a CUDA kernel"))?
        };
        made.try_into().map_err(|_| Exception::custom("a kernel made another number of arrays"))
    }
}

impl Config {
    fn new(launch: &Launch) -> Result<Self, Exception> {
        // SAFETY: the configuration is filled before it is used, by calls that copy what they are given.
        let this = Self(unsafe { mlx_sys::mlx_fast_cuda_kernel_config_new() });
        let threads = launch.blocks * launch.threads_per_block;
        let mut status = 0;
        // SAFETY: as above.
        unsafe {
            for (shape, dtype) in &launch.outputs {
                let dtype = (*dtype).into();
                status |=
                    mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(this.0, shape.as_ptr(), shape.len(), dtype);
            }
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_grid(this.0, threads, 1, 1);
            status |= mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(this.0, launch.threads_per_block, 1, 1);
            for (name, value) in &launch.constants {
                let name = ffi::c_string(name);
                let name: *const c_char = name.as_ptr();
                status |= match *value {
                    Constant::Type(dtype) => {
                        mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_dtype(this.0, name, dtype.into())
                    }
                    Constant::Int(value) => {
                        mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_int(this.0, name, value)
                    }
                    Constant::Bool(value) => {
                        mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_bool(this.0, name, value)
                    }
                };
            }
        }
        if status == 0 { Ok(this) } else { Err(ffi::last_error("setting up a CUDA kernel")) }
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: made by `new` and freed here alone.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_free(self.kernel) };
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: made by `new` and freed here alone.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_config_free(self.0) };
    }
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kernel")
    }
}

/// A line that includes `header`. MLX puts together, copies and hashes the text of a kernel each time it is launched, which
/// for whole headers takes the host longer than all else about the launch; so they stand in files without a name, which
/// the compiler of this process can open.
fn include(header: &'static str) -> io::Result<String> {
    static FILES: Mutex<Vec<(&'static str, File)>> = Mutex::new(Vec::new());
    let mut files = FILES.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let index = match files.iter().position(|(text, _)| *text == header) {
        Some(index) => index,
        None => {
            let mut file = tempfile::tempfile()?;
            file.write_all(header.as_bytes())?;
            files.push((header, file));
            files.len() - 1
        }
    };
    let path = path_of(&files[index].1)?;
    // Not everywhere is there a /proc.
    std::fs::metadata(&path)?;
    Ok(format!("#include \"{path}\"\n"))
}

#[cfg(target_os = "linux")]
fn path_of(file: &File) -> io::Result<String> {
    use std::os::fd::AsRawFd;
    Ok(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(not(target_os = "linux"))]
fn path_of(_: &File) -> io::Result<String> {
    Err(io::ErrorKind::Unsupported.into())
}

/// `source` without what a compiler skips.
fn terse(source: &str) -> String {
    let lines = source.lines().map(|line| line.split("//").next().unwrap_or("").trim());
    lines.filter(|line| !line.is_empty()).flat_map(|line| [line, "\n"]).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_compiler_skips_is_left_out() {
        assert_eq!(terse("// a\n\n  int b = 1;  // c\n#pragma unroll\n"), "int b = 1;\n#pragma unroll\n");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn headers_can_be_read_where_they_are_included_from() {
        for header in ["int a;", "int b;", "int a;"] {
            let line = include(header).unwrap();
            let path = line.trim_end().strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')).unwrap();
            assert_eq!(std::fs::read_to_string(path).unwrap(), header);
        }
    }
}
