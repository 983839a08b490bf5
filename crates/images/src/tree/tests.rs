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
