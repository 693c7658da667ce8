//! Bytes of views that are wrong from the start, or go wrong under a reader: errors, never panics.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::archive::MemberKind;
use super::*;
use crate::{VIEW_VERSION, ViewError};

/// Bytes of which a part turns to zeros or vanishes at a reader's back.
struct Fading {
    states: Vec<Vec<u8>>,
    now: Arc<AtomicUsize>,
}

impl AsRef<[u8]> for Fading {
    fn as_ref(&self) -> &[u8] {
        &self.states[self.now.load(Ordering::Relaxed)]
    }
}

fn stack() -> Stack {
    let member = |path: &str, what| Member::new(path, what);
    let local = vec![member("a/x", MemberKind::File(b"x".to_vec())), member("f", MemberKind::Fifo)];
    let lower = vec![
        member("a/b/c", MemberKind::File(b"content".to_vec())),
        member("a/l", MemberKind::Symlink("b".into())),
        member("f", MemberKind::Whiteout),
    ];
    let upper = vec![member("a", MemberKind::Opaque), member("a/b/d", MemberKind::Fifo)];
    Stack::new(&[local, lower, upper], 1)
}

/// Asks everything about every node within reach; answers do not matter.
fn prod(fs: &LayerFs) {
    let mut waiting = vec![view_root_or_root(fs)];
    for _ in 0..200 {
        let Some(id) = waiting.pop() else { break };
        let _ = (
            fs.attr(id),
            fs.xattr_names(id),
            fs.xattr(id, b"user.x"),
            fs.file(id),
            fs.read_link(id),
            fs.lookup(id, b"a"),
        );
        let mut found = 0;
        let _ = fs.read_dir(id, 0, &mut |entry| {
            waiting.extend((entry.offset_of_next > 2).then_some(entry.id));
            found += 1;
            found > 1000
        });
        let _ = fs.read_dir(id, u64::MAX, &mut |_| false);
    }
}

fn view_root_or_root(fs: &LayerFs) -> NodeId {
    fs.lookup(NodeId::ROOT, VIEW.to_string().as_bytes()).map_or(NodeId::directory(VIEW, 0).unwrap(), |entry| entry.id)
}

#[test]
fn bytes_that_are_no_view_of_these_layers_are_refused() {
    let stack = stack();
    let good = stack.view_bytes();
    let open = |bytes: Vec<u8>, layers: &[ViewLayer]| View::open(VIEW, bytes, layers.to_vec());
    assert!(open(good.clone(), &stack.run).is_ok());

    let mut magic = good.clone();
    magic[0] ^= 1;
    assert!(matches!(open(magic, &stack.run), Err(ViewError::Magic)));
    let mut version = good.clone();
    version[8] += 1;
    assert!(matches!(open(version, &stack.run), Err(ViewError::Version { found }) if found == VIEW_VERSION + 1));
    for len in 0..good.len() {
        assert!(open(good[..len].to_vec(), &stack.run).is_err(), "{len} bytes");
    }
    assert!(open([&good[..], &[0]].concat(), &stack.run).is_err());

    let other = |layers: Vec<ViewLayer>| matches!(open(good.clone(), &layers), Err(ViewError::OtherLayers { .. }));
    let (lower, upper) = (stack.run[0].clone(), stack.run[1].clone());
    assert!(other(vec![]) && other(vec![lower.clone()]) && other(vec![upper.clone(), lower.clone()]));
    assert!(other(vec![lower.clone(), ViewLayer { toc: Arc::clone(&lower.toc), ..upper }]));

    for number in [0, crate::MAX_NUMBER + 1] {
        assert!(matches!(View::open(number, good.clone(), stack.run.clone()), Err(ViewError::Limit { .. })));
    }
}

#[test]
fn pages_that_turn_to_zeros_give_errors() {
    let stack = stack();
    let good = stack.view_bytes();
    let states = vec![good.clone(), vec![0; good.len()], Vec::new(), good[..good.len() / 2].to_vec()];
    let now = Arc::new(AtomicUsize::new(0));
    let fs = LayerFs::new();
    fs.add(View::open(VIEW, Fading { states, now: Arc::clone(&now) }, stack.run.clone()).unwrap());
    let root = view_root(&fs);
    assert!(fs.attr(root).is_ok());
    for state in 1..4 {
        now.store(state, Ordering::Relaxed);
        prod(&fs);
        let whole = fs.read_dir(root, 2, &mut |_| false).and_then(|()| fs.attr(root).map(|_| ()));
        assert!(state == 3 || whole.is_err(), "state {state} reads as if nothing had happened");
    }
    now.store(0, Ordering::Relaxed);
    assert!(fs.attr(root).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn random_damage_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let stack = stack();
        let mut bytes = stack.view_bytes();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(view) = View::open(VIEW, bytes, stack.run.clone()) {
            let fs = LayerFs::new();
            fs.add(view);
            prod(&fs);
        }
    }
}
