//! What is still free in a location while a plan is made: an advert, less what the plan has already put there.
//!
//! An advert says what is free in all, and what is free in the largest machine. An instance fits where it is not
//! larger than either. That errs on the hopeful side (the second-largest machine isn't known); the location, which
//! knows its machines, has the last word.
//!
//! Beside it stands what would be free without the location's off-peak jobs: deployments may have that too, where nothing
//! else is left.

use std::rc::Rc;

use anyplace_model::{Advert, Bytes, GpuBlock, GpuRequest, MilliCpu, ReasonCode, Refusal, Resources};

/// The most instances that are counted when asked how many fit.
const MOST_COUNTED: u32 = 10_000;

/// Free capacity of one location.
#[derive(Debug, Clone)]
pub(crate) struct Room {
    cpu: Free,
    memory: Free,
    disk: Free,
    gpus: Vec<GpuBlock>,
    advert: Rc<Advert>,
    /// The same without off-peak jobs, where there are any.
    preemptible: Option<Box<Room>>,
}

#[derive(Debug, Clone, Copy)]
struct Free {
    total: u64,
    largest: u64,
}

impl Free {
    /// The most that one instance can get.
    fn for_one(self) -> u64 {
        self.largest.min(self.total)
    }
}

impl Room {
    pub(crate) fn new(advert: &Advert) -> Self {
        let shared = Rc::new(advert.clone());
        let preemptible = advert.preemptible.as_ref().map(|free| {
            Box::new(Self {
                cpu: Free { total: free.free_cpu.0, largest: free.largest_free_cpu.0 },
                memory: Free { total: free.free_memory.0, largest: free.largest_free_memory.0 },
                disk: Free { total: free.free_disk.0, largest: free.largest_free_disk.0 },
                gpus: free.gpu_blocks.clone(),
                advert: shared.clone(),
                preemptible: None,
            })
        });
        Self {
            cpu: Free { total: advert.free_cpu.0, largest: advert.largest_free_cpu.0 },
            memory: Free { total: advert.free_memory.0, largest: advert.largest_free_memory.0 },
            disk: Free { total: advert.free_disk.0, largest: advert.largest_free_disk.0 },
            gpus: advert.gpu_blocks.clone(),
            advert: shared,
            preemptible,
        }
    }

    /// Whether one more instance fits once off-peak jobs have made way.
    pub(crate) fn fits_preempting(&self, wanted: &Resources) -> bool {
        self.preemptible.as_ref().is_some_and(|room| room.fits(wanted))
    }

    /// Why one more instance doesn't fit; nothing where it does.
    pub(crate) fn refusals(&self, wanted: &Resources) -> Vec<Refusal> {
        if self.advert.machines == 0 {
            return vec![one(ReasonCode::NoMachines, "no machine reports".into())];
        }
        let mut refusals = Vec::new();
        let short = |what, asked: String, most: String| {
            format!("{asked} {what} asked for, at most {most} free in one machine")
        };
        let (cpu, memory, disk) = (self.cpu.for_one(), self.memory.for_one(), self.disk.for_one());
        if wanted.cpu.0 > cpu {
            let text = short("CPU", wanted.cpu.to_string(), MilliCpu(cpu).to_string());
            refusals.push(one(ReasonCode::InsufficientCpu, text));
        }
        if wanted.memory.0 > memory {
            let text = short("memory", wanted.memory.to_string(), bytes(memory));
            refusals.push(one(ReasonCode::InsufficientMemory, text));
        }
        if wanted.disk.0 > disk {
            let text = short("disk", wanted.disk.to_string(), bytes(disk));
            refusals.push(one(ReasonCode::InsufficientDisk, text));
        }
        if let Some(gpu) = &wanted.gpu
            && let Some(refusal) = self.gpu_refusal(gpu)
        {
            refusals.push(refusal);
        }
        refusals
    }

