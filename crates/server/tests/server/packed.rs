//! zstd layers: entered at their frames, or served from packed content.

use millstream_server::ImportOptions;

use super::*;

fn with_packed_max(packed_max: u64) -> ServiceOptions {
    ServiceOptions { import: ImportOptions { packed_max, ..ImportOptions::default() }, ..ServiceOptions::default() }
}

/// More than a span may have, between two small files.
fn long_tar(seed: u64) -> Vec<u8> {
    Tar::default()
        .file("first", &noise(seed, 5000))
        .file("long", &noise(seed + 1, 18 << 20))
        .file("last", b"the end")
        .finish()
}

fn frames(tar: &[u8], size: usize) -> Layer {
    let blob = tar.chunks(size).flat_map(|part| zstd::bulk::compress(part, 1).unwrap()).collect();
    Layer { media_type: image::ZSTD, blob, diff_id: Digest::of(tar) }
}

async fn reads_back(server: &Server, scope: &Scope, layer: Digest, seed: u64) {
    assert!(server.file(scope, layer, "first", 0, 1 << 20).await.unwrap() == noise(seed, 5000));
    let long = noise(seed + 1, 18 << 20);
    for (offset, size) in [(0, 1), ((1 << 20) - 7, 20), (3_000_000, 9_000_000), ((18 << 20) - 1, 100), (0, 16 << 20)] {
        let start = usize::try_from(offset).unwrap();
        let end = long.len().min(start + usize::try_from(size).unwrap());
        assert!(server.file(scope, layer, "long", offset, size).await.unwrap() == long[start..end], "{offset} {size}");
    }
    assert_eq!(server.file(scope, layer, "last", 0, 100).await.unwrap(), b"the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn zstd_layers_of_one_frame_are_served_without_their_blob_and_those_of_many_with_it() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let (one, many) = (Layer::zstd(&long_tar(10)), frames(&long_tar(20), 400_000));
    // What can be entered: a short frame, and then a long one, which is seen too late.
    let tar = long_tar(30);
    let (head, tail) = tar.split_at(1 << 20);
    let blob = [zstd::bulk::compress(head, 1).unwrap(), zstd::bulk::compress(tail, 1).unwrap()].concat();
    let late = Layer { media_type: image::ZSTD, blob, diff_id: Digest::of(&tar) };
    let digests = [one.digest(), many.digest(), late.digest()];
    let expected: Vec<Vec<u8>> = [&one, &many, &late].map(|layer| rebuilt_as(layer, Compression::Zstd)).into();
    let manifest = push(&registry, "team/zstd", "v1", &[one, many, late]);
    // From this one nothing comes of the layers that are packed.
    let liar = Gate::start_lying(registry.port, None, Some(digests[0].hex()));
    let name = format!("{}/team/zstd", registry.host());
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    let done = server.import(&format!("{name}:v1"), None).await.unwrap().done.unwrap();
    assert!(done.ineligible.is_empty(), "{:?}", done.ineligible);
    let (image, tocs) = server.image(&scope(&name, manifest), &[]).await.unwrap();
    assert!(image.layers.iter().all(|layer| layer.ineligible.is_empty()));
    for (digest, (expected, closed)) in digests.iter().zip(expected.into_iter().zip([true, false, true])) {
        assert_eq!(tocs[&digest.to_string()], expected);
        assert_eq!(Toc::open(expected).unwrap().has_closed_spans().unwrap(), closed);
        assert_eq!(state.path().join("packed").join(digest.hex()).exists(), closed);
    }
    for (digest, seed) in digests.iter().zip([10, 20, 30]) {
        reads_back(&server, &scope(&name, manifest), *digest, seed).await;
    }

    // Whoever cannot show the blob gets nothing of it.
    let other = format!("{}/team/zstd", liar.host());
    assert_eq!(code(server.import(&format!("{other}:v1"), None).await), Code::DataLoss);
    assert_eq!(code(server.image(&scope(&other, manifest), &[]).await), Code::FailedPrecondition);
    let twin = format!("{}/team/zstd", Gate::start(registry.port, None).host());
    let object = state.path().join("packed").join(digests[0].hex());
    let written = || std::fs::metadata(&object).unwrap().modified().unwrap();
    let before = written();
    server.import(&format!("{twin}:v1"), None).await.unwrap();
    assert_eq!(written(), before, "not read again");
    reads_back(&server, &scope(&twin, manifest), digests[0], 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_packed_content_is_not_served() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layer = Layer::zstd(&long_tar(40));
    let digest = layer.digest();
    let manifest = push(&registry, "team/zstd", "v1", &[layer]);
    let name = format!("{}/team/zstd", registry.host());
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    server.import(&format!("{name}:v1"), None).await.unwrap();
    let object = state.path().join("packed").join(digest.hex());
    let mut bytes = std::fs::read(&object).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&object, bytes).unwrap();
    let scope = scope(&name, manifest);
    assert_eq!(code(server.file(&scope, digest, "long", 0, 16 << 20).await), Code::Internal);
    assert_eq!(server.file(&scope, digest, "last", 0, 100).await.unwrap(), b"the end", "the rest is");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_refuse_packed_content() {
    let Some(registry) = Registry::start() else { return };
    for (packed_max, expected) in [(0, "no zstd frame ends within"), (1 << 20, "more than 1048576 bytes of content")] {
        let state = tempfile::tempdir().unwrap();
        let server = Server::start(state.path(), with_packed_max(packed_max)).await;
        let (long, short) = (Layer::zstd(&long_tar(50)), Layer::zstd(&Tar::default().file("z", b"zstd").finish()));
        let (long_digest, short_digest) = (long.digest(), short.digest());
        let only = push(&registry, "team/only", "v1", &[Layer::zstd(&long_tar(50))]);
        let manifest = push(&registry, "team/refused", "v1", &[short, long]);
        let name = format!("{}/team/refused", registry.host());
        let done = server.import(&format!("{name}:v1"), None).await.unwrap().done.unwrap();
        assert_eq!(done.ineligible.len(), 1);
        assert_eq!(done.ineligible[0].layer, long_digest.to_string());
        let reason = &done.ineligible[0].reason;
        assert!(reason.contains(expected) && reason.contains("import.packed_max"), "{reason}");
        assert!(!state.path().join("packed").exists());
        let scope = scope(&name, manifest);
        assert_eq!(server.file(&scope, short_digest, "z", 0, 9).await.unwrap(), b"zstd", "a small frame is a span");
        let error = server.file(&scope, long_digest, "last", 0, 1).await.unwrap_err();
        assert!(error.code() == Code::InvalidArgument && error.message().contains(expected), "{error}");

        let name = format!("{}/team/only", registry.host());
        server.import(&format!("{name}:v1"), None).await.unwrap();
        assert_eq!(code(server.image(&super::scope(&name, only), &[]).await), Code::InvalidArgument);
    }
}
