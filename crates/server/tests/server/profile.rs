//! Startup profiles: what nodes tell comes back to other nodes, with the pages, and to nobody else.

use std::path::PathBuf;

use futures::StreamExt;
use millstream_profile::proof::{proof_len, verify};
use millstream_profile::{PAGE_SIZE, Profile, ProfileLayer, pieces};
use millstream_server::{ContentOptions, ProfileOptions};
use millstream_wire::millstream::v1::get_profile_response::Part as ProfilePart;
use millstream_wire::millstream::v1::images_server::Images;
use millstream_wire::millstream::v1::{GetProfileRequest, ProfilePlan, PutRecordingRequest, RecordedLayer};

use super::*;

/// A layer as a test knows it.
struct Known {
    digest: Digest,
    toc: Toc,
    /// The data address space.
    data: Vec<u8>,
}

impl Known {
    fn new(layer: &Layer, compression: Compression, files: &[(&str, Vec<u8>)]) -> Self {
        let toc = Toc::open(rebuilt_as(layer, compression)).unwrap();
        let mut data = vec![0; usize::try_from(toc.data_size()).unwrap()];
        let mut known = Self { digest: layer.digest(), toc, data: Vec::new() };
        for (path, bytes) in files {
            let start = known.first(path) as usize * 4096;
            data[start..start + bytes.len()].copy_from_slice(bytes);
        }
        known.data = data;
        known
    }

    /// The first page of a file.
    fn first(&self, path: &str) -> u32 {
        let inode = self.toc.inode(self.toc.lookup_path(path.as_bytes()).unwrap().unwrap()).unwrap();
        u32::try_from(self.toc.file_data(&inode).unwrap().start / PAGE_SIZE).unwrap()
    }

    fn layer(&self) -> ProfileLayer {
        ProfileLayer { digest: self.digest, toc: self.toc.digest() }
    }
}

/// [`sample_layers`], as they are known.
fn known_sample(layers: &[Layer]) -> [Known; 2] {
    let base = [
        ("etc/motd", b"welcome".to_vec()),
        ("etc/gone", b"soon".to_vec()),
        ("big", noise(1, 5_000_000)),
        ("tail", noise(2, 20_000)),
    ];
    let top = [("etc/motd", noise(3, 100_000))];
    [Known::new(&layers[0], Compression::Gzip, &base), Known::new(&layers[1], Compression::Gzip, &top)]
}

fn recording(scope: &Scope, layers: &[ProfileLayer], runs: &[u32]) -> PutRecordingRequest {
    let recorded = |layer: &ProfileLayer| {
        let (digest, toc_digest) = (layer.digest.to_string(), layer.toc.to_string());
        RecordedLayer { layer: Some(v1::ProfileLayer { digest, toc_digest }), fresh: true }
    };
    PutRecordingRequest {
        scope: Some(scope.clone()),
        layers: layers.iter().map(recorded).collect(),
        runs: runs.to_vec(),
    }
}

fn asking(scope: &Scope, pages: bool, local: &[Digest]) -> GetProfileRequest {
    let local_layers = local.iter().map(ToString::to_string).collect();
    GetProfileRequest { scope: Some(scope.clone()), pages, local_layers }
}

impl Server {
    async fn record(&self, scope: &Scope, layers: &[ProfileLayer], runs: &[u32]) -> Result<bool, Status> {
        Ok(self.client.clone().put_recording(recording(scope, layers, runs)).await?.into_inner().taken)
    }

    /// The plan, and the zstd stream if there is one.
    async fn profile(
        &self,
        scope: &Scope,
        pages: bool,
        local: &[Digest],
    ) -> Result<(ProfilePlan, Option<Vec<u8>>), Status> {
        let stream = self.client.clone().get_profile(asking(scope, pages, local)).await?.into_inner();
        let mut parts = collect(stream).await?.into_iter().map(|message| message.part.unwrap());
        let Some(ProfilePart::Plan(plan)) = parts.next() else { panic!("the plan comes first") };
        let packed: Vec<Vec<u8>> = parts
            .map(|part| match part {
                ProfilePart::Packed(piece) => piece,
                ProfilePart::Plan(_) => panic!("the plan comes once"),
            })
            .collect();
        assert_eq!(plan.pages, !packed.is_empty());
        assert!(pages || packed.is_empty(), "nobody asked for them");
        let packed = plan.pages.then(|| packed.concat());
        Ok((plan, packed))
    }