    fn gpu_refusal(&self, wanted: &GpuRequest) -> Option<Refusal> {
        let models: Vec<&String> =
            self.advert.gpus.iter().filter(|(_, count)| **count > 0).map(|(model, _)| model).collect();
        if models.is_empty() {
            return Some(one(ReasonCode::NoGpu, "there is no GPU".into()));
        }
        if !models.iter().any(|model| allowed(wanted, model)) {
            let there: Vec<&str> = models.iter().map(|model| model.as_str()).collect();
            let text = format!("{} asked for, {} there", wanted.models.join(" or "), there.join(", "));
            return Some(one(ReasonCode::NoGpuModel, text));
        }
        if self.choose_gpus(wanted).is_some() {
            return None;
        }
        let found = match self.largest_block(wanted) {
            Some(block) if !fits(block, wanted) => {
                format!("the largest free block is {} ({})", block.memory, block.model)
            }
            Some(block) => {
                format!(
                    "at most {} {} with so much free in one machine",
                    self.together(block, wanted),
                    block.model
                )
            }
            None => "none is free".into(),
        };
        Some(one(ReasonCode::InsufficientGpu, format!("{} asked for; {found}", describe(wanted))))
    }

    /// Whether one more might fit if others were moved: enough is free in all, though maybe not together.
    pub(crate) fn fits_in_sum(&self, wanted: &Resources) -> bool {
        let fits = wanted.cpu.0 <= self.cpu.total
            && wanted.memory.0 <= self.memory.total
            && wanted.disk.0 <= self.disk.total;
        let Some(gpu) = &wanted.gpu else { return fits && self.advert.machines > 1 };
        // Of other models too: who has a part of the right one may go there.
        let free = self.gpus.iter().map(|block| block.memory.0.saturating_mul(u64::from(block.count)));
        let free = free.fold(0, u64::saturating_add);
        let asked = gpu.memory.map_or(1, |memory| memory.0.saturating_mul(u64::from(gpu.count)));
        let of_model = self.advert.gpus.iter().filter(|(model, _)| allowed(gpu, model));
        let there = of_model.fold(0, |sum: u32, (_, count)| sum.saturating_add(*count));
        fits && free >= asked && there >= gpu.count
    }

    /// The largest free block of an allowed model.
    pub(crate) fn largest_block(&self, wanted: &GpuRequest) -> Option<&GpuBlock> {
        self.gpus
            .iter()
            .filter(|block| block.count > 0 && allowed(wanted, &block.model))
            .max_by_key(|block| (block.whole, block.memory))
    }

    /// GPUs of the block's model with enough free that one machine may have.
    pub(crate) fn together(&self, block: &GpuBlock, wanted: &GpuRequest) -> u32 {
        self.gpus
            .iter()
            .filter(|other| other.model == block.model && fits(other, wanted))
            .map(|other| other.most_in_one_machine.min(other.count))
            .sum()
    }

    /// The model whose smallest fitting block leaves least over, and its fitting blocks, smallest first.
    fn choose_gpus(&self, wanted: &GpuRequest) -> Option<Vec<usize>> {
        let mut fitting: Vec<usize> = (0..self.gpus.len())
            .filter(|index| {
                let block = &self.gpus[*index];
                block.count > 0 && fits(block, wanted) && self.together(block, wanted) >= wanted.count
            })
            .collect();
        // Least left over first, so that large blocks stay large; the model's name breaks ties.
        fitting.sort_by(|a, b| {
            let key = |index: &usize| (self.gpus[*index].memory, &self.gpus[*index].model);
            key(a).cmp(&key(b))
        });
        let model = self.gpus[*fitting.first()?].model.clone();
        fitting.retain(|index| self.gpus[*index].model == model);
        Some(fitting)
    }

    /// Takes the room of one instance. Returns whether it was there; takes nothing otherwise.
    pub(crate) fn take(&mut self, wanted: &Resources) -> bool {
        let fits = self.fits(wanted);
        if fits {
            self.deduct(wanted);
        }
        fits
    }

    /// Whether there is room for one instance.
    pub(crate) fn fits(&self, wanted: &Resources) -> bool {
        self.refusals(wanted).is_empty()
    }

