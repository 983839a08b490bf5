//! Whose turn it is to fetch: a few at a time, the most urgent first, among equals whoever came first. One that becomes
//! more urgent while it waits overtakes the others. Nothing is taken back from one that has its turn.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

/// The queue. As long as the images that are wanted, which the location scheduler bounds.
#[derive(Debug)]
pub(crate) struct Queue {
    parallel: usize,
    state: Mutex<State>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    /// Number of the next that comes.
    next: u64,
    waiting: BTreeSet<Place>,
}

/// The least is next: by priority, then by when it came.
type Place = (Reverse<u8>, u64);

/// The right to fetch, until it is dropped.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Queue);

/// A place in the queue, given up when it is dropped.
struct Ticket<'a> {
    queue: &'a Queue,
    place: Place,
}

impl Queue {
    pub(crate) fn new(parallel: usize) -> Self {
        Self { parallel, state: Mutex::default(), changed: watch::Sender::new(()) }
    }

    /// Waits for a turn, with a priority that may change meanwhile.
    pub(crate) async fn turn(&self, mut priority: watch::Receiver<u8>) -> Turn<'_> {
        let mut changed = self.changed.subscribe();
        let mut ticket = self.enter(*priority.borrow_and_update());
        loop {
            changed.mark_unchanged();
            if ticket.take_turn() {
                return Turn(self);
            }
            tokio::select! {
                // The sender lives as long as the queue.
                _ = changed.changed() => {}
                Ok(()) = priority.changed() => ticket.move_to(*priority.borrow_and_update()),
            }
        }
    }

    fn enter(&self, priority: u8) -> Ticket<'_> {
        let mut state = self.lock();
        let place = (Reverse(priority), state.next);
        state.next += 1;
        state.waiting.insert(place);
        Ticket { queue: self, place }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket<'_> {
    fn take_turn(&mut self) -> bool {
        let mut state = self.queue.lock();
        let next = state.running < self.queue.parallel && state.waiting.first() == Some(&self.place);
        if next {
            state.running += 1;
        }
        next
    }

    fn move_to(&mut self, priority: u8) {
        let mut state = self.queue.lock();
        state.waiting.remove(&self.place);
        self.place.0 = Reverse(priority);
        state.waiting.insert(self.place);
        drop(state);
        self.queue.changed.send_replace(());
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        self.queue.lock().waiting.remove(&self.place);
        // The one behind it may be next now.
        self.queue.changed.send_replace(());
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
        self.0.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::mpsc;

    use super::*;

    /// Puts one into the queue; it says its name when it has its turn, and ends it when told to.
    async fn join(
        queue: &Arc<Queue>,
        name: &'static str,
        priority: u8,
        turns: &mpsc::UnboundedSender<(&'static str, tokio::sync::oneshot::Sender<()>)>,
    ) -> (watch::Sender<u8>, tokio::task::JoinHandle<()>) {
        let (sender, receiver) = watch::channel(priority);
        let (queue, turns) = (queue.clone(), turns.clone());
        let before = queue.lock().next;
        let task = tokio::spawn({
            let queue = queue.clone();
            async move {
                let turn = queue.turn(receiver).await;
                let (end, ended) = tokio::sync::oneshot::channel();
                turns.send((name, end)).unwrap();
                let _ = ended.await;
                drop(turn);
            }
        });
        while queue.lock().next == before {
            tokio::task::yield_now().await;
        }
        (sender, task)
    }

    #[tokio::test]
    async fn the_most_urgent_is_next_however_late_it_comes_or_becomes_so() {
        let queue = Arc::new(Queue::new(1));
        let (turns, mut next) = mpsc::unbounded_channel();
        let first = join(&queue, "first", 10, &turns).await;
        let (name, end) = next.recv().await.unwrap();
        assert_eq!(name, "first");
        let low = join(&queue, "low", 10, &turns).await;
        let same = join(&queue, "as low, later", 10, &turns).await;
        let gone = join(&queue, "gone", 99, &turns).await;
        let high = join(&queue, "high", 50, &turns).await;
        let raised = join(&queue, "raised", 1, &turns).await;
        raised.0.send_replace(60);
        gone.1.abort();
        let _ = gone.1.await;
        while queue.lock().waiting.first().is_none_or(|place| place.0 != Reverse(60)) {
            tokio::task::yield_now().await;
        }
        let mut end = Some(end);
        for expected in ["raised", "high", "low", "as low, later"] {
            // One at a time: nobody has a turn before the last one's is over.
            assert!(next.try_recv().is_err());
            end.take().unwrap().send(()).unwrap();
            let (name, this) = next.recv().await.unwrap();
            assert_eq!(name, expected);
            end = Some(this);
        }
        drop(end);
        for (_, task) in [first, low, same, high, raised] {
            task.await.unwrap();
        }
        let state = queue.lock();
        assert_eq!((state.running, state.waiting.len()), (0, 0));
    }

    #[tokio::test]
    async fn a_few_go_at_once() {
        let queue = Arc::new(Queue::new(3));
        let (turns, mut next) = mpsc::unbounded_channel();
        let mut all = Vec::new();
        for name in ["a", "b", "c", "d"] {
            all.push(join(&queue, name, 0, &turns).await);
        }
        let mut ends = Vec::new();
        for _ in 0..3 {
            ends.push(next.recv().await.unwrap());
        }
        assert!(next.try_recv().is_err());
        ends.pop().unwrap().1.send(()).unwrap();
        assert_eq!(next.recv().await.unwrap().0, "d");
    }
}
