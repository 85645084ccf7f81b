//! What this machine has for MLX.

use mesh_core::{Device, DeviceKind, Host};
use mesh_graph::ffi;
use serde_json::Value;

use crate::settings::Settings;

/// The device that would compute.
pub fn host(settings: &Value) -> Host {
    let found = ffi::device_facts();
    let device =
        Settings::read(settings).and_then(|settings| settings.device.settle(found.kind)).map(|kind| match kind {
            DeviceKind::Cpu => Device { kind, name: cpu_name(), memory_bytes: available_memory_bytes() },
            _ => Device {
                kind,
                name: found.name.clone().unwrap_or_else(|| "GPU".into()),
                memory_bytes: found.memory_bytes.or_else(available_memory_bytes),
            },
        });
    let notes = match &device {
        Ok(device) if device.kind == DeviceKind::Cpu => vec![SLOW.to_owned()],
        _ => Vec::new(),
    };
    Host::new(device, notes)
}

/// Said wherever MLX is about to run on a CPU.
pub const SLOW: &str = "MLX on a CPU is slow: good for checking results, not for daily use";

fn cpu_name() -> String {
    format!("{} CPU", std::env::consts::ARCH)
}

/// Memory that could be used without swapping, and without exceeding the limit of this process's control group, in bytes;
/// `None` where the system does not say.
pub fn available_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)?;
    Some(group_memory_bytes().map_or(machine, |group| group.min(machine)))
}

/// What the control group leaves, where it has a limit. Pages of files do not count as used: they go when they have to.
fn group_memory_bytes() -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
    let max: u64 = read("memory.max")?.trim().parse().ok()?;
    let current: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat")?;
    let files = stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse().unwrap_or(0);
    Some(max.saturating_sub(current.saturating_sub(files)))
}
