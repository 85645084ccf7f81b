//! What `mlx-rs` has no wrapper for, over `mlx-sys`: quantization modes, slices by bounds, bits, and facts about the device.
//! The only unsafe code of the crate, together with `kernels`.

use std::{
    cell::RefCell,
    ffi::{CStr, CString, c_char, c_void},
    sync::Once,
};

use mlx_rs::{Array, Device, Dtype, Stream, error::Exception};
use mlx_sys::mlx_array;

/// What a quantized code means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// `code · scale + bias`.
    Affine,
    /// E2M1 codes, E8M0 scales over 32 values.
    Mxfp4,
    /// E4M3 codes, E8M0 scales over 32 values.
    Mxfp8,
    /// E2M1 codes, E4M3 scales over 16 values.
    Nvfp4,
}

impl Mode {
    /// From the name in config.json.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "affine" => Some(Self::Affine),
            "mxfp4" => Some(Self::Mxfp4),
            "mxfp8" => Some(Self::Mxfp8),
            "nvfp4" => Some(Self::Nvfp4),
            _ => None,
        }
    }

    /// Whether `.biases` stand beside the `.scales`.
    pub fn has_biases(self) -> bool {
        self == Self::Affine
    }

    /// The name in config.json.
    pub fn id(self) -> &'static str {
        self.name().to_str().unwrap_or_default()
    }

    fn name(self) -> &'static CStr {
        match self {
            Self::Affine => c"affine",
            Self::Mxfp4 => c"mxfp4",
            Self::Mxfp8 => c"mxfp8",
            Self::Nvfp4 => c"nvfp4",
        }
    }
}

/// A quantized matrix, `[out, in]`, as MLX packs it: `weight` holds the codes in `u32` words.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Codes, `[out, in · bits / 32]` (a leading axis for stacked experts is allowed).
    pub weight: Array,
    /// `[out, in / group_size]`.
    pub scales: Array,
    /// Like `scales`; only for [`Mode::Affine`].
    pub biases: Option<Array>,
    /// Values that share a scale.
    pub group_size: i32,
    /// Bits a code.
    pub bits: i32,
    /// What a code means.
    pub mode: Mode,
}

/// `x · Wᵀ` for a packed `W`.
pub fn quantized_matmul(x: &Array, w: &Packed) -> Result<Array, Exception> {
    // MLX 0.32 has a kernel for Hopper GPUs that only matrices of one group a row reach; it hangs, or computes something
    // else. Such matrices are tiny, so they are unpacked. One row of `x` takes another kernel, which is right.
    let one_group = w.scales.dim(-1) == 1 && w.mode == Mode::Affine;
    if one_group && x.size() as i64 > i64::from(x.dim(-1)) {
        let plain = dequantize(w)?.as_dtype(x.dtype())?;
        return mlx_rs::ops::matmul(x, plain.swap_axes(-1, -2)?);
    }
    // On CUDA, MLX takes leading axes for a stack of products, each of which reads all of `W`.
    match x.shape() {
        [rows, time, inner] if *rows > 1 && w.weight.ndim() == 2 && !cfg!(target_os = "macos") => {
            let flat = multiply_packed(&x.reshape(&[1, rows * time, *inner])?, w, true)?;
            flat.reshape(&[*rows, *time, flat.dim(-1)])
        }
        _ => multiply_packed(x, w, true),
    }
}

/// `x · W` for a packed stack of matrices `[n, out, in]` that `x`, `[…, n, time, out]`, is multiplied with one by one.
pub fn quantized_matmul_untransposed(x: &Array, w: &Packed) -> Result<Array, Exception> {
    multiply_packed(x, w, false)
}

fn multiply_packed(x: &Array, w: &Packed, transpose: bool) -> Result<Array, Exception> {
    op("quantized_matmul", |out, stream| unsafe {
        mlx_sys::mlx_quantized_matmul(
            out,
            x.as_ptr(),
            w.weight.as_ptr(),
            w.scales.as_ptr(),
            pointer(w.biases.as_ref()),
            transpose,
            int(w.group_size),
            int(w.bits),
            w.mode.name().as_ptr(),
            stream,
        )
    })
}

