//! Spreads what ingresses need over what destinations can serve, at little cost: a transport problem.
//!
//! What has no place yet takes the best that is free: first who would lose most without it (Vogel's method). Then what is
//! placed changes places in circles, as long as that saves enough: A's connections to where B's are, B's to where room is.
//! Where no circle saves anything, nothing can be better (that is how minimum-cost flows are characterised); here each
//! move counts as a cost of its own, so that what is nearly as good stays as it is.

use std::collections::BTreeMap;

/// Amounts below this are none.
pub(crate) const NOTHING: f64 = 1e-9;
/// Changing the place of connections must save so much for each, in milliseconds.
const WORTH_MS: f64 = 0.2;
/// Circles at one time; the next round goes on.
const MOST_CIRCLES: usize = 64;

/// Amounts by destination.
pub(crate) type Flow = BTreeMap<usize, f64>;

/// Room at a site for some cost on top of the way there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub(crate) site: usize,
    pub(crate) free: f64,
    pub(crate) surcharge_ms: f64,
}

impl Room {
    fn is_open(&self) -> bool {
        self.free > NOTHING
    }
}

/// Who is where.
pub(crate) struct Transport<'a> {
    rooms: Vec<Room>,
    /// Amounts by ingress and room.
    placed: Vec<Flow>,
    latency_ms: &'a dyn Fn(usize, usize) -> f64,
}

/// Some of a source's amount changes its room.
#[derive(Debug, Clone, Copy)]
struct Move {
    cost: f64,
    source: usize,
    from: usize,
    to: usize,
}

impl<'a> Transport<'a> {
    /// From flows by site; a site's rooms are next to each other, and are filled in their order.
    pub(crate) fn new(
        flows: &[Flow],
        mut rooms: Vec<Room>,
        latency_ms: &'a dyn Fn(usize, usize) -> f64,
    ) -> Self {
        rooms.sort_by_key(|room| room.site);
        let mut placed = vec![Flow::new(); flows.len()];
        for (source, flow) in flows.iter().enumerate() {
            for (site, amount) in flow {
                let mut left = *amount;
                let first = rooms.partition_point(|room| room.site < *site);
                for (index, room) in rooms.iter_mut().enumerate().skip(first) {
                    let some = left.min(room.free);
                    if room.site != *site || left <= NOTHING {
                        break;
                    }
                    if some > NOTHING {
                        placed[source].insert(index, some);
                        room.free -= some;
                        left -= some;
                    }
                }
            }
        }
        Self { rooms, placed, latency_ms }
    }

    /// Amounts by ingress and site.
    pub(crate) fn flows(&self) -> Vec<Flow> {
        let by_site = |placed: &Flow| {
            let mut flow = Flow::new();
            placed
                .iter()
                .for_each(|(room, amount)| *flow.entry(self.rooms[*room].site).or_default() += amount);
            flow
        };
        self.placed.iter().map(by_site).collect()
    }

    /// Gives each ingress a place for what it needs, as far as there is room.
    pub(crate) fn place(&mut self, needs: &[f64]) {
        let mut sources: Vec<Source> = Vec::new();
        for (source, need) in needs.iter().enumerate() {
            let unmet = need - self.placed[source].values().sum::<f64>();
            if unmet <= NOTHING {
                continue;
            }
            let open = (0..self.rooms.len()).filter(|room| self.rooms[*room].is_open());
            let mut places: Vec<(f64, usize)> = open.map(|room| (self.cost(source, room), room)).collect();
            places.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            sources.push(Source { source, unmet, places, next: 0 });
        }
        loop {
            let mut best: Option<(f64, usize)> = None;
            for (index, source) in sources.iter_mut().enumerate() {
                let is_open = |place: &(f64, usize)| self.rooms[place.1].is_open();
                while source.places.get(source.next).is_some_and(|place| !is_open(place)) {
                    source.next += 1;
                }
                let Some((cheapest, _)) = source.places.get(source.next) else { continue };
                let second = source.places[source.next + 1..].iter().find(|place| is_open(place));
                let regret = second.map_or(f64::INFINITY, |(cost, _)| cost - cheapest);
                if best.is_none_or(|(most, _)| regret > most) {
                    best = Some((regret, index));
                }
            }
            let Some((_, index)) = best else { return };
            let source = &mut sources[index];
            let room = source.places[source.next].1;
            let amount = source.unmet.min(self.rooms[room].free);
            *self.placed[source.source].entry(room).or_default() += amount;
            self.rooms[room].free -= amount;
            source.unmet -= amount;
            if source.unmet <= NOTHING {
                sources.swap_remove(index);
            }
        }
    }

