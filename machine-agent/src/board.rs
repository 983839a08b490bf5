//! What is so now: instances, images and conditions, as they are reported. Tasks write, the reporter and the API
//! read; every change wakes the reporter.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyplace_model::{Condition, ImageState, InstanceId, InstancePhase, InstanceStatus, Mark};
use tokio::sync::watch;

/// Images of instances that are reported, beside those that are wanted: a report stays small, and what is missing in it
/// only means that another machine may be preferred.
const MAX_USED: usize = 256;

/// The board.
#[derive(Debug)]
pub(crate) struct Board {
    facts: Mutex<Facts>,
    changed: watch::Sender<()>,
}

/// What stands on the board.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    pub(crate) instances: BTreeMap<InstanceId, InstanceStatus>,
    /// Images that are wanted.
    pub(crate) images: BTreeMap<String, ImageState>,
    /// The image that an instance has: it is here, whether it is wanted by itself or not.
    used: BTreeMap<InstanceId, String>,
    pub(crate) conditions: Vec<Condition>,
    /// Up to where what should be here is known.
    pub(crate) mark: Option<Mark>,
}

impl Facts {
    /// How all images stand that are wanted or used.
    pub(crate) fn all_images(&self) -> BTreeMap<String, ImageState> {
        let mut images = self.images.clone();
        let mut room = MAX_USED;
        for reference in self.used.values() {
            match images.get_mut(reference) {
                Some(state @ ImageState::Cold) => *state = ImageState::Warm,
                Some(_) => {}
                None if room == 0 => {}
                None => {
                    room -= 1;
                    images.insert(reference.clone(), ImageState::Warm);
                }
            }
        }
        images
    }
}

impl Board {
    pub(crate) fn new(conditions: Vec<Condition>) -> Self {
        let facts = Facts { conditions, ..Facts::default() };
        Self { facts: Mutex::new(facts), changed: watch::Sender::new(()) }
    }

    pub(crate) fn facts(&self) -> Facts {
        self.lock().clone()
    }

    /// Wakes at each change.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub(crate) fn set_instance(&self, status: InstanceStatus) {
        let before = self.lock().instances.insert(status.instance.clone(), status.clone());
        if before.as_ref() != Some(&status) {
            self.changed.send_replace(());
        }
    }

    /// Has an instance stand here from now on, whatever becomes of it.
    pub(crate) fn expect_instance(&self, status: InstanceStatus) {
        self.lock().instances.entry(status.instance.clone()).or_insert(status);
    }

    /// All that was taken back up to this mark is known.
    pub(crate) fn set_mark(&self, mark: Mark) {
        if self.lock().mark.replace(mark) != Some(mark) {
            self.changed.send_replace(());
        }
    }

    pub(crate) fn use_image(&self, instance: &InstanceId, reference: &str) {
        let mut facts = self.lock();
        if facts.used.get(instance).is_none_or(|used| used != reference) {
            facts.used.insert(instance.clone(), reference.into());
            drop(facts);
            self.changed.send_replace(());
        }
    }

    pub(crate) fn remove_instance(&self, instance: &InstanceId) {
        let mut facts = self.lock();
        facts.instances.remove(instance);
        facts.used.remove(instance);
        drop(facts);
        self.changed.send_replace(());
    }

    /// Whether there is an instance, and whether it may still write to its log.
    pub(crate) fn may_write(&self, instance: &InstanceId) -> Option<bool> {
        let status = self.lock().instances.get(instance).map(|status| status.phase);
        status.map(|phase| !matches!(phase, InstancePhase::Exited | InstancePhase::Failed))
    }

    pub(crate) fn set_image(&self, reference: &str, state: ImageState) {
        self.lock().images.insert(reference.into(), state);
        self.changed.send_replace(());
    }

    /// Tells how far a fetch is, if that is what the image is waiting for.
    pub(crate) fn advance_image(&self, reference: &str, done: u64, total: u64) {
        if let Some(state @ ImageState::Pulling { .. }) = self.lock().images.get_mut(reference) {
            *state = ImageState::Pulling { done, total };
        }
        self.changed.send_replace(());
    }

    pub(crate) fn remove_image(&self, reference: &str) {
        self.lock().images.remove(reference);
        self.changed.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        // Each change is complete before anything that could panic.
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_of_instances_are_warm_and_as_many_as_a_report_takes() {
        let board = Board::new(Vec::new());
        let pulling = ImageState::Pulling { done: 1, total: 2 };
        board.set_image("queued", ImageState::Cold);
        board.set_image("moved", pulling.clone());
        for (instance, image) in [("a-1", "queued"), ("a-2", "moved"), ("a-3", "own"), ("a-4", "own")] {
            board.use_image(&instance.parse().unwrap(), image);
        }
        let expected = [("moved", pulling), ("own", ImageState::Warm), ("queued", ImageState::Warm)]
            .map(|(name, state)| (name.to_owned(), state));
        assert_eq!(board.facts().all_images(), BTreeMap::from(expected));
        board.remove_instance(&"a-3".parse().unwrap());
        assert!(board.facts().all_images().contains_key("own"));
        board.remove_instance(&"a-4".parse().unwrap());
        assert!(!board.facts().all_images().contains_key("own"));
        for number in 0..2 * MAX_USED {
            board.use_image(&format!("b-{number}").parse().unwrap(), &format!("image-{number}"));
        }
        assert_eq!(board.facts().all_images().len(), 2 + MAX_USED);
    }
}