/// `x · Wᵀ` for those of the stacked matrices `W`, `[n, out, in]`, that `indices` pick; `x` is `[…, time, in]`, and its
/// axes before the last two meet those of `indices`.
pub fn gather_quantized_matmul(x: &Array, w: &Packed, indices: &Array, sorted: bool) -> Result<Array, Exception> {
    op("gather_qmm", |out, stream| unsafe {
        mlx_sys::mlx_gather_qmm(
            out,
            x.as_ptr(),
            w.weight.as_ptr(),
            w.scales.as_ptr(),
            pointer(w.biases.as_ref()),
            pointer(None),
            indices.as_ptr(),
            true,
            int(w.group_size),
            int(w.bits),
            w.mode.name().as_ptr(),
            sorted,
            stream,
        )
    })
}

/// The values of 8-bit floats (E4M3), held in `u8`.
pub fn from_fp8(x: &Array, dtype: Dtype) -> Result<Array, Exception> {
    op("from_fp8", |out, stream| unsafe { mlx_sys::mlx_from_fp8(out, x.as_ptr(), dtype.into(), stream) })
}

/// The plain values of a packed matrix, in the type of its scales (bf16 where those are not floats).
pub fn dequantize(w: &Packed) -> Result<Array, Exception> {
    op("dequantize", |out, stream| unsafe {
        mlx_sys::mlx_dequantize(
            out,
            w.weight.as_ptr(),
            w.scales.as_ptr(),
            pointer(w.biases.as_ref()),
            int(w.group_size),
            int(w.bits),
            w.mode.name().as_ptr(),
            mlx_sys::mlx_array_new(),
            mlx_sys::mlx_optional_dtype { value: mlx_sys::mlx_dtype__MLX_FLOAT32, has_value: false },
            stream,
        )
    })
}

/// A matrix `[…, out, in]` packed; `in` is a multiple of the group's size.
pub fn quantize(w: &Array, group_size: i32, bits: i32, mode: Mode) -> Result<Packed, Exception> {
    init();
    let stream = Stream::thread_local_or_default();
    // SAFETY: mlx-c fills the vector on success; it is freed once, on every path, and arrays taken out of it are owned.
    let parts = unsafe {
        let mut parts = mlx_sys::mlx_vector_array_new();
        let status = mlx_sys::mlx_quantize(
            &mut parts,
            w.as_ptr(),
            int(group_size),
            int(bits),
            mode.name().as_ptr(),
            pointer(None),
            stream.as_ptr(),
        );
        let count = if status == 0 { mlx_sys::mlx_vector_array_size(parts) } else { 0 };
        let taken = (0..count).map(|index| {
            let mut part = mlx_sys::mlx_array_new();
            let _ = mlx_sys::mlx_vector_array_get(&mut part, parts, index);
            Array::from_ptr(part)
        });
        let taken: Vec<Array> = taken.collect();
        mlx_sys::mlx_vector_array_free(parts);
        taken
    };
    let mut parts = parts.into_iter();
    match (parts.next(), parts.next(), parts.next()) {
        (Some(weight), Some(scales), biases) if biases.is_some() == mode.has_biases() => {
            Ok(Packed { weight, scales, biases, group_size, bits, mode })
        }
        _ => Err(last_error("quantize")),
    }
}

/// The bits that both have, of integers.
pub fn bitwise_and(a: &Array, b: &Array) -> Result<Array, Exception> {
    op("bitwise_and", |out, stream| unsafe { mlx_sys::mlx_bitwise_and(out, a.as_ptr(), b.as_ptr(), stream) })
}

/// `x[start..stop]` along every axis.
pub fn slice<const N: usize>(x: &Array, start: [i32; N], stop: [i32; N]) -> Result<Array, Exception> {
    let strides = [1; N];
    op("slice", |out, stream| unsafe {
        mlx_sys::mlx_slice(out, x.as_ptr(), start.as_ptr(), N, stop.as_ptr(), N, strides.as_ptr(), N, stream)
    })
}

