//! What a manifest keeps alive: an index the manifests that it names, and any manifest those whose subject it is
//! (signatures, SBOMs). Both are followed to the end; they may form circles, and may lead to what isn't there.

use std::collections::{BTreeMap, BTreeSet};

/// A manifest of a repository, as far as others depend on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node<D> {
    /// Its digest.
    pub digest: D,
    /// The manifests that it names.
    pub children: Vec<D>,
    /// What it is about.
    pub subject: Option<D>,
}

/// The manifests of a repository, and what leads where.
#[derive(Debug)]
pub struct Graph<'a, D> {
    edges: BTreeMap<&'a D, Vec<&'a D>>,
    known: BTreeSet<&'a D>,
}

impl<'a, D: Ord> Graph<'a, D> {
    /// The graph of these manifests.
    pub fn new(nodes: impl IntoIterator<Item = &'a Node<D>>) -> Graph<'a, D> {
        let (mut edges, mut known) = (BTreeMap::<_, Vec<_>>::new(), BTreeSet::new());
        for node in nodes {
            known.insert(&node.digest);
            edges.entry(&node.digest).or_default().extend(&node.children);
            if let Some(subject) = &node.subject {
                edges.entry(subject).or_default().push(&node.digest);
            }
        }
        Graph { edges, known }
    }

    /// Whether the repository has it.
    pub fn knows(&self, digest: &D) -> bool {
        self.known.contains(digest)
    }

    /// Whether anything but itself leads to each of these; the manifests that nothing leads to come out.
    pub fn tops(&self, among: &BTreeSet<&'a D>) -> BTreeSet<&'a D> {
        let mut tops = among.clone();
        for &from in among {
            for to in self.edges.get(from).into_iter().flatten() {
                if *to != from {
                    tops.remove(*to);
                }
            }
        }
        tops
    }

    /// Adds what the roots keep alive, themselves included, to `alive`; `via` hears of each step that found something.
    pub fn close(
        &self,
        alive: &mut BTreeSet<&'a D>,
        roots: impl IntoIterator<Item = &'a D>,
        mut via: impl FnMut(&'a D, &'a D),
    ) {
        let mut to_visit: Vec<&D> = Vec::new();
        for root in roots {
            if let Some(&root) = self.known.get(root)
                && alive.insert(root)
            {
                to_visit.push(root);
            }
        }
        while let Some(from) = to_visit.pop() {
            for to in self.edges.get(from).into_iter().flatten() {
                if let Some(&to) = self.known.get(*to)
                    && alive.insert(to)
                {
                    via(from, to);
                    to_visit.push(to);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(digest: u32, children: &[u32], subject: Option<u32>) -> Node<u32> {
        Node { digest, children: children.to_vec(), subject }
    }

    #[test]
    fn children_and_referrers_are_reached_also_in_circles_and_nothing_else() {
        // 1 is an index of 2 and of 9, which isn't there; 3 signs 2; 4 is an index of 5 whose subject is 5.
        let nodes = [
            node(1, &[2, 9], None),
            node(2, &[], None),
            node(3, &[], Some(2)),
            node(4, &[5], Some(5)),
            node(5, &[], None),
            node(6, &[], Some(9)),
        ];
        let graph = Graph::new(&nodes);
        let reach = |root: u32| {
            let mut alive = BTreeSet::new();
            let root = &nodes.iter().find(|node| node.digest == root).unwrap().digest;
            graph.close(&mut alive, [root], |_, _| {});
            alive.into_iter().copied().collect::<Vec<_>>()
        };
        assert_eq!(reach(1), [1, 2, 3]);
        assert_eq!(reach(3), [3]);
        assert_eq!(reach(4), [4, 5]);
        assert_eq!(reach(5), [4, 5]);
        let all = graph.known.clone();
        assert_eq!(graph.tops(&all).into_iter().copied().collect::<Vec<_>>(), [1, 6]);
    }
}
