use super::*;

pub(crate) fn file(text: &str) -> Node {
    Node { meta: Meta { mode: 0o644, ..Meta::default() }, kind: Kind::File(Content::Inline(text.into())) }
}

fn dir(mode: u32) -> Node {
    Node { meta: Meta { mode, ..Meta::default() }, kind: Kind::Directory(BTreeMap::new()) }
}

fn link(target: &str) -> Node {
    Node { meta: Meta::default(), kind: Kind::Symlink(target.into()) }
}

/// The tree as lines: folders with their modes, files with their bytes, links with their targets.
fn show(tree: &Tree) -> Vec<String> {
    let line = |(path, id): (Vec<u8>, NodeId)| {
        let path = lossy(&path);
        match &tree.node(id).kind {
            Kind::Directory(_) => format!("{path}/ {:o}", tree.node(id).meta.mode),
            Kind::File(Content::Inline(bytes)) => format!("{path} = {}", lossy(bytes)),
            Kind::Symlink(target) => format!("{path} -> {}", lossy(target)),
            other => format!("{path}: {other:?}"),
        }
    };
    tree.walk().skip(1).map(line).collect()
}

/// Builds layers with one call for each entry.
fn build(layers: &[&[(&str, Node)]]) -> Result<Tree> {
    let mut builder = Builder::new();
    for layer in layers {
        builder.begin_layer();
        for (path, node) in *layer {
            builder.add(path.as_bytes(), node.clone())?;
        }
    }
    let tree = builder.finish();
    tree.check()?;
    Ok(tree)
}

#[test]
fn layers_merge_folders_and_replace_the_rest() {
    let tree = build(&[
        &[
            ("etc", dir(0o755)),
            ("etc/a", file("1")),
            ("etc/b", file("1")),
            ("d/e/f", file("1")),
            ("x", file("1")),
        ],
        &[("etc", dir(0o700)), ("etc/b", file("2")), ("d", file("2")), ("x/y", file("2"))],
    ]);
    let expected = ["d = 2", "etc/ 700", "etc/a = 1", "etc/b = 2", "x/ 755", "x/y = 2"];
    assert_eq!(show(&tree.unwrap()), expected);
}

#[test]
fn whiteouts_hide_lower_layers_only_in_any_order() {
    let lower: &[(&str, Node)] =
        &[("d", dir(0o700)), ("d/a", file("1")), ("d/s/b", file("1")), ("e/c", file("1"))];
    let new = ("d/s/new", file("2"));
    let gone = (".wh.d", file(""));
    for upper in [[new.clone(), gone.clone()], [gone.clone(), new.clone()]] {
        let tree = build(&[lower, &upper]).unwrap();
        assert_eq!(show(&tree), ["d/ 755", "d/s/ 755", "d/s/new = 2", "e/ 755", "e/c = 1"]);
    }
    let opaque = ("d/.wh..wh..opq", file(""));
    for upper in [[new.clone(), opaque.clone()], [opaque, new]] {
        let tree = build(&[lower, &upper]).unwrap();
        assert_eq!(show(&tree)[..3], ["d/ 700", "d/s/ 755", "d/s/new = 2"]);
    }
    let device = Node { meta: Meta::default(), kind: Kind::CharDevice { major: 0, minor: 0 } };
    let aufs = (".wh..wh.plnk", file(""));
    let nothing = ("no/such/.wh.x", file(""));
    let tree = build(&[lower, &[("d", device), aufs, nothing]]).unwrap();
    assert_eq!(show(&tree), ["e/ 755", "e/c = 1"]);
}

#[test]
fn hard_links_reach_lower_layers_and_survive_whiteouts_of_the_other_name() {
    let mut builder = Builder::new();
    builder.begin_layer();
    builder.add(b"a", file("1")).unwrap();
    builder.add(b"d/x", file("x")).unwrap();
    builder.begin_layer();
    builder.link(b"/d/b", b"./a").unwrap();
    builder.whiteout(b"a").unwrap();
    builder.link(b"c", b"d/b").unwrap();
    builder.whiteout(b"d").unwrap();
    for (path, target) in [("z", "missing"), ("z", "d"), ("z", ""), ("", "c"), ("z", "a")] {
        assert!(builder.link(path.as_bytes(), target.as_bytes()).is_err(), "{path} to {target}");
    }
    let tree = builder.finish();
    assert_eq!(show(&tree), ["c = 1", "d/ 755", "d/b = 1"]);
    assert_eq!(tree.lookup(b"c"), tree.lookup(b"/d/./b"));
    assert_eq!(tree.nlink()[tree.lookup(b"c").unwrap().0], 2);
    assert_eq!(tree.nlink()[ROOT.0], 3);
}