/// `x` with `x[start..stop] = update`; done in place at evaluation if nobody else holds `x`'s buffer.
pub fn slice_update<const N: usize>(
    x: &Array,
    update: &Array,
    start: [i32; N],
    stop: [i32; N],
) -> Result<Array, Exception> {
    let strides = [1; N];
    op("slice_update", |out, stream| unsafe {
        mlx_sys::mlx_slice_update(
            out,
            x.as_ptr(),
            update.as_ptr(),
            start.as_ptr(),
            N,
            stop.as_ptr(),
            N,
            strides.as_ptr(),
            N,
            stream,
        )
    })
}

/// The elements of `x`, row by row, as they lie in memory; waits for the device.
///
/// What is read is a copy: on CUDA an array that the host has read stays in memory that host and device share, whose
/// pages have to come back one by one when the device reads it next.
pub fn to_bytes(x: &Array) -> Result<Vec<u8>, Exception> {
    let x = mlx_rs::ops::select(Array::from_bool(true), x, x)?;
    let x = op("contiguous", |out, stream| unsafe { mlx_sys::mlx_contiguous(out, x.as_ptr(), false, stream) })?;
    x.eval()?;
    // SAFETY: the array is evaluated and row-contiguous, so that its data are `nbytes` bytes in order; they are copied
    // while it lives.
    unsafe {
        let data = mlx_sys::mlx_array_data_uint8(x.as_ptr());
        if data.is_null() && x.nbytes() > 0 {
            return Err(last_error("reading an array"));
        }
        Ok(if x.nbytes() == 0 { Vec::new() } else { std::slice::from_raw_parts(data, x.nbytes()).to_vec() })
    }
}

/// The array whose elements are `bytes`, as [`to_bytes`] gives them; `None` if they are not as many as `shape` says.
pub fn from_bytes(bytes: &[u8], shape: &[i32], dtype: Dtype) -> Option<Array> {
    let size = shape.iter().try_fold(1_u64, |size, dim| size.checked_mul(u64::try_from(*dim).ok()?))?;
    let rank = i32::try_from(shape.len()).ok()?;
    if size.checked_mul(dtype_bytes(dtype)?)? != bytes.len() as u64 {
        return None;
    }
    init();
    // SAFETY: mlx-c copies as many bytes as shape and type say, which are all there.
    unsafe {
        let array = mlx_sys::mlx_array_new_data(bytes.as_ptr().cast(), shape.as_ptr(), rank, dtype.into());
        (!array.ctx.is_null()).then(|| Array::from_ptr(array))
    }
}

fn dtype_bytes(dtype: Dtype) -> Option<u64> {
    match dtype {
        Dtype::Float32 | Dtype::Int32 | Dtype::Uint32 => Some(4),
        Dtype::Float16 | Dtype::Bfloat16 => Some(2),
        Dtype::Uint8 => Some(1),
        _ => None,
    }
}

/// Facts about MLX's default device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceFacts {
    /// Its kind.
    pub kind: mesh_core::DeviceKind,
    /// Its name, where MLX tells.
    pub name: Option<String>,
    /// Its memory, in bytes, where MLX tells.
    pub memory_bytes: Option<u64>,
    /// What of it nobody uses at this moment, in bytes, where MLX tells.
    pub free_bytes: Option<u64>,
}

/// What MLX computes on in this process: a GPU if its library has one, or else the CPU.
pub fn device_facts() -> DeviceFacts {
    init();
    // SAFETY: both objects are freed once, on every path; strings are copied before that.
    let gpu = unsafe { mlx_sys::mlx_device_new_type(mlx_sys::mlx_device_type__MLX_GPU, 0) };
    let mut available = false;
    // SAFETY: as above.
    let asked = unsafe { mlx_sys::mlx_device_is_available(&mut available, gpu) };
    if asked != 0 || !available {
        // SAFETY: as above.
        unsafe { mlx_sys::mlx_device_free(gpu) };
        return DeviceFacts { kind: mesh_core::DeviceKind::Cpu, name: None, memory_bytes: None, free_bytes: None };
    }
    let kind = if cfg!(target_os = "macos") { mesh_core::DeviceKind::Metal } else { mesh_core::DeviceKind::Cuda };
    // SAFETY: as above.
    unsafe {
        let mut info = mlx_sys::mlx_device_info_new();
        let known = mlx_sys::mlx_device_info_get(&mut info, gpu) == 0;
        let name = known.then(|| info_string(info, c"device_name")).flatten();
        let memory_bytes =
            known.then(|| info_size(info, c"memory_size").or_else(|| info_size(info, c"total_memory"))).flatten();
        let free_bytes = known.then(|| info_size(info, c"free_memory")).flatten();
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(gpu);
        DeviceFacts { kind, name, memory_bytes, free_bytes }
    }
}

