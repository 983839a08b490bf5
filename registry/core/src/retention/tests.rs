use proptest::prelude::*;

use super::*;

fn rule(of: Of, keep_last: Option<u32>, keep_younger_ms: Option<u64>) -> Rule {
    Rule { repositories: vec!["**".parse().unwrap()], of, keep_last, keep_younger_ms }
}

fn tags(pattern: &str) -> Of {
    Of::Tags(vec![pattern.parse().unwrap()])
}

fn tag(name: &str, digest: u32, age_ms: u64) -> Tag<u32> {
    Tag { name: name.into(), digest, age_ms }
}

fn manifest(digest: u32, children: &[u32], subject: Option<u32>, age_ms: u64) -> Manifest<u32> {
    let node = Node { digest, children: children.to_vec(), subject };
    Manifest { node, age_ms, pinned: false }
}

fn kept_tags(decision: &Decision<u32>) -> Vec<&str> {
    decision.tags.iter().filter(|(_, verdict)| verdict.keep).map(|(name, _)| name.as_str()).collect()
}

fn kept(decision: &Decision<u32>) -> Vec<u32> {
    decision.manifests.iter().filter(|(_, verdict)| verdict.keep).map(|(digest, _)| *digest).collect()
}

#[test]
fn the_first_rule_that_matches_decides() {
    let rules = [
        rule(tags("v*"), None, None),
        rule(tags("*"), Some(1), Some(50)),
        Rule { repositories: vec!["other/*".parse().unwrap()], ..rule(tags("*"), Some(0), None) },
    ];
    let repository = Repository {
        name: "team/app".into(),
        tags: vec![tag("v1", 1, 1_000), tag("pr-1", 2, 10), tag("pr-2", 3, 40), tag("pr-3", 4, 60)],
        manifests: (1..5).map(|digest| manifest(digest, &[], None, 1_000)).collect(),
    };
    let decision = decide(&rules, &repository, &InUse::default(), 0);
    assert_eq!(kept_tags(&decision), ["pr-1", "pr-2", "v1"]);
    assert_eq!(decision.tags["v1"].reason, Reason::Unlimited { rule: 1 });
    assert_eq!(decision.tags["pr-1"].reason, Reason::Newest { rule: 2, place: 1 });
    assert_eq!(decision.tags["pr-2"].reason, Reason::Young { rule: 2 });
    assert_eq!(decision.tags["pr-3"].reason, Reason::Past { rule: 2, place: 3 });
    assert_eq!(kept(&decision), [1, 2, 3]);
    assert_eq!(decision.manifests[&4].reason, Reason::TagGoes("pr-3".into()));

    let other = Repository { name: "other/app".into(), ..repository };
    let decision = decide(&rules, &other, &InUse::default(), 0);
    assert_eq!(kept_tags(&decision), ["pr-1", "pr-2", "v1"], "rule 2 matches first there too");
}

#[test]
fn what_is_in_use_or_within_the_grace_stays() {
    let rules = [rule(tags("*"), Some(0), None), rule(Of::Untagged, Some(0), None)];
    let mut repository = Repository {
        name: "app".into(),
        tags: vec![tag("a", 1, 100), tag("b", 2, 100), tag("c", 3, 100), tag("d", 4, 5)],
        manifests: (1..7).map(|digest| manifest(digest, &[], None, 100)).collect(),
    };
    repository.manifests[5].pinned = true;
    let mut in_use = InUse::default();
    in_use.tags.insert(("app".into(), "a".into()));
    in_use.tags.insert(("elsewhere".into(), "c".into()));
    in_use.digests.insert(2);
    let decision = decide(&rules, &repository, &in_use, 10);
    assert_eq!(kept_tags(&decision), ["a", "b", "d"]);
    assert_eq!(kept(&decision), [1, 2, 4, 6]);
    assert_eq!(decision.manifests[&5].reason, Reason::Past { rule: 2, place: 1 });
    assert_eq!(decision.manifests[&6].reason, Reason::Pinned);
}

#[test]
fn a_tag_takes_along_what_only_it_kept_alive() {
    // `old` is an index of 2 and 3, `new` one of 3 and 4; 5 signs 2, 6 signs 3.
    let repository = Repository {
        name: "app".into(),
        tags: vec![tag("old", 1, 200), tag("new", 10, 100)],
        manifests: vec![
            manifest(1, &[2, 3], None, 200),
            manifest(2, &[], None, 200),
            manifest(3, &[], None, 200),
            manifest(4, &[], None, 100),
            manifest(5, &[], Some(2), 200),
            manifest(6, &[], Some(3), 200),
            manifest(7, &[], None, 200),
            manifest(10, &[3, 4], None, 100),
        ],
    };
    let decision = decide(&[rule(tags("*"), Some(1), None)], &repository, &InUse::default(), 0);
    assert_eq!(kept(&decision), [3, 4, 6, 7, 10]);
    assert_eq!(decision.manifests[&1].reason, Reason::TagGoes("old".into()));
    assert_eq!(decision.manifests[&2].reason, Reason::With("1".into()));
    assert_eq!(decision.manifests[&5].reason, Reason::With("2".into()));
    assert_eq!(decision.manifests[&7].reason, Reason::NoRule, "nobody has a rule for untagged ones");
}

