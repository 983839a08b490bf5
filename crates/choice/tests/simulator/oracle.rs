//! The optimum: a minimum-cost flow by successive shortest paths (Dijkstra with potentials). It knows everything at once,
//! and moves whatever it likes. Shares nothing with the code under test.

/// For each ingress the sum of latency by its connections, so that the sum of them all is the least, where `demand[i]`
/// must be served within `capacity`; none where that isn't possible. In whole units.
pub(crate) fn least_costs(demand: &[u64], capacity: &[u64], latency: &[Vec<u64>]) -> Option<Vec<u64>> {
    let sites = demand.len();
    // Nodes: ingresses, then destinations.
    let mut flow = vec![vec![0_u64; sites]; sites];
    let mut free = capacity.to_vec();
    let mut potential = vec![0_i64; 2 * sites];
    for (source, needed) in demand.iter().enumerate() {
        let mut left = *needed;
        while left > 0 {
            let (distance, parent, end) = shortest(source, &flow, &free, latency, &potential)?;
            for (node, potential) in potential.iter_mut().enumerate() {
                *potential += distance[node].min(distance[sites + end]);
            }
            let mut amount = left.min(free[end]);
            let mut node = sites + end;
            while node != source {
                let before = parent[node];
                if before >= sites {
                    amount = amount.min(flow[node][before - sites]);
                }
                node = before;
            }
            let mut node = sites + end;
            while node != source {
                let before = parent[node];
                if before < sites {
                    flow[before][node - sites] += amount;
                } else {
                    flow[node][before - sites] -= amount;
                }
                node = before;
            }
            free[end] -= amount;
            left -= amount;
        }
    }
    Some((0..sites).map(|from| (0..sites).map(|to| flow[from][to] * latency[from][to]).sum()).collect())
}

/// Distances by reduced cost, the way, and the nearest destination with room.
fn shortest(
    source: usize,
    flow: &[Vec<u64>],
    free: &[u64],
    latency: &[Vec<u64>],
    potential: &[i64],
) -> Option<(Vec<i64>, Vec<usize>, usize)> {
    let sites = free.len();
    let mut distance = vec![i64::MAX; 2 * sites];
    let mut parent = vec![usize::MAX; 2 * sites];
    let mut done = vec![false; 2 * sites];
    distance[source] = 0;
    loop {
        let open = (0..2 * sites).filter(|node| !done[*node] && distance[*node] < i64::MAX);
        let node = open.min_by_key(|node| distance[*node])?;
        done[node] = true;
        if node >= sites && free[node - sites] > 0 {
            return Some((distance, parent, node - sites));
        }
        let mut reach = |next: usize, cost: i64| {
            let through = distance[node] + cost + potential[node] - potential[next];
            if through < distance[next] {
                distance[next] = through;
                parent[next] = node;
            }
        };
        if node < sites {
            (0..sites).for_each(|to| reach(sites + to, latency[node][to] as i64));
        } else {
            let to = node - sites;
            (0..sites)
                .filter(|from| flow[*from][to] > 0)
                .for_each(|from| reach(from, -(latency[from][to] as i64)));
        }
    }
}

#[test]
fn the_oracle_finds_the_optimum() {
    // Every assignment of single units, tried out.
    let mut seed = anyplace_seed::Seed::from_env();
    for _ in 0..300 {
        let sites = 2 + seed.index(3);
        let demand: Vec<u64> = (0..sites).map(|_| seed.below(3)).collect();
        let capacity: Vec<u64> = (0..sites).map(|_| seed.below(4)).collect();
        let latency: Vec<Vec<u64>> =
            (0..sites).map(|_| (0..sites).map(|_| seed.below(20)).collect()).collect();
        let units: Vec<usize> = (0..sites).flat_map(|site| vec![site; demand[site] as usize]).collect();
        let mut best = None;
        for number in 0..(sites as u64).pow(units.len() as u32) {
            let (mut rest, mut used, mut cost) = (number, vec![0; sites], 0);
            for unit in &units {
                let to = (rest % sites as u64) as usize;
                rest /= sites as u64;
                used[to] += 1;
                cost += latency[*unit][to];
            }
            if used.iter().zip(&capacity).all(|(used, capacity)| used <= capacity) {
                best = Some(best.map_or(cost, |best: u64| best.min(cost)));
            }
        }
        let found = least_costs(&demand, &capacity, &latency).map(|costs| costs.into_iter().sum());
        assert_eq!(found, best);
    }
}