    /// Changes places while that saves enough.
    pub(crate) fn improve(&mut self) {
        let costs: Vec<(usize, Vec<f64>)> = (0..self.placed.len())
            .filter(|source| self.might_move(*source))
            .map(|source| (source, (0..self.rooms.len()).map(|room| self.cost(source, room)).collect()))
            .collect();
        for _ in 0..MOST_CIRCLES {
            let Some(circle) = self.circle(&costs) else { return };
            let has = |it: &Move| self.placed[it.source].get(&it.from).copied().unwrap_or(0.0);
            let mut amount = circle.iter().map(has).fold(f64::INFINITY, f64::min);
            // Where a circle leads through an open room, it need not end where it began.
            for it in circle.iter().filter(|it| self.rooms[it.to].is_open()) {
                amount = amount.min(self.rooms[it.to].free);
            }
            for it in circle {
                let left = self.placed[it.source].entry(it.from).or_default();
                *left -= amount;
                if *left <= NOTHING {
                    self.placed[it.source].remove(&it.from);
                }
                *self.placed[it.source].entry(it.to).or_default() += amount;
                self.rooms[it.from].free += amount;
                self.rooms[it.to].free -= amount;
            }
        }
    }

    /// Whether it has anything that isn't at home. What is at home costs nothing, and stays: to go, for another's sake,
    /// would be a longer way for both than for the other alone.
    fn might_move(&self, source: usize) -> bool {
        self.placed[source].keys().any(|room| self.cost(source, *room) > 0.0)
    }

    /// A circle of moves that saves something: by Bellman and Ford over full rooms, with one node for all open ones.
    fn circle(&self, costs: &[(usize, Vec<f64>)]) -> Option<Vec<Move>> {
        let (open, full): (Vec<usize>, Vec<usize>) =
            (0..self.rooms.len()).partition(|room| self.rooms[*room].is_open());
        let nodes = full.len() + 1;
        let mut node_of = vec![full.len(); self.rooms.len()];
        full.iter().enumerate().for_each(|(node, room)| node_of[*room] = node);
        // The cheapest move between each two nodes.
        let mut moves: Vec<Option<Move>> = vec![None; nodes * nodes];
        for (source, costs) in costs {
            let cheapest = open.iter().copied().min_by(|a, b| costs[*a].total_cmp(&costs[*b]));
            for from in self.placed[*source].keys() {
                for to in full.iter().copied().chain(cheapest).filter(|to| to != from) {
                    let cost = costs[to] - costs[*from] + WORTH_MS;
                    let best = &mut moves[node_of[*from] * nodes + node_of[to]];
                    if best.is_none_or(|best| cost < best.cost) {
                        *best = Some(Move { cost, source: *source, from: *from, to });
                    }
                }
            }
        }
        let mut distance = vec![0.0_f64; nodes];
        let mut parent: Vec<Option<Move>> = vec![None; nodes];
        for _ in 0..=nodes {
            let mut shorter = false;
            for from in 0..nodes {
                for to in 0..nodes {
                    let Some(step) = moves[from * nodes + to] else { continue };
                    if distance[from] + step.cost < distance[to] - NOTHING {
                        distance[to] = distance[from] + step.cost;
                        parent[to] = Some(step);
                        shorter = true;
                    }
                }
            }
            if !shorter {
                return None;
            }
            if let Some(circle) = closed(&parent, &node_of) {
                return Some(circle);
            }
        }
        None
    }

    fn cost(&self, source: usize, room: usize) -> f64 {
        let room = &self.rooms[room];
        (self.latency_ms)(source, room.site) + room.surcharge_ms
    }
}

/// What a source hasn't found a place for yet, and its places by cost.
struct Source {
    source: usize,
    unmet: f64,
    /// Cost and index of rooms, cheapest first; those before `next` are full.
    places: Vec<(f64, usize)>,
    next: usize,
}

/// A circle among the steps that lead to each node, if there is one.
fn closed(parent: &[Option<Move>], node_of: &[usize]) -> Option<Vec<Move>> {
    // Which walk came by first.
    let mut seen = vec![usize::MAX; parent.len()];
    for start in 0..parent.len() {
        let mut node = start;
        while seen[node] == usize::MAX {
            seen[node] = start;
            match parent[node] {
                Some(step) => node = node_of[step.from],
                None => break,
            }
        }
        if seen[node] == start
            && let Some(first) = parent[node]
        {
            let mut circle = vec![first];
            let mut at = node_of[first.from];
            while at != node {
                let step = parent[at]?;
                circle.push(step);
                at = node_of[step.from];
            }
            return Some(circle);
        }
    }
    None
}
