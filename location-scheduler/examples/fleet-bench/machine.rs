//! A simulated machine: has what it should have, at once, and says so.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use anyplace_api::{Client, WatchEvent, Watcher};
use anyplace_model::{
    Assignment, Bytes, DeploymentName, Gpu, InstanceId, InstancePhase, InstanceStatus, Isolation,
    MachineDesired, MachineId, MachineReport, Mark, MilliCpu, Workload,
};

/// The lease here is a minute.
const HEARTBEAT: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub(crate) struct Machine {
    client: Client,
    state: Arc<Mutex<State>>,
}

struct State {
    name: MachineId,
    number: usize,
    sequence: u64,
    assignments: BTreeMap<String, Assignment>,
    /// Instances that don't pass their check.
    failing: BTreeSet<InstanceId>,
    mark: Option<Mark>,
}

impl Machine {
    pub(crate) async fn start(number: usize, client: Client) -> Self {
        let name = format!("m{number}").parse().unwrap();
        let state = State {
            name,
            number,
            sequence: 0,
            assignments: BTreeMap::new(),
            failing: BTreeSet::new(),
            mark: None,
        };
        let machine = Self { client, state: Arc::new(Mutex::new(state)) };
        while machine.report().await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::spawn(machine.clone().follow());
        tokio::spawn(machine.clone().beat());
        machine
    }

    pub(crate) fn instances(&self) -> Vec<InstanceId> {
        self.state().assignments.values().map(|it| it.instance.clone()).collect()
    }

    /// Lets an instance pass its check, or fail it, and says so; its deployment, and how many of that are ready here.
    pub(crate) async fn set_ready(&self, instance: &InstanceId, ready: bool) -> (DeploymentName, u32) {
        let (deployment, left) = {
            let mut state = self.state();
            let _ =
                if ready { state.failing.remove(instance) } else { state.failing.insert(instance.clone()) };
            let State { assignments, failing, .. } = &*state;
            let changed = assignments.values().find(|it| it.instance == *instance).unwrap();
            let Workload::Deployment(deployment) = &changed.workload else { panic!("only deployments run") };
            let left = assignments
                .values()
                .filter(|it| it.workload == changed.workload && !failing.contains(&it.instance));
            (deployment.clone(), left.count() as u32)
        };
        self.report().await.unwrap();
        (deployment, left)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn report(&self) -> Result<(), anyplace_api::ClientError> {
        let report = self.state().report();
        self.client.report_machine(&report).await
    }

    async fn beat(self) {
        loop {
            tokio::time::sleep(HEARTBEAT).await;
            // The next one tries again.
            let _ = self.report().await;
        }
    }

    async fn follow(self) {
        let path = Client::machine_desired_path(&self.state().name);
        let mut watcher = Watcher::<MachineDesired>::new(self.client.clone(), path);
        let mut changed = false;
        loop {
            match watcher.next(|_| {}).await {
                WatchEvent::Reset { .. } => self.state().assignments.clear(),
                WatchEvent::Put { key, value: MachineDesired::Instance(assignment), .. } => {
                    changed |= self.state().assignments.insert(key, *assignment).is_none();
                }
                WatchEvent::Put { value: MachineDesired::Mark(mark), .. } => {
                    changed |= self.state().mark.replace(mark) != Some(mark);
                }
                WatchEvent::Put { .. } => {}
                WatchEvent::Delete { key, .. } => changed |= self.state().assignments.remove(&key).is_some(),
                // It comes as a heartbeat too.
                WatchEvent::Synced { .. } => {
                    if std::mem::take(&mut changed) && self.report().await.is_err() {
                        changed = true;
                    }
                }
            }
        }
    }
}

impl State {
    fn report(&mut self) -> MachineReport {
        self.sequence += 1;
        let [.., high, low] = (256 + self.number as u32).to_be_bytes();
        MachineReport {
            machine: self.name.clone(),
            epoch: 1,
            sequence: self.sequence,
            address: Ipv4Addr::new(10, high, low, 1),
            instance_cidr: format!("10.{high}.{low}.64/26").parse().unwrap(),
            advertise: "http://127.0.0.1:9".into(),
            cpu: MilliCpu(64_000),
            memory: Bytes(512 << 30),
            disk: Bytes(4_000 << 30),
            gpus: vec![Gpu { model: "A100".into(), memory: Bytes(80 << 30) }; 8],
            isolations: vec![Isolation::Container],
            conditions: Vec::new(),
            images: BTreeMap::new(),
            instances: self.assignments.values().map(|it| self.status(it)).collect(),
            mark: self.mark,
        }
    }

    fn status(&self, assignment: &Assignment) -> InstanceStatus {
        InstanceStatus {
            instance: assignment.instance.clone(),
            workload: assignment.workload.clone(),
            generation: assignment.generation,
            machine: self.name.clone(),
            address: assignment.address,
            phase: InstancePhase::Running,
            ready: !self.failing.contains(&assignment.instance),
            restarts: 0,
            exit_code: None,
            started_at: None,
            ended_at: None,
            reason: None,
        }
    }
}