    /// The same with pages, once they are those of `runs`.
    async fn pages(&self, scope: &Scope, runs: &[u32]) -> (ProfilePlan, Vec<u8>) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (plan, packed) = self.profile(scope, true, &[]).await.unwrap();
            if let Some(packed) = packed
                && plan.runs == runs
            {
                return (plan, packed);
            }
            assert!(Instant::now() < deadline, "the pages are not made: {plan:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Takes the stream apart as a node does and compares every page with the file's own bytes; the number of pages.
fn proven(plan: &ProfilePlan, packed: &[u8], known: &[&Known], local: &[Digest]) -> u64 {
    let layers = plan
        .layers
        .iter()
        .map(|layer| ProfileLayer { digest: layer.digest.parse().unwrap(), toc: layer.toc_digest.parse().unwrap() });
    let profile = Profile::from_numbers(layers.collect(), &plan.runs).unwrap();
    let stream = zstd::stream::decode_all(packed).unwrap();
    let (mut rest, mut pages) = (&stream[..], 0);
    for run in &profile.runs {
        let layer = profile.layers[run.layer as usize];
        if local.contains(&layer.digest) {
            continue;
        }
        let known = known.iter().find(|known| known.layer() == layer).unwrap();
        for (chunk, mask) in pieces(run, &known.toc).unwrap() {
            let (proof, after) = rest.split_at(proof_len(chunk.data.len(), mask));
            rest = after;
            let digest = known.toc.chunk_digest(chunk.ix).unwrap();
            verify(chunk.data.len(), mask, &digest, proof, |start, bytes| {
                let at = usize::try_from(chunk.data.start + start).unwrap();
                assert!(known.data[at..at + bytes.len()] == *bytes, "{chunk:?}");
                pages += bytes.len().div_ceil(4096) as u64;
            })
            .unwrap();
        }
    }
    assert!(rest.is_empty(), "and nothing else");
    pages
}

fn object(state: &Path, kind: &str, manifest: Digest, repository: &str) -> PathBuf {
    state.join(kind).join(manifest.hex()).join(Digest::of(repository.as_bytes()).hex())
}

/// Some of both layers, to and fro, so that the order is not that of the data.
fn some_runs([base, top]: &[Known; 2]) -> Vec<u32> {
    let big = base.first("big");
    let mut runs = vec![1, top.first("etc/motd") + 3, 9];
    for n in (0..40).rev() {
        runs.extend([0, big + n * 30 + n % 7, 1 + n % 4]);
    }
    runs.extend([0, base.first("tail"), 5, 1, top.first("etc/motd"), 1, 0, base.first("etc/motd"), 1]);
    runs
}

fn pages_of(runs: &[u32]) -> u64 {
    runs.chunks(3).map(|run| u64::from(run[2])).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_recorded_comes_back_with_its_pages() {
    let Some(registry) = Registry::start() else { return };
    let gate = Gate::start(registry.port, None);
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let known = known_sample(&layers);
    let name = format!("{}/team/app", gate.host());
    let scope = scope(&name, manifest);
    // Nothing is remembered of what was read: each span has to be fetched for all that is wanted of it.
    let content = ContentOptions { chunk_cache: 0, ..ContentOptions::default() };
    let options = ServiceOptions { content, ..ServiceOptions::default() };
    let server = Server::start(state.path(), options.clone()).await;
    assert_eq!(code(server.profile(&scope, true, &[]).await), Code::NotFound, "not imported");
    let all = known.each_ref().map(Known::layer);
    let runs = some_runs(&known);
    assert_eq!(code(server.record(&scope, &all, &runs).await), Code::FailedPrecondition);
    server.import(&format!("{name}:v1"), None).await.unwrap();
    assert_eq!(code(server.profile(&scope, true, &[]).await), Code::NotFound, "not recorded");

    let asked = gate.admitted.load(Ordering::Relaxed);
    assert!(server.record(&scope, &all, &runs).await.unwrap());
    let (plan, none) = server.profile(&scope, false, &[]).await.unwrap();
    assert_eq!((&plan.runs, plan.recordings, none), (&runs, 1, None));
    let (plan, packed) = server.pages(&scope, &runs).await;
    assert!(gate.admitted.load(Ordering::Relaxed) - asked <= 4, "each layer is read in one go");
    assert_eq!(proven(&plan, &packed, &known.each_ref(), &[]), pages_of(&runs));
    assert!((packed.len() as u64) < pages_of(&runs) * PAGE_SIZE);

    for (local, other) in [(0, 1), (1, 0)] {
        let local = [known[local].digest, Digest::of(b"of another image")];
        let (same, part) = server.profile(&scope, true, &local).await.unwrap();
        assert_eq!(same, plan, "the plan is whole all the same");
        let pages = proven(&plan, &part.unwrap(), &known.each_ref(), &local);
        let of_other = runs.chunks(3).filter(|run| run[0] == other).map(|run| u64::from(run[2])).sum::<u64>();
        assert_eq!(pages, of_other);
    }
    let (_, nothing) = server.profile(&scope, true, &known.each_ref().map(|known| known.digest)).await.unwrap();
    assert_eq!(zstd::stream::decode_all(&nothing.unwrap()[..]).unwrap(), b"", "a stream of nothing");
    let broken = GetProfileRequest { local_layers: vec!["sha256:x".into()], ..asking(&scope, true, &[]) };
    assert_eq!(code(server.client.clone().get_profile(broken).await), Code::InvalidArgument);

    drop(server);
    let server = Server::start(state.path(), options).await;
    assert_eq!(server.profile(&scope, true, &[]).await.unwrap(), (plan, Some(packed)), "state survives a restart");
    damage_is_found(&server, &scope, &object(state.path(), "packs", manifest, &name), &known, &runs).await;
}

async fn damage_is_found(server: &Server, scope: &Scope, object: &Path, known: &[Known; 2], runs: &[u32]) {
    for local in [vec![], vec![known[1].digest]] {
        for cut in [false, true] {
            let mut bytes = std::fs::read(object).unwrap();
            let at = bytes.len() - 3000;
            if cut {
                bytes.truncate(at);
            } else {
                bytes[at] ^= 4;
            }
            std::fs::write(object, bytes).unwrap();
            assert_eq!(code(server.profile(scope, true, &local).await), Code::Internal, "{cut}");
            let (plan, packed) = server.pages(scope, runs).await;
            assert_eq!(proven(&plan, &packed, &known.each_ref(), &[]), pages_of(runs), "made again");
        }
    }
    for at in [0, 9, 50, 200] {
        let mut bytes = std::fs::read(object).unwrap();
        bytes[at] ^= 4;
        std::fs::write(object, &bytes).unwrap();
        let (plan, packed) = server.pages(scope, runs).await;
        assert_eq!(proven(&plan, &packed, &known.each_ref(), &[]), pages_of(runs), "a damaged head counts as none");
        let mut bytes = std::fs::read(object).unwrap();
        bytes.truncate(at);
        std::fs::write(object, &bytes).unwrap();
        server.pages(scope, runs).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_come_behind_the_tables_of_the_same_pull() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let known = known_sample(&layers);
    let name = format!("{}/team/app", registry.host());
    let scope = scope(&name, manifest);
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    server.import(&format!("{name}:v1"), None).await.unwrap();
    let runs = some_runs(&known);
    assert!(server.record(&scope, &known.each_ref().map(Known::layer), &runs).await.unwrap());
    server.pages(&scope, &runs).await;
    drop(server);

    let service = Server::service(state.path(), ServiceOptions::default());
    let tables = || async {
        let asked = GetImageRequest { scope: Some(scope.clone()), known_layers: Vec::new() };
        service.get_image(tonic::Request::new(asked)).await.unwrap().into_inner()
    };
    let pages = || async {
        let mut pages = service.get_profile(tonic::Request::new(asking(&scope, true, &[]))).await.unwrap().into_inner();
        let plan = pages.next().await.unwrap().unwrap();
        assert!(matches!(plan.part, Some(ProfilePart::Plan(_))), "the plan does not wait");
        pages
    };
    let untaken = tables().await;
    let mut behind = pages().await;
    let early = tokio::time::timeout(Duration::from_millis(200), behind.next()).await;
    assert!(early.is_err(), "pages before the tables were taken");
    assert!(untaken.collect::<Vec<_>>().await.iter().all(Result::is_ok));
    let first = tokio::time::timeout(Duration::from_millis(500), behind.next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(first.part, Some(ProfilePart::Packed(_))));

    let _never_taken = tables().await;
    let all = tokio::time::timeout(Duration::from_secs(10), pages().await.collect::<Vec<_>>()).await.unwrap();
    assert!(all.iter().all(Result::is_ok) && !all.is_empty(), "a caller who sleeps holds nobody up for ever");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_recordings_an_outlier_changes_nothing() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let known = known_sample(&layers);
    let name = format!("{}/team/app", registry.host());
    let scope = scope(&name, manifest);
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    server.import(&format!("{name}:v1"), None).await.unwrap();
    let all = known.each_ref().map(Known::layer);
    let runs = some_runs(&known);
    let everything = [0, 0, u32::try_from(known[0].toc.data_size() / PAGE_SIZE).unwrap(), 1, 0, 25];
    // Each changes the plan while the pages of the one before may still be on their way.
    for runs in [&runs[..], &everything[..], &runs[..]] {
        assert!(server.record(&scope, &all, runs).await.unwrap());
    }
    let (plan, _) = server.profile(&scope, false, &[]).await.unwrap();
    assert_eq!((&plan.runs, plan.recordings), (&runs, 3));
    let (plan, packed) = server.pages(&scope, &runs).await;
    assert_eq!((proven(&plan, &packed, &known.each_ref(), &[]), plan.recordings), (pages_of(&runs), 3));
    assert!(server.record(&scope, &all, &runs).await.unwrap());
    let (plan, same) = server.profile(&scope, true, &[]).await.unwrap();
    assert_eq!((plan.recordings, same), (4, Some(packed)), "the same plan needs no other pages");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_recording_of_the_image_is_refused() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let known = known_sample(&layers);
    let foreign = Layer::gzip(&Tar::default().file("secret", &noise(9, 50_000)).finish());
    let foreign_known = Known::new(&foreign, Compression::Gzip, &[("secret", noise(9, 50_000))]);
    push(&registry, "team/app", "other", &[foreign]);
    let name = format!("{}/team/app", registry.host());
    let scope = scope(&name, manifest);
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    for tag in ["v1", "other"] {
        server.import(&format!("{name}:{tag}"), None).await.unwrap();
    }
    let [base, top] = known.each_ref().map(Known::layer);
    let pages = |known: &Known| u32::try_from(known.toc.data_size() / PAGE_SIZE).unwrap();
    let (of_base, of_top) = (pages(&known[0]), pages(&known[1]));
    let wrong_table = ProfileLayer { toc: top.toc, ..base };
    for (layers, runs, expected) in [
        (vec![foreign_known.layer()], vec![0, 0, 1], "none that the image streams"),
        (vec![base, foreign_known.layer()], vec![0, 0, 1], "none that the image streams"),
        (vec![wrong_table], vec![0, 0, 1], "another table"),
        (vec![base, base], vec![0, 0, 1], "twice"),
        (vec![base, top], vec![0, of_base - 1, 2], "does not have"),
        (vec![base, top], vec![0, 0, 1, 1, of_top, 1], "does not have"),
        (vec![base, top], vec![1, u32::MAX, 1], "does not have"),
        (vec![base], vec![1, 0, 1], "does not name"),
        (vec![base], vec![0, 0, 0], "is empty"),
        (vec![base], vec![0, 0, u32::MAX], "pages"),
        (vec![base], vec![0, 0], "numbers"),
        (vec![], vec![0, 0, 1], "does not name"),
        (vec![base; 1025], vec![0, 0, 1], "1025 layers"),
    ] {
        let refused = server.record(&scope, &layers, &runs).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(expected), "{runs:?}: {refused}");
    }
    let nameless = PutRecordingRequest { layers: vec![RecordedLayer::default()], ..recording(&scope, &[], &[]) };
    assert_eq!(code(server.client.clone().put_recording(nameless).await), Code::InvalidArgument);
    assert_eq!(code(server.profile(&scope, true, &[]).await), Code::NotFound, "nothing of it was kept");
    assert!(
        server.record(&scope, &[base, top], &[0, of_base - 1, 1, 1, 0, of_top]).await.unwrap(),
        "the last page fits"
    );
    assert!(server.record(&scope, &[base, top], &[]).await.unwrap(), "and so does a start that read nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_read_gets_no_profile_and_tells_nothing() {
    let Some(registry) = Registry::start() else { return };
    let gate = Gate::start(registry.port, Some(ADA));
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/secret", "v1", &layers);
    let known = known_sample(&layers);
    let name = format!("{}/team/secret", gate.host());
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    server.import(&format!("{name}:v1"), Some(basic("ada", "secret"))).await.unwrap();
    let (all, runs) = (known.each_ref().map(Known::layer), some_runs(&known));
    let ada = Scope { credential: Some(basic("ada", "secret")), ..scope(&name, manifest) };
    assert!(server.record(&ada, &all, &runs).await.unwrap());
    let (plan, packed) = server.pages(&ada, &runs).await;
    assert_eq!(proven(&plan, &packed, &known.each_ref(), &[]), pages_of(&runs), "made with the right of who told");
    for wrong in [Some(basic("ada", "wrong")), Some(basic("eve", "secret")), None] {
        let scope = Scope { credential: wrong, ..scope(&name, manifest) };
        for pages in [true, false] {
            assert_eq!(code(server.profile(&scope, pages, &[]).await), Code::PermissionDenied);
        }
        assert_eq!(code(server.record(&scope, &all, &[0, 0, 1]).await), Code::PermissionDenied);
    }
    assert_eq!(server.profile(&ada, false, &[]).await.unwrap().0.recordings, 1);
    // The same image by another name: nobody imported it there, and once somebody did, nothing was told of it.
    let elsewhere = format!("{}/team/secret", registry.host());
    let open = scope(&elsewhere, manifest);
    assert_eq!(code(server.profile(&open, true, &[]).await), Code::NotFound);
    assert_eq!(code(server.record(&open, &all, &runs).await), Code::FailedPrecondition);
    server.import(&format!("{elsewhere}:v1"), None).await.unwrap();
    assert_eq!(code(server.profile(&open, true, &[]).await), Code::NotFound);
    assert_eq!(
        code(server.profile(&Scope { manifest_digest: String::new(), ..open }, true, &[]).await),
        Code::InvalidArgument
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_tag_gets_the_profile_of_the_one_before() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let old = sample_layers();
    let old_known = known_sample(&old);
    // The base stays; above it a file that was not there pushes the other one away.
    let (added, motd) = (noise(7, 300_000), noise(8, 100_000));
    let new = Layer::gzip(&Tar::default().file("added", &added).file("etc/motd", &motd).finish());
    let new_known = Known::new(&new, Compression::Gzip, &[("added", added), ("etc/motd", motd)]);
    let first = push(&registry, "team/app", "v1", &old);
    let [base, _] = <[Layer; 2]>::try_from(old).ok().unwrap();
    let second = push(&registry, "team/app", "v2", &[base, new]);
    let stranger = Layer::gzip(&Tar::default().file("unrelated", b"x").finish());
    let third = push(&registry, "team/app", "v3", &[stranger]);
    let name = format!("{}/team/app", registry.host());
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    for tag in ["v1", "v2", "v3"] {
        server.import(&format!("{name}:{tag}"), None).await.unwrap();
    }
    let (first, second, third) = (scope(&name, first), scope(&name, second), scope(&name, third));
    assert_eq!(code(server.profile(&second, true, &[]).await), Code::NotFound);

    let runs = some_runs(&old_known);
    assert!(server.record(&first, &old_known.each_ref().map(Known::layer), &runs).await.unwrap());
    let (plan, packed) = server.profile(&second, true, &[]).await.unwrap();
    assert!(packed.is_none(), "the first one gets the plan");
    assert_eq!(plan.recordings, 0);
    let moved = new_known.first("etc/motd") - old_known[1].first("etc/motd");
    assert!(moved > 0);
    let expected: Vec<u32> =
        runs.chunks(3).flat_map(|run| [run[0], run[1] + if run[0] == 1 { moved } else { 0 }, run[2]]).collect();
    assert_eq!(plan.runs, expected);
    let (plan, packed) = server.pages(&second, &expected).await;
    assert_eq!(proven(&plan, &packed, &[&old_known[0], &new_known], &[]), pages_of(&runs));
    for _ in 0..2 {
        assert_eq!(code(server.profile(&third, true, &[]).await), Code::NotFound, "nothing of it is in there");
    }

    // Who recorded it himself knows better.
    let all = [old_known[0].layer(), new_known.layer()];
    assert!(server.record(&second, &all, &[1, 0, 3]).await.unwrap());
    let (plan, _) = server.pages(&second, &[1, 0, 3]).await;
    assert_eq!(plan.recordings, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_packed_content_need_no_blob() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let long = noise(61, 18 << 20);
    let tar = Tar::default().file("first", &noise(60, 5000)).file("long", &long).file("last", b"the end").finish();
    let layer = Layer::zstd(&tar);
    let known = Known::new(
        &layer,
        Compression::Zstd,
        &[("first", noise(60, 5000)), ("long", long), ("last", b"the end".to_vec())],
    );
    assert!(known.toc.has_closed_spans().unwrap());
    let manifest = push(&registry, "team/zstd", "v1", &[layer]);
    let gate = Gate::start(registry.port, None);
    let name = format!("{}/team/zstd", gate.host());
    let scope = scope(&name, manifest);
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    server.import(&format!("{name}:v1"), None).await.unwrap();
    let start = known.first("long");
    let mut runs = vec![0, known.first("last"), 1];
    // More than is read at a time, with far less than that wanted.
    for n in (0..18).rev() {
        runs.extend([0, start + n * 256 + 3, 20]);
    }
    let asked = gate.admitted.load(Ordering::Relaxed);
    assert!(server.record(&scope, &[known.layer()], &runs).await.unwrap());
    let (plan, packed) = server.pages(&scope, &runs).await;
    assert_eq!(proven(&plan, &packed, &[&known], &[]), pages_of(&runs));
    assert!(gate.admitted.load(Ordering::Relaxed) - asked <= 1, "only the right to read was asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_have_a_limit_and_can_be_switched_off() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let known = known_sample(&layers);
    let name = format!("{}/team/app", registry.host());
    let scope = scope(&name, manifest);
    let (all, runs) = (known.each_ref().map(Known::layer), some_runs(&known));
    let with_max = |max| ServiceOptions { profile: ProfileOptions { max }, ..ServiceOptions::default() };

    let server = Server::start(state.path(), with_max(0)).await;
    server.import(&format!("{name}:v1"), None).await.unwrap();
    assert!(!server.record(&scope, &all, &runs).await.unwrap(), "turned away");
    assert_eq!(code(server.profile(&scope, true, &[]).await), Code::NotFound);
    assert!(!state.path().join("recordings").exists());
    drop(server);

    let server = Server::start(state.path(), ServiceOptions::default()).await;
    assert!(server.record(&scope, &all, &runs).await.unwrap());
    server.pages(&scope, &runs).await;
    drop(server);
    // A limit that was lowered holds for what is there, too.
    let server = Server::start(state.path(), with_max(10 * PAGE_SIZE)).await;
    let short = [&runs[..3], &[0, runs[4], 1]].concat();
    assert_eq!(server.profile(&scope, false, &[]).await.unwrap().0.runs, short);
    let (plan, packed) = server.pages(&scope, &short).await;
    assert_eq!(proven(&plan, &packed, &known.each_ref(), &[]), 10);
    drop(server);
    let server = Server::start(state.path(), with_max(0)).await;
    assert_eq!(code(server.profile(&scope, true, &[]).await), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_process_plans_are_kept_and_no_pages() {
    let Some(registry) = Registry::start() else { return };
    let state = tempfile::tempdir().unwrap();
    let layers = sample_layers();
    let manifest = push(&registry, "team/app", "v1", &layers);
    let known = known_sample(&layers);
    let name = format!("{}/team/app", registry.host());
    let scope = scope(&name, manifest);
    let server = Server::start(state.path(), ServiceOptions::default()).await;
    server.import(&format!("{name}:v1"), None).await.unwrap();
    drop(server);
    let service = Server::service(state.path(), ServiceOptions { embedded: true, ..ServiceOptions::default() });
    let (all, runs) = (known.each_ref().map(Known::layer), some_runs(&known));
    let told = tonic::Request::new(recording(&scope, &all, &runs));
    assert!(service.put_recording(told).await.unwrap().into_inner().taken);
    for _ in 0..3 {
        let asked = tonic::Request::new(asking(&scope, true, &[]));
        let mut answer = service.get_profile(asked).await.unwrap().into_inner();
        let mut messages = Vec::new();
        while let Some(message) = tokio_stream::StreamExt::next(&mut answer).await {
            messages.push(message.unwrap().part.unwrap());
        }
        let [ProfilePart::Plan(plan)] = &messages[..] else { panic!("the plan and nothing else") };
        assert_eq!((&plan.runs, plan.pages), (&runs, false));
    }
    assert!(!state.path().join("packs").exists());
}