    /// Deducts what is on its way, as far as it is there.
    pub(crate) fn deduct(&mut self, wanted: &Resources) {
        if let Some(room) = &mut self.preemptible {
            room.deduct(wanted);
        }
        self.cpu.total = self.cpu.total.saturating_sub(wanted.cpu.0);
        self.memory.total = self.memory.total.saturating_sub(wanted.memory.0);
        self.disk.total = self.disk.total.saturating_sub(wanted.disk.0);
        let Some(gpu) = &wanted.gpu else { return };
        let mut left = gpu.count;
        let mut rests = Vec::new();
        for index in self.choose_gpus(gpu).unwrap_or_default() {
            let block = &mut self.gpus[index];
            let taken = left.min(block.most_in_one_machine.min(block.count));
            block.count -= taken;
            block.most_in_one_machine = block.most_in_one_machine.min(block.count);
            left -= taken;
            if let Some(memory) = gpu.memory
                && taken > 0
                && block.memory > memory
            {
                rests.push(GpuBlock {
                    model: block.model.clone(),
                    memory: Bytes(block.memory.0 - memory.0),
                    whole: false,
                    count: taken,
                    most_in_one_machine: taken,
                });
            }
        }
        self.gpus.retain(|block| block.count > 0);
        for rest in rests {
            match self.gpus.iter_mut().find(|block| {
                block.model == rest.model && block.memory == rest.memory && block.whole == rest.whole
            }) {
                Some(block) => {
                    block.count += rest.count;
                    block.most_in_one_machine = block.most_in_one_machine.max(rest.most_in_one_machine);
                }
                None => self.gpus.push(rest),
            }
        }
    }

    /// What is free in all: thousandths of CPU, bytes of memory, whole GPUs.
    pub(crate) fn free(&self) -> (u64, u64, u64) {
        let whole = self.gpus.iter().filter(|block| block.whole).map(|block| u64::from(block.count));
        (self.cpu.total, self.memory.total, whole.sum())
    }

    /// What is there in all, in the same units.
    pub(crate) fn all(&self) -> (u64, u64, u64) {
        let gpus = self.advert.gpus.values().map(|count| u64::from(*count));
        (self.advert.cpu.0, self.advert.memory.0, gpus.sum())
    }

    /// How many more instances fit, up to a bound.
    pub(crate) fn count(&self, wanted: &Resources) -> u32 {
        let mut room = self.clone();
        (0..MOST_COUNTED).take_while(|_| room.take(wanted)).count() as u32
    }

    /// Thousandths of the scarcer of CPU and memory that are in use.
    pub(crate) fn used_permille(&self) -> u64 {
        let used = |free: u64, all: u64| 1_000 - (free.min(all) * 1_000).checked_div(all).unwrap_or(0);
        used(self.cpu.total, self.advert.cpu.0).max(used(self.memory.total >> 20, self.advert.memory.0 >> 20))
    }
}

fn allowed(wanted: &GpuRequest, model: &str) -> bool {
    wanted.models.is_empty() || wanted.models.iter().any(|name| name == model)
}

/// Whether a GPU with this block free is enough.
pub(crate) fn fits(block: &GpuBlock, wanted: &GpuRequest) -> bool {
    allowed(wanted, &block.model) && wanted.memory.map_or(block.whole, |memory| block.memory >= memory)
}

/// A GPU request in words: `2 x 80Gi of A100 or H100`.
pub(crate) fn describe(wanted: &GpuRequest) -> String {
    let size = wanted.memory.map_or("whole GPU".into(), |memory| memory.to_string());
    let count = if wanted.count > 1 { format!("{} x ", wanted.count) } else { String::new() };
    let models = match wanted.models.as_slice() {
        [] => String::new(),
        models => format!(" of {}", models.join(" or ")),
    };
    format!("{count}{size}{models}")
}

/// A size to read: rounded down to the largest unit that leaves at least one.
pub(crate) fn bytes(bytes: u64) -> String {
    let unit = [40, 30, 20, 10].into_iter().find(|shift| bytes >> shift > 0);
    let rounded = unit.map_or(bytes, |shift| bytes >> shift << shift);
    Bytes(rounded).to_string()
}

pub(crate) fn one(reason: ReasonCode, message: String) -> Refusal {
    Refusal { reason, count: 1, message }
}
