//! What the machine has for instances.

use std::{fs, path::Path};

use anyhow::Context as _;
use anyplace_model::{Bytes, Gpu, MilliCpu};

use crate::{Config, MachineResources, network};

/// Prewarming takes this part of the uplink, with the headers of its packets less than a tenth.
const PREWARM_SHARE: u64 = 12;
/// What it takes of an uplink that tells no speed, as those of many virtual machines don't, in bytes a second: a tenth
/// of 2 Gbit/s, which most machines in clouds have.
const PREWARM_UNKNOWN: Bytes = Bytes(20 << 20);

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

/// What images may take on disk: what is configured, else half of the file system that they are on.
pub(crate) fn image_budget(configured: Option<Bytes>, data_dir: &Path) -> anyhow::Result<Bytes> {
    match configured {
        Some(budget) => Ok(budget),
        None => nix::sys::statvfs::statvfs(data_dir)
            .map(|disk| Bytes(disk.blocks() * disk.fragment_size() / 2))
            .with_context(|| format!("can't measure the disk of {}; check `data_dir`", data_dir.display())),
    }
}

/// Bytes a second that prewarming may take: what is configured, else a part of the uplink.
pub(crate) fn prewarm_rate(configured: Option<Bytes>, uplink: &str) -> Bytes {
    let share = || network::bytes_per_s(uplink).map(|speed| Bytes(speed / PREWARM_SHARE));
    configured.or_else(share).unwrap_or(PREWARM_UNKNOWN)
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
    fn images_have_half_of_the_disk_unless_said() {
        let df = std::process::Command::new("df").args(["--output=size", "-B1", "/"]).output().unwrap();
        let size = String::from_utf8(df.stdout).unwrap();
        let size: u64 = size.lines().last().unwrap().trim().parse().unwrap();
        assert_eq!(image_budget(None, Path::new("/")).unwrap(), Bytes(size / 2));
        assert_eq!(image_budget(Some(Bytes(7)), Path::new("/")).unwrap(), Bytes(7));
        let error = image_budget(None, Path::new("/nowhere/at/all")).unwrap_err();
        assert!(error.to_string().contains("check `data_dir`"), "{error}");
    }

    #[test]
    fn prewarming_is_bounded_also_where_the_uplink_tells_no_speed() {
        // Loopback has none.
        assert_eq!(prewarm_rate(None, "lo"), Bytes(20 << 20));
        assert_eq!(prewarm_rate(Some(Bytes(5)), "lo"), Bytes(5));
    }

    #[test]
    fn the_machine_is_measured() {
        assert_eq!(total_memory("MemTotal:       24613896 kB\nMemFree: 1 kB\n"), Some(24_613_896 * 1_024));
        let found = measure(Path::new("/"));
        assert!(found.cpu.0 >= 1_000 && found.memory.0 > 1 << 20 && found.disk.0 > 1 << 20, "{found:?}");
    }
}
