//! Any request to a server that has one image: it is answered or refused, soon, and never with what means a fault of the server.
#![no_main]

use std::cell::OnceCell;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use millstream_fuzz::{archive, choice, loopback, plant};
use millstream_registry::{Registry, RegistryOptions};
use millstream_server::{ImagesService, ServiceOptions, Store};
use millstream_wire::millstream::v1::images_server::Images;
use millstream_wire::millstream::v1::{
    GetImageRequest, GetWindowsRequest, ImportRequest, Platform, ReadDataRequest, ReadFileRequest, Scope,
};
use prost::Message;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status};

/// What requests call the registry; `hosts.toml` says where it is. No other one may be named, so nothing leaves the machine.
const HOST: &str = "fuzz.example";
/// Time for one request. Registry and store are on this machine.
const DEADLINE: Duration = Duration::from_secs(20);

struct Stage {
    runtime: Runtime,
    service: ImagesService,
    image: loopback::Image,
    _directory: TempDir,
}

fn amd64() -> Option<Platform> {
    Some(Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() })
}

/// A server that has imported the image.
fn stage() -> Stage {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let image = loopback::serve(&archive::samples());
    let directory = tempfile::tempdir().expect("a directory");
    let hosts = directory.path().join("hosts");
    std::fs::create_dir_all(hosts.join(HOST)).expect("a directory");
    std::fs::create_dir_all(directory.path().join("store")).expect("a directory");
    std::fs::write(hosts.join(HOST).join("hosts.toml"), format!("server = \"http://{}\"\n", image.host))
        .expect("a file");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let options = ServiceOptions { allowed_registries: vec![HOST.into()], ..ServiceOptions::default() };
    let service = runtime.block_on(async {
        let registry = Registry::new(RegistryOptions { hosts_dir: Some(hosts), ..RegistryOptions::default() });
        let store = Store::open(directory.path().join("store").to_str().expect("UTF-8")).expect("a store");
        ImagesService::new(store, registry.expect("a client"), options)
    });
    let stage = Stage { runtime, service, image, _directory: directory };
    let request = ImportRequest { image: format!("{HOST}/image:1"), credential: None, platform: amd64() };
    let imported = stage.runtime.block_on(answer(stage.service.import(Request::new(request))));
    assert_eq!(imported, Ok(()), "the image is imported");
    stage
}

fn seeds(stage: &Stage) -> Vec<Vec<u8>> {
    let scope = || {
        let (repository, manifest_digest) = (format!("{HOST}/image"), stage.image.manifest.clone());
        Some(Scope { repository, manifest_digest, credential: None, platform: amd64() })
    };
    let with = |method: u8, message: Vec<u8>| [vec![method], message].concat();
    let import = ImportRequest { image: format!("{HOST}/image:1"), credential: None, platform: amd64() };
    let whole = GetImageRequest { scope: scope(), known_layers: Vec::new() };
    let known = GetImageRequest { scope: scope(), known_layers: stage.image.layers.clone() };
    let mut seeds =
        vec![with(0, import.encode_to_vec()), with(1, whole.encode_to_vec()), with(1, known.encode_to_vec())];
    for (layer, path) in stage.image.layers.iter().zip(["etc/motd", "short", "sparse", "a"]) {
        let layer = || layer.clone();
        let windows = GetWindowsRequest { scope: scope(), layer: layer(), first_span: 0, end_span: 1 };
        let file = ReadFileRequest { scope: scope(), layer: layer(), path: path.into(), offset: 1, size: 5 };
        let data = ReadDataRequest { scope: scope(), layer: layer(), offset: 0, size: 40_000 };
        seeds.extend([with(2, windows.encode_to_vec()), with(3, file.encode_to_vec()), with(4, data.encode_to_vec())]);
    }
    seeds
}

/// Reads an answer to its end.
async fn answer<T, S>(call: impl Future<Output = Result<Response<S>, Status>>) -> Result<(), Code>
where
    S: Stream<Item = Result<T, Status>> + Unpin,
{
    let all = async {
        let mut stream = call.await?.into_inner();
        while let Some(part) = stream.next().await {
            part?;
        }
        Ok(())
    };
    let ended: Result<(), Status> = tokio::time::timeout(DEADLINE, all).await.expect("an answer in time");
    ended.map_err(|status| status.code())
}

fn ask(stage: &Stage, method: u8, message: &[u8]) -> Option<Result<(), Code>> {
    let (runtime, service) = (&stage.runtime, &stage.service);
    Some(match method % 5 {
        0 => runtime.block_on(answer(service.import(Request::new(ImportRequest::decode(message).ok()?)))),
        1 => runtime.block_on(answer(service.get_image(Request::new(GetImageRequest::decode(message).ok()?)))),
        2 => runtime.block_on(answer(service.get_windows(Request::new(GetWindowsRequest::decode(message).ok()?)))),
        3 => runtime.block_on(answer(service.read_file(Request::new(ReadFileRequest::decode(message).ok()?)))),
        _ => runtime.block_on(answer(service.read_data(Request::new(ReadDataRequest::decode(message).ok()?)))),
    })
}

thread_local! {
    static STAGE: OnceCell<Stage> = const { OnceCell::new() };
}

fuzz_target!(
    init: STAGE.with(|cell| plant(seeds(cell.get_or_init(stage)))),
    |data: &[u8]| {
        let (method, message) = choice(data);
        STAGE.with(|cell| {
            let answered = ask(cell.get_or_init(stage), method, message);
            let fault = [Code::Internal, Code::Unknown, Code::DataLoss];
            assert!(!matches!(answered, Some(Err(code)) if fault.contains(&code)), "{answered:?}");
        });
    }
);
