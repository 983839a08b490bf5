//! The judge. It shares no code with the schedulers: it only sums what is there, and remembers what was said.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use anyplace_model::{Assignment, AttemptId, InstanceId, MachineId, MachineReport, Workload};

/// Whether all of these may be on the machine at once.
///
/// # Errors
/// What there is too little of.
pub(crate) fn fits<'a>(
    machine: &MachineReport,
    all: impl Iterator<Item = &'a Assignment>,
) -> Result<(), String> {
    let (mut cpu, mut memory, mut disk) = (0, 0, 0);
    let mut addresses = BTreeSet::new();
    // Of each GPU: bytes in slices, how many have it whole, and how many have any of it.
    let mut gpus = vec![(0, 0, 0); machine.gpus.len()];
    for one in all {
        cpu += one.resources.cpu.0;
        memory += one.resources.memory.0;
        disk += one.resources.disk.0;
        if !addresses.insert(one.address) {
            return Err(format!("{} is given twice", one.address));
        }
        let Some(request) = &one.resources.gpu else { continue };
        for index in &one.gpus {
            let gpu = gpus.get_mut(*index as usize).ok_or_else(|| format!("there is no GPU {index}"))?;
            gpu.2 += 1;
            match request.memory {
                Some(slice) => gpu.0 += slice.0,
                None => gpu.1 += 1,
            }
        }
    }
    for (what, used, there) in
        [("CPU", cpu, machine.cpu.0), ("memory", memory, machine.memory.0), ("disk", disk, machine.disk.0)]
    {
        if used > there {
            return Err(format!("{what}: {used} of {there}"));
        }
    }
    for ((slices, whole, users), gpu) in gpus.into_iter().zip(&machine.gpus) {
        if slices > gpu.memory.0 || whole > 1 || (whole == 1 && users > 1) {
            return Err(format!("a GPU has {slices} bytes in slices, {whole} whole, {users} users"));
        }
    }
    Ok(())
}

/// What a location is judged by beside what is there now.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Containers that each attempt ever had.
    runs: BTreeMap<AttemptId, BTreeSet<InstanceId>>,
    /// Instances that take new connections, and since when others take none.
    routed: BTreeSet<InstanceId>,
    unrouted_ms: BTreeMap<InstanceId, u64>,
    /// The newest report of each machine that reached the scheduler, and when it was written.
    known: BTreeMap<MachineId, (u64, Rc<MachineReport>)>,
}

impl Memory {
    /// A machine starts a container.
    ///
    /// # Errors
    /// An attempt runs a second time.
    pub(crate) fn starts(&mut self, assignment: &Assignment) -> Result<(), String> {
        let Workload::Job(attempt) = &assignment.workload else { return Ok(()) };
        let runs = self.runs.entry(attempt.clone()).or_default();
        runs.insert(assignment.instance.clone());
        if runs.len() > 1 { Err(format!("{attempt} ran as {runs:?}")) } else { Ok(()) }
    }

    /// A machine begins to end a container that serves connections.
    ///
    /// # Errors
    /// It took new ones until just now.
    pub(crate) fn ends(&self, instance: &InstanceId, now_ms: u64, drain_ms: u64) -> Result<(), String> {
        if self.routed.contains(instance) {
            return Err(format!("{instance} is ended while it takes new connections"));
        }
        match self.unrouted_ms.get(instance).map(|since_ms| now_ms.saturating_sub(*since_ms)) {
            Some(waited_ms) if waited_ms < drain_ms => {
                Err(format!("{instance} is ended {waited_ms} ms after its last new connection"))
            }
            _ => Ok(()),
        }
    }

    /// The scheduler is there anew: it knows nothing.
    pub(crate) fn forget(&mut self) {
        self.known.clear();
    }

    /// A report that was written at this time has reached the scheduler.
    pub(crate) fn hears(&mut self, report: &Rc<MachineReport>, written_ms: u64) {
        match self.known.get_mut(&report.machine) {
            Some((newest_ms, _)) if *newest_ms > written_ms => {}
            Some(known) => *known = (written_ms, report.clone()),
            None => drop(self.known.insert(report.machine.clone(), (written_ms, report.clone()))),
        }
    }

    /// These instances take new connections from now on.
    ///
    /// # Errors
    /// One of them is known to be unready.
    pub(crate) fn routes(
        &mut self,
        now_ms: u64,
        routed: BTreeMap<InstanceId, MachineId>,
    ) -> Result<(), String> {
        for (instance, machine) in &routed {
            let says = |report: &MachineReport| {
                report.instances.iter().any(|status| status.ready && status.instance == *instance)
            };
            if self.known.get(machine).is_none_or(|(_, report)| !says(report)) {
                return Err(format!("{instance} gets connections, and {machine} says that it isn't ready"));
            }
        }
        for instance in self.routed.iter().filter(|instance| !routed.contains_key(*instance)) {
            self.unrouted_ms.insert(instance.clone(), now_ms);
        }
        self.routed = routed.into_keys().collect();
        Ok(())
    }
}
