//! What jobs leave to deployments: head-room in each location, and which use of a location is so little that it is
//! off-peak at any hour.

use anyplace_model::{Advert, Bytes, MilliCpu, ReasonCode, Refusal, Resources};

use crate::room::{Room, bytes, one};

/// What an operator set for jobs in all locations. By default they may use everything, in off-peak windows alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct JobLimits {
    /// Percent of a location's CPU, memory and whole GPUs that jobs leave free.
    pub headroom_percent: u8,
    /// A location is off-peak at any hour for a job with which less than so many percent of its CPU and memory are
    /// reserved; 0: none is.
    pub off_peak_below_percent: u8,
}

/// One resource of a location: what would be reserved, and all there is.
struct Use {
    what: &'static str,
    used: u64,
    all: u64,
    words: fn(u64) -> String,
}

impl JobLimits {
    /// Why the head-room keeps the job out; nothing where it doesn't.
    pub(crate) fn headroom(&self, room: &Room, wanted: &Resources) -> Option<Refusal> {
        let most = |all: u64| all - share(all, self.headroom_percent);
        let full = uses(room, wanted).into_iter().find(|it| it.used > most(it.all))?;
        let text = format!(
            "with it, {} of {} {} would be reserved, and {} % are kept free for deployments",
            (full.words)(full.used),
            (full.words)(full.all),
            full.what,
            self.headroom_percent
        );
        Some(one(ReasonCode::Headroom, text))
    }

    /// Whether so little is reserved, with the job, that the location is off-peak.
    pub(crate) fn is_idle(&self, room: &Room, wanted: &Resources) -> bool {
        self.off_peak_below_percent > 0
            && percent(room, wanted).is_some_and(|percent| percent < u64::from(self.off_peak_below_percent))
    }

    /// Whether so little is reserved that the location is off-peak for very small jobs.
    pub(crate) fn is_idle_now(&self, advert: &Advert) -> bool {
        let nothing = Resources { cpu: MilliCpu(0), memory: Bytes(0), disk: Bytes(0), gpu: None };
        self.is_idle(&Room::new(advert), &nothing)
    }

    /// Says how far a location is from being off-peak by its use; nothing where that doesn't count.
    pub(crate) fn above(&self, room: &Room, wanted: &Resources) -> String {
        match percent(room, wanted).filter(|_| self.off_peak_below_percent > 0) {
            Some(percent) => format!(
                "; with it, {percent} % would be reserved, and below {} % it is off-peak at any hour",
                self.off_peak_below_percent
            ),
            None => String::new(),
        }
    }
}

fn share(all: u64, percent: u8) -> u64 {
    u64::try_from(u128::from(all) * u128::from(percent.min(100)) / 100).unwrap_or(all)
}

/// Percent of the scarcer of CPU and memory, rounded down; none where nothing is there.
fn percent(room: &Room, wanted: &Resources) -> Option<u64> {
    let [cpu, memory, _] = uses(room, wanted);
    let percent = |it: Use| u64::try_from((u128::from(it.used) * 100).checked_div(u128::from(it.all))?).ok();
    Some(percent(cpu)?.max(percent(memory)?))
}

fn uses(room: &Room, wanted: &Resources) -> [Use; 3] {
    let (free, all) = (room.free(), room.all());
    let used = |all: u64, free: u64, wanted: u64| (all - free.min(all)).saturating_add(wanted);
    // Parts of GPUs don't count: adverts don't say of how much.
    let gpus = wanted.gpu.as_ref().filter(|gpu| gpu.memory.is_none()).map(|gpu| u64::from(gpu.count));
    [
        Use {
            what: "CPU",
            used: used(all.0, free.0, wanted.cpu.0),
            all: all.0,
            words: |milli| MilliCpu(milli).to_string(),
        },
        Use { what: "memory", used: used(all.1, free.1, wanted.memory.0), all: all.1, words: bytes },
        Use {
            what: "GPUs",
            used: gpus.map_or(0, |gpus| used(all.2, free.2, gpus)),
            all: all.2,
            words: |count| count.to_string(),
        },
    ]
}