#[test]
fn links_are_followed_in_their_own_layer_and_never_out_of_the_root() {
    let tree = build(&[
        &[
            ("root", link("/")),
            ("root/one", file("1")),
            ("up", link("../../..")),
            ("up/two", file("2")),
            ("tmp", dir(0o1777)),
            ("out", link("/tmp")),
            ("out/three", file("3")),
            ("old", link("tmp")),
        ],
        &[("old/four", file("4"))],
    ]);
    let expected = [
        "old/ 755",
        "old/four = 4",
        "one = 1",
        "out -> /tmp",
        "root -> /",
        "tmp/ 1777",
        "tmp/three = 3",
        "two = 2",
        "up -> ../../..",
    ];
    assert_eq!(show(&tree.unwrap()), expected);
    let hostile: &[&[(&str, Node)]] = &[
        &[("gone", link("/missing")), ("gone/x", file(""))],
        &[("f", file("")), ("f/x/y", file(""))],
        &[("a", link("b")), ("b", link("a")), ("a/x", file(""))],
        &[("../x", file(""))],
        &[("a/../x", file(""))],
        &[("a\0b", file(""))],
        &[("/", file(""))],
        &[(".wh.", file(""))],
        &[(".wh..", file(""))],
        &[(".wh...", file(""))],
    ];
    for layer in hostile {
        let error = build(&[*layer]).unwrap_err();
        assert!(matches!(error, Error::UnsafeEntry { .. }), "{layer:?}: {error}");
    }
}

/// Random stacks of layers that are compared with a simpler way to add them up.
const STACKS: u32 = 3_000;

#[derive(Clone, Debug)]
enum Step {
    File(String),
    Dir(String, u32),
    Whiteout(String),
    Opaque(String),
}

/// Layers added up in the plainest way: first what a layer hides is taken from the lower ones' list of paths, then
/// its entries are put on the list. None where an entry is below a file of its own layer.
fn oracle(layers: &[Vec<Step>]) -> Option<Vec<String>> {
    let mut list: BTreeMap<String, Option<u32>> = BTreeMap::new();
    let cut = |list: &mut BTreeMap<String, Option<u32>>, path: &str, itself: bool| {
        let below = format!("{path}/");
        list.retain(|at, _| !(at.starts_with(&below) || itself && at == path));
    };
    for layer in layers {
        for step in layer {
            match step {
                Step::Whiteout(path) => cut(&mut list, path, true),
                Step::Opaque(path) => cut(&mut list, path, false),
                _ => {}
            }
        }
        let mut own_files = std::collections::BTreeSet::new();
        for step in layer {
            let (path, mode, is_opaque) = match step {
                Step::File(path) => (path, None, false),
                Step::Dir(path, mode) => (path, Some(*mode), false),
                Step::Opaque(path) => (path, Some(0o755), true),
                Step::Whiteout(_) => continue,
            };
            let parents = path.match_indices('/').map(|(at, _)| &path[..at]);
            for folder in parents.chain(is_opaque.then_some(path.as_str())) {
                if own_files.contains(folder) {
                    return None;
                }
                if !matches!(list.get(folder), Some(Some(_))) {
                    list.insert(folder.to_owned(), Some(0o755));
                }
            }
            if is_opaque {
                continue;
            }
            if mode.is_none() {
                cut(&mut list, path, true);
                own_files.insert(path.clone());
            } else {
                own_files.remove(path);
            }
            let below = format!("{path}/");
            own_files.retain(|file| mode.is_some() || !file.starts_with(&below));
            list.insert(path.clone(), mode);
        }
    }
    Some(list.into_iter().map(|(path, mode)| format!("{path} {mode:?}")).collect())
}