/// Makes `device` the default for operations of this process. Call before the first array is made.
pub fn use_device(kind: mesh_core::DeviceKind) {
    init();
    match kind {
        mesh_core::DeviceKind::Cpu => Device::set_default(&Device::cpu()),
        _ => Device::set_default(&Device::gpu()),
    }
}

unsafe fn info_string(info: mlx_sys::mlx_device_info, key: &CStr) -> Option<String> {
    let mut value: *const c_char = std::ptr::null();
    // SAFETY: the caller passes a live object; the string it lends is copied at once.
    unsafe {
        let status = mlx_sys::mlx_device_info_get_string(&mut value, info, key.as_ptr());
        (status == 0 && !value.is_null()).then(|| CStr::from_ptr(value).to_string_lossy().into_owned())
    }
}

unsafe fn info_size(info: mlx_sys::mlx_device_info, key: &CStr) -> Option<u64> {
    let mut value = 0;
    // SAFETY: the caller passes a live object.
    let status = unsafe { mlx_sys::mlx_device_info_get_size(&mut value, info, key.as_ptr()) };
    (status == 0 && value > 0).then_some(value as u64)
}

/// Runs one mlx-c call that makes one array.
pub(crate) fn op(
    name: &str,
    call: impl FnOnce(*mut mlx_array, mlx_sys::mlx_stream) -> i32,
) -> Result<Array, Exception> {
    init();
    let stream = Stream::thread_local_or_default();
    // SAFETY: mlx-c fills `out` on success; on failure it stays the empty array that is freed here.
    unsafe {
        let mut out = mlx_sys::mlx_array_new();
        match call(&mut out, stream.as_ptr()) {
            0 => Ok(Array::from_ptr(out)),
            _ => {
                mlx_sys::mlx_array_free(out);
                Err(last_error(name))
            }
        }
    }
}

pub(crate) fn last_error(name: &str) -> Exception {
    let what = LAST_ERROR.with(|last| last.borrow_mut().take());
    Exception::custom(what.unwrap_or_else(|| format!("{name} failed")))
}

fn pointer(array: Option<&Array>) -> mlx_array {
    // SAFETY: the empty array is a null pointer, which owns nothing.
    array.map_or_else(|| unsafe { mlx_sys::mlx_array_new() }, Array::as_ptr)
}

fn int(value: i32) -> mlx_sys::mlx_optional_int {
    mlx_sys::mlx_optional_int { value, has_value: true }
}

thread_local! {
    static LAST_ERROR: RefCell<Option<String>> = const { RefCell::new(None) };
}

unsafe extern "C" {
    /// mlx-rs's own handler, which keeps the text for mlx-rs.
    fn default_mlx_error_handler(message: *const c_char, data: *mut c_void);
}

extern "C" fn keep_error(message: *const c_char, data: *mut c_void) {
    // SAFETY: mlx-c passes a string that lives for the call.
    unsafe {
        LAST_ERROR.with(|last| *last.borrow_mut() = Some(CStr::from_ptr(message).to_string_lossy().into_owned()));
        default_mlx_error_handler(message, data);
    }
}

/// Makes failing calls return instead of ending the process, and keeps their text.
pub(crate) fn init() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // mlx-rs installs its handler with its first operation, and never again: this one then takes its place and
        // calls it.
        let _ = mlx_rs::memory::active_memory();
        // SAFETY: the handler is a plain function.
        unsafe { mlx_sys::mlx_set_error_handler(Some(keep_error), std::ptr::null_mut(), None) };
    });
}

/// A C string from text of ours, which holds no NUL.
#[allow(dead_code)]
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_default()
}