#[test]
fn rules_for_untagged_ones_decide_about_what_nothing_leads_to() {
    // 1 is an untagged index of 2; 3 and 4 are a circle; 5 and 6 stand alone.
    let repository = Repository {
        name: "app".into(),
        tags: vec![],
        manifests: vec![
            manifest(1, &[2], None, 10),
            manifest(2, &[], None, 90),
            manifest(3, &[4], Some(4), 80),
            manifest(4, &[], None, 80),
            manifest(5, &[], None, 20),
            manifest(6, &[], None, 70),
        ],
    };
    let decision = decide(&[rule(Of::Untagged, Some(2), None)], &repository, &InUse::default(), 0);
    assert_eq!(kept(&decision), [1, 2, 5], "{decision:#?}");
}

fn repositories() -> impl Strategy<Value = Repository<u32>> {
    let manifest = (
        0..12u32,
        prop::collection::vec(0..12u32, 0..3),
        prop::option::of(0..12u32),
        0..100u64,
        any::<bool>(),
    );
    let manifests = prop::collection::vec(manifest, 0..12);
    let tags = prop::collection::btree_map("[a-c][0-3]", (0..12u32, 0..100u64), 0..10);
    (manifests, tags, "[ab]/[ab]").prop_map(|(manifests, tags, name)| {
        let mut seen = BTreeSet::new();
        let manifests = manifests.into_iter().filter(|(digest, ..)| seen.insert(*digest));
        let manifests = manifests.map(|(digest, children, subject, age_ms, pinned)| {
            let pinned = pinned && digest % 5 == 0;
            Manifest { node: Node { digest, children, subject }, age_ms, pinned }
        });
        let tags = tags.into_iter().map(|(name, (digest, age_ms))| Tag { name, digest, age_ms });
        Repository { name, tags: tags.collect(), manifests: manifests.collect() }
    })
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    let pattern =
        prop::sample::select(vec!["*", "a*", "b?", "**", "c0"]).prop_map(|p| p.parse::<Pattern>().unwrap());
    let repository =
        prop::sample::select(vec!["**", "a/*", "b/*"]).prop_map(|p| p.parse::<Pattern>().unwrap());
    let of =
        prop_oneof![3 => prop::collection::vec(pattern, 1..3).prop_map(Of::Tags), 1 => Just(Of::Untagged)];
    let rule =
        (prop::collection::vec(repository, 1..2), of, prop::option::of(0..4u32), prop::option::of(0..100u64));
    let rule = rule.prop_map(|(repositories, of, keep_last, keep_younger_ms)| Rule {
        repositories,
        of,
        keep_last,
        keep_younger_ms,
    });
    prop::collection::vec(rule, 0..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Judged one by one, with none of the code above but the patterns.
    #[test]
    fn every_decision_is_as_the_rules_say(
        rules in rules(),
        repository in repositories(),
        used in prop::collection::btree_set(0..12u32, 0..3),
        grace_ms in 0..30u64,
    ) {
        let in_use = InUse { tags: BTreeSet::new(), digests: used.clone() };
        let decision = decide(&rules, &repository, &in_use, grace_ms);
        prop_assert_eq!(decision.tags.len(), repository.tags.len());
        prop_assert_eq!(decision.manifests.len(), repository.manifests.len());
        let matching = |tag: &Tag<u32>| rules.iter().position(|rule| {
            rule.repositories.iter().any(|p| p.matches(&repository.name))
                && matches!(&rule.of, Of::Tags(patterns) if patterns.iter().any(|p| p.matches(&tag.name)))
        });
        for tag in &repository.tags {
            let keep = decision.tags[&tag.name].keep;
            let Some(at) = matching(tag) else { prop_assert!(keep); continue };
            let newer = repository.tags.iter().filter(|other| {
                matching(other) == Some(at) && (other.age_ms, Reverse(&other.name)) < (tag.age_ms, Reverse(&tag.name))
            });
            let by_count = rules[at].keep_last.is_some_and(|most| newer.count() < most as usize);
            let by_age = rules[at].keep_younger_ms.is_some_and(|limit| tag.age_ms < limit);
            let unlimited = rules[at].keep_last.is_none() && rules[at].keep_younger_ms.is_none();
            let expected = by_count || by_age || unlimited || used.contains(&tag.digest) || tag.age_ms < grace_ms;
            prop_assert_eq!(keep, expected, "{} {:?}", tag.name, decision.tags[&tag.name]);
        }
        // What stays keeps its children and its referrers; what is in use, tagged, pinned or young stays.
        let stays = |digest: &u32| decision.manifests.get(digest).is_none_or(|verdict| verdict.keep);
        for manifest in &repository.manifests {
            let digest = manifest.node.digest;
            if decision.manifests[&digest].keep {
                prop_assert!(manifest.node.children.iter().all(stays), "a child of {} goes", digest);
            }
            if manifest.node.subject.is_some_and(|s| decision.manifests.get(&s).is_some_and(|v| v.keep)) {
                prop_assert!(stays(&digest), "a referrer goes");
            }
            let tagged = repository.tags.iter().any(|tag| tag.digest == digest && decision.tags[&tag.name].keep);
            if tagged || used.contains(&digest) || manifest.pinned || manifest.age_ms < grace_ms {
                prop_assert!(stays(&digest), "{} goes", digest);
            }
            // Nothing goes but by a tag that goes, or by a rule for untagged ones.
            if !decision.manifests[&digest].keep {
                let untagged = rules.iter().any(|rule| rule.of == Of::Untagged);
                prop_assert!(untagged || decision.tags.values().any(|verdict| !verdict.keep));
            }
        }
        // A tag's manifest that went has no tag left.
        for tag in &repository.tags {
            if decision.tags[&tag.name].keep {
                prop_assert!(stays(&tag.digest));
            }
        }
        prop_assert_eq!(decide(&[], &repository, &in_use, grace_ms).manifests.values().filter(|v| !v.keep).count(), 0);
    }
}