#[test]
fn layers_add_up_as_in_the_plainest_way() {
    use proptest::prelude::*;
    let path = || {
        prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4)
            .prop_map(|names| names.join("/"))
    };
    let step = prop_oneof![
        3 => path().prop_map(Step::File),
        2 => (path(), 0u32..0o1000).prop_map(|(path, mode)| Step::Dir(path, mode)),
        1 => path().prop_map(Step::Whiteout),
        1 => path().prop_map(Step::Opaque),
    ];
    let layers = prop::collection::vec(prop::collection::vec(step, 0..8), 1..5);
    let (built, refused) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let check = |layers: Vec<Vec<Step>>| {
        let layers_of_nodes = layers.iter().map(|layer| {
            let entry = |step: &Step| match step {
                Step::File(path) => (path.clone(), file("")),
                Step::Dir(path, mode) => (path.clone(), dir(*mode)),
                Step::Opaque(path) => (format!("{path}/.wh..wh..opq"), file("")),
                Step::Whiteout(path) => {
                    let (parent, name) = path
                        .rsplit_once('/')
                        .map_or((String::new(), &path[..]), |(parent, name)| (format!("{parent}/"), name));
                    (format!("{parent}.wh.{name}"), file(""))
                }
            };
            layer.iter().map(entry).collect::<Vec<_>>()
        });
        let layers_of_nodes: Vec<_> = layers_of_nodes.collect();
        let borrowed =
            layers_of_nodes.iter().map(|l| l.iter().map(|(p, n)| (&p[..], n.clone())).collect::<Vec<_>>());
        let borrowed: Vec<Vec<_>> = borrowed.collect();
        let found = build(&borrowed.iter().map(Vec::as_slice).collect::<Vec<_>>());
        let line = |tree: &Tree, path: &[u8], id| {
            format!("{} {:?}", lossy(path), tree.node(id).names().map(|_| tree.node(id).meta.mode))
        };
        let list =
            |tree: Tree| tree.walk().skip(1).map(|(path, id)| line(&tree, &path, id)).collect::<Vec<_>>();
        let mut found = found.ok().map(list);
        found.iter_mut().for_each(|list| list.sort());
        let mut expected = oracle(&layers);
        expected.iter_mut().for_each(|list| list.sort());
        let counter = if found.is_some() { &built } else { &refused };
        counter.set(counter.get() + 1);
        prop_assert_eq!(found, expected);
        Ok(())
    };
    testing::runner(STACKS).run(&layers, check).unwrap();
    assert!(built.get() > refused.get(), "{} built, {} refused", built.get(), refused.get());
}

#[test]
fn limits_hold_for_layers() {
    let mut builder = Builder::new();
    builder.begin_layer();
    // As deep as a path can be, and deeper by links, is hidden without a stack of calls that is too deep.
    let deep = "d/".repeat(2047);
    builder.add(deep.as_bytes(), dir(0o755)).unwrap();
    builder.add(b"l", link(&deep)).unwrap();
    let error = builder.add(b"l/d/d/d", file("")).unwrap_err().to_string();
    assert!(error.contains("deep"), "{error}");
    builder.begin_layer();
    builder.whiteout(b"d").unwrap();
    builder.add("d/".repeat(2048).as_bytes(), dir(0o755)).unwrap_err();
    builder.add(&[b'n'; 256], dir(0o755)).unwrap_err();

    let mut foreign = file("");
    foreign.meta.xattrs = [(b"com.apple.quarantine".to_vec(), vec![]), (b"user.x".to_vec(), vec![])].into();
    builder.add(b"foreign", foreign).unwrap();
    assert_eq!(builder.ignored_xattrs(), 1);
    let mut full = dir(0o755);
    full.names_mut().unwrap().insert(b"x".to_vec(), ROOT);
    builder.add(b"full", full.clone()).unwrap_err();
    builder.add(b"", full).unwrap_err();

    // Hiding the same folder again and again takes no longer than hiding it once.
    for n in 0..30_000 {
        builder.add(format!("many/{n}").as_bytes(), file("")).unwrap();
    }
    for _ in 0..30_000 {
        builder.opaque(b"many").unwrap();
    }
    let tree = builder.finish();
    // With the root, `l`, `foreign` and `many`.
    assert_eq!(tree.nodes.len(), 30_000 + 4);

    let mut builder = Builder::new();
    builder.begin_layer();
    builder.add(b"x", file("")).unwrap();
    let refused = (0..=NODES_MAX).find_map(|n| builder.link(format!("{n}").as_bytes(), b"x").err());
    assert!(refused.unwrap().to_string().contains(&NODES_MAX.to_string()));
}
