//! What the machine has for instances.

use std::{fs, path::Path};

use anyplace_model::{Bytes, Gpu, MilliCpu};

use crate::{Config, MachineResources};

/// Resources for instances: the machine's, or the configured ones, less what is reserved.
pub(crate) fn resources(config: &Config) -> MachineResources {
    let mut resources = config.resources.unwrap_or_else(|| measure(&config.data_dir));
    resources.cpu.0 = resources.cpu.0.saturating_sub(config.reserved.cpu.0);
    resources.memory.0 = resources.memory.0.saturating_sub(config.reserved.memory.0);
    resources
}

/// GPUs: the configured ones, or else those that NVIDIA's library knows, where it is there.
pub(crate) fn gpus(config: &Config) -> Vec<Gpu> {
    if !config.gpus.is_empty() {
        return config.gpus.clone();
    }
    let ask = || {
        let nvml = nvml_wrapper::Nvml::init()?;
        (0..nvml.device_count()?)
            .map(|index| {
                let device = nvml.device_by_index(index)?;
                Ok(Gpu { model: device.name()?, memory: Bytes(device.memory_info()?.total) })
            })
            .collect::<Result<Vec<Gpu>, nvml_wrapper::error::NvmlError>>()
    };
    ask().unwrap_or_else(|error| {
        tracing::info!(%error, "no GPUs");
        Vec::new()
    })
}

fn measure(data_dir: &Path) -> MachineResources {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_memory(&text));
    let disk = nix::sys::statvfs::statvfs(data_dir).map_or(0, |stat| stat.blocks() * stat.fragment_size());
    MachineResources { cpu: MilliCpu(cores * 1_000), memory: Bytes(memory.unwrap_or(0)), disk: Bytes(disk) }
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1_024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_measured() {
        assert_eq!(total_memory("MemTotal:       24613896 kB\nMemFree: 1 kB\n"), Some(24_613_896 * 1_024));
        let found = measure(Path::new("/"));
        assert!(found.cpu.0 >= 1_000 && found.memory.0 > 1 << 20 && found.disk.0 > 1 << 20, "{found:?}");
    }
}
