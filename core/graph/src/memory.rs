//! MLX's allocator, by the numbers. All in bytes.

use mlx_rs::memory;

/// Bytes held by live arrays.
pub fn active_bytes() -> u64 {
    memory::active_memory().unwrap_or(0) as u64
}

/// Bytes of freed buffers that the allocator keeps for the next.
pub fn cached_bytes() -> u64 {
    memory::cache_memory().unwrap_or(0) as u64
}

/// The most bytes held at once since [`reset_peak`].
pub fn peak_bytes() -> u64 {
    memory::peak_memory().unwrap_or(0) as u64
}

/// Starts a new measurement of [`peak_bytes`].
pub fn reset_peak() {
    let _ = memory::reset_peak_memory();
}

/// Gives freed buffers back to the system if they are more than these.
pub fn clear_cache_beyond(bytes_max: u64) {
    if cached_bytes() > bytes_max {
        clear_cache();
    }
}

/// Gives freed buffers back to the system.
pub fn clear_cache() {
    let _ = memory::clear_cache();
}
