//! What is free on one machine, and what fits into it.

use super::PARTS;

/// GPUs of one machine that can be used.
pub(crate) const MAX_GPUS: u32 = 64;

/// GPU models that will do, by number: bit `n` is model `n`. All bits: any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Models(u64);

impl Models {
    /// Any model.
    pub const ANY: Self = Self(u64::MAX);
    /// The number of all models that have none of their own.
    pub const UNNAMED: u8 = 63;

    /// The models of these numbers, each below [`UNNAMED`](Self::UNNAMED).
    pub fn these(models: impl IntoIterator<Item = u8>) -> Self {
        Self(
            models
                .into_iter()
                .filter(|model| *model < Self::UNNAMED)
                .fold(0, |set, model| set | (1 << model)),
        )
    }

    /// Whether a model will do.
    pub const fn allow(self, model: u8) -> bool {
        self.0 & (1 << (model as u64 & 63)) != 0
    }
}

/// What something needs on one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ask {
    /// CPU, in thousandths.
    pub cpu: i64,
    /// Memory, in bytes.
    pub memory: i64,
    /// Disk, in bytes.
    pub disk: i64,
    /// How many different GPUs.
    pub gpus: u32,
    /// Memory on each of them, in bytes; none for whole GPUs.
    pub slice: Option<i64>,
    /// Models that will do.
    pub models: Models,
}

/// GPUs of one machine by index. Those from 64 on can't be named, and aren't used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct GpuSet(u64);

impl GpuSet {
    /// These GPUs.
    pub fn of(gpus: impl IntoIterator<Item = u32>) -> Self {
        Self(gpus.into_iter().filter(|gpu| *gpu < MAX_GPUS).fold(0, |set, gpu| set | (1 << gpu)))
    }

    /// Their indexes, ascending.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            let next = (rest != 0).then(|| rest.trailing_zeros())?;
            rest &= rest - 1;
            Some(next)
        })
    }

    /// Whether a GPU is one of them.
    pub const fn contains(self, gpu: u32) -> bool {
        gpu < MAX_GPUS && self.0 & (1 << gpu) != 0
    }

    pub(super) const fn with(self, gpu: u32) -> Self {
        if gpu < MAX_GPUS { Self(self.0 | (1 << gpu)) } else { self }
    }
}

/// What a machine lacks for an [`Ask`], with how much of it is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lack {
    /// GPUs of an allowed model with enough free: how many there are.
    Gpus(u32),
    /// CPU, in thousandths.
    Cpu(i64),
    /// Memory, in bytes.
    Memory(i64),
    /// Disk, in bytes.
    Disk(i64),
}

/// One GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Gpu {
    /// Number of its model.
    pub model: u8,
    /// Memory in all, in bytes.
    pub size: i64,
    free: i64,
    slices: u32,
    whole: u32,
}

impl Gpu {
    /// A GPU that is entirely free.
    pub const fn new(model: u8, size: i64) -> Self {
        Self { model, size, free: size, slices: 0, whole: 0 }
    }

    /// Whether nothing holds a part of it.
    pub const fn is_whole(&self) -> bool {
        self.slices == 0 && self.whole == 0
    }

    /// How many hold a part of it.
    pub(super) const fn holders(&self) -> u32 {
        self.slices.saturating_add(self.whole)
    }

    /// Memory that a slice could have, in bytes.
    pub const fn free(&self) -> i64 {
        if self.whole > 0 { 0 } else { self.free }
    }

    /// The same in parts of the GPU.
    pub(super) fn parts(&self) -> i64 {
        match self.size {
            ..=0 => 0,
            // Shifted, so that no size overflows; what is left of a GPU below a thousandth of it doesn't matter.
            size => (self.free().max(0) >> 20).saturating_mul(PARTS) / (size >> 20).max(1),
        }
    }

    pub(super) fn can(&self, ask: &Ask) -> bool {
        ask.models.allow(self.model)
            && match ask.slice {
                Some(slice) => self.whole == 0 && self.free >= slice,
                None => self.is_whole(),
            }
    }
}

