//! How much memory a new process could use here.

/// Bytes available without swapping, where that can be told.
#[cfg(target_os = "linux")]
pub(crate) fn available_bytes() -> Option<u64> {
    meminfo_available(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// Physical memory in bytes: what a model can use with others swapped or compressed away.
#[cfg(target_os = "macos")]
pub(crate) fn available_bytes() -> Option<u64> {
    let (mut bytes, mut size) = (0u64, size_of::<u64>());
    // SAFETY: the name is a C string, and `size` is the size of the value behind the pointer.
    let result = unsafe {
        libc::sysctlbyname(c"hw.memsize".as_ptr(), (&raw mut bytes).cast(), &mut size, std::ptr::null_mut(), 0)
    };
    (result == 0).then_some(bytes)
}

/// Not known on this platform.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
pub(crate) fn available_bytes() -> Option<u64> {
    None
}

#[cfg(any(target_os = "linux", test))]
fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        let text = "MemTotal:       24605816 kB\nMemFree:         1 kB\nMemAvailable:   18112340 kB\n";
        assert_eq!(meminfo_available(text), Some(18112340 * 1024));
        assert_eq!(meminfo_available("MemTotal: 1 kB"), None);
        assert_eq!(meminfo_available("MemAvailable: many kB"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_some() {
        assert!(available_bytes().unwrap() > 1 << 20);
    }
}