/// What is free on one machine. Signed, because a machine may come back smaller than what is placed on it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Free {
    /// CPU, in thousandths.
    pub cpu: i64,
    /// Memory, in bytes.
    pub memory: i64,
    /// Disk, in bytes.
    pub disk: i64,
    /// GPUs by index.
    pub gpus: Vec<Gpu>,
    /// CPU of the machine in all, in thousandths.
    pub all_cpu: i64,
}

impl Free {
    /// Takes what was asked for, on these GPUs.
    pub fn take(&mut self, ask: &Ask, gpus: GpuSet) {
        self.add(ask, gpus, -1);
    }

    /// Gives back what [`take`](Self::take) took.
    pub fn give_back(&mut self, ask: &Ask, gpus: GpuSet) {
        self.add(ask, gpus, 1);
    }

    fn add(&mut self, ask: &Ask, gpus: GpuSet, sign: i64) {
        self.cpu = self.cpu.saturating_add(ask.cpu.saturating_mul(sign));
        self.memory = self.memory.saturating_add(ask.memory.saturating_mul(sign));
        self.disk = self.disk.saturating_add(ask.disk.saturating_mul(sign));
        for index in gpus.iter() {
            // A machine may have come back with fewer.
            let Some(gpu) = self.gpus.get_mut(index as usize) else { continue };
            let holders = match ask.slice {
                Some(slice) => {
                    gpu.free = gpu.free.saturating_add(slice.saturating_mul(sign));
                    &mut gpu.slices
                }
                None => &mut gpu.whole,
            };
            *holders = if sign < 0 { holders.saturating_add(1) } else { holders.saturating_sub(1) };
        }
    }

    /// Whether something fits: GPUs, then CPU, memory and disk.
    pub(crate) fn check(&self, ask: &Ask) -> Result<(), Lack> {
        if ask.gpus > 0 {
            let able = self.gpus.iter().filter(|gpu| gpu.can(ask)).count() as u32;
            if able < ask.gpus {
                return Err(Lack::Gpus(able));
            }
        }
        if self.cpu < ask.cpu {
            Err(Lack::Cpu(self.cpu))
        } else if self.memory < ask.memory {
            Err(Lack::Memory(self.memory))
        } else if self.disk < ask.disk {
            Err(Lack::Disk(self.disk))
        } else {
            Ok(())
        }
    }

    /// Whether something fits on these very GPUs.
    pub(crate) fn fits_on(&self, ask: &Ask, gpus: GpuSet) -> bool {
        let can = |index: u32| self.gpus.get(index as usize).is_some_and(|gpu| gpu.can(ask));
        gpus.iter().count() == ask.gpus as usize && gpus.iter().all(can) && self.check(ask).is_ok()
    }

    /// Shows the sets of GPUs worth a look for something that fits. One GPU: of each kind with as much free. Several:
    /// those with the least to spare.
    pub(super) fn for_each_choice(&self, ask: &Ask, mut take: impl FnMut(GpuSet)) {
        let able = || (0_u32..).zip(&self.gpus).filter(|(_, gpu)| gpu.can(ask));
        match ask.gpus {
            0 => take(GpuSet::default()),
            1 => able()
                .filter(|(index, gpu)| !self.gpus[..*index as usize].contains(gpu))
                .for_each(|(index, _)| take(GpuSet::of([index]))),
            count => {
                let mut able: Vec<(i64, u32)> = able().map(|(index, gpu)| (gpu.parts(), index)).collect();
                able.sort_unstable();
                take(GpuSet::of(able.into_iter().take(count as usize).map(|(_, index)| index)));
            }
        }
    }

    /// Parts of GPUs that are free.
    pub(super) fn gpu_parts(&self) -> i64 {
        self.gpus.iter().map(Gpu::parts).sum()
    }

    /// How far apart the free parts of CPU and of GPUs are: 0 to [`PARTS`].
    pub(super) fn unevenness(&self) -> i64 {
        if self.gpus.is_empty() {
            return 0;
        }
        let cpu = self.cpu.clamp(0, self.all_cpu).saturating_mul(PARTS) / self.all_cpu.max(1);
        (cpu - self.gpu_parts() / self.gpus.len() as i64).abs()
    }
}
