//! A gRPC proxy before millstream-server that answers as a server gone bad would.
//!
//! What it passes on comes from the real server; what it spoils is the content of the messages, or when they come. It runs in
//! a runtime of its own in the test's process.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use millstream_wire::millstream::v1 as wire;
use millstream_wire::millstream::v1::get_image_response::Part;
use millstream_wire::millstream::v1::images_client::ImagesClient;
use millstream_wire::millstream::v1::images_server::{Images, ImagesServer};
use tokio::runtime::Runtime;
use tokio_stream::Stream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Code, Request, Response, Status, Streaming};

/// Bytes of a window, at most.
const WINDOW: usize = 32 << 10;
/// Bytes of one message.
const MESSAGE: usize = 32 << 20;

/// What becomes of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lie {
    /// They pass.
    #[default]
    None,
    /// Every request is refused with this status.
    Refuse(Code),
    /// Content and windows: one bit of each message is wrong.
    WrongBit,
    /// Content from another place of the layer.
    OtherPlace,
    /// Content: the last byte is missing.
    Short,
    /// Content: there is a byte too many.
    Long,
    /// Content of another layer of the image.
    OtherLayer,
    /// Windows only; content passes.
    Window(Window),
    /// Content and windows: messages without end.
    Endless,
    /// Content and windows: no message ever.
    Hang,
    /// The connection's answer breaks off after the first message.
    Cut,
    /// The table of an image's top layer instead of that of the bottom one.
    OtherTable,
    /// The same, and the description of the image names them so.
    StaleTable,
}

/// How windows are wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// One bit of each is wrong.
    WrongBit,
    /// They are those of another layer of the image.
    OtherLayer,
    /// Of each the last byte is missing.
    Short,
    /// Each has a byte too many.
    Long,
    /// Each is something that cannot be unpacked.
    Garbage,
    /// There is one too few.
    Missing,
    /// Each is empty.
    Empty,
    /// None comes, ever.
    Hang,
}

impl Window {
    /// Of one window as it is sent.
    fn spoil(self, packed: &mut Vec<u8>) -> Result<(), Status> {
        let failed = |error: std::io::Error| Status::internal(error.to_string());
        let mut raw = zstd::bulk::decompress(packed, WINDOW).map_err(failed)?;
        match self {
            Self::WrongBit => spoil(&mut raw),
            Self::Short => drop(raw.pop()),
            Self::Long => raw.push(0),
            Self::Garbage => raw.clear(),
            Self::Empty => {
                packed.clear();
                return Ok(());
            }
            Self::OtherLayer | Self::Missing | Self::Hang => return Ok(()),
        }
        *packed =
            if self == Self::Garbage { vec![0x55; 100] } else { zstd::bulk::compress(&raw, 1).map_err(failed)? };
        Ok(())
    }
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Debug)]
struct State {
    client: ImagesClient<Channel>,
    lie: Mutex<Lie>,
    lied: AtomicU32,
    /// Digests of layers to take what is given for others from.
    layers: Mutex<Vec<String>>,
}

impl State {
    fn lie(&self) -> Lie {
        *self.lie.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lied(&self) {
        self.lied.fetch_add(1, Ordering::Relaxed);
    }

    /// Another layer of the image.
    fn another_than(&self, layer: &str) -> String {
        let layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        layers.iter().rfind(|other| *other != layer).cloned().unwrap_or_default()
    }

    /// The lie, unless it is to refuse.
    fn heard(&self) -> Result<Lie, Status> {
        match self.lie() {
            Lie::Refuse(code) => {
                self.lied();
                Err(Status::new(code, "refused by the test"))
            }
            lie => Ok(lie),
        }
    }
}

/// A running proxy; it ends when it is dropped.
#[derive(Debug)]
pub struct Liar {
    address: SocketAddr,
    state: Arc<State>,
    runtime: Option<Runtime>,
}

impl Liar {
    /// Starts it before the server at `target` (`http://…`), which need not run yet.
    ///
    /// # Errors
    ///
    /// If no port is free.
    pub fn start(target: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let _inside = runtime.enter();
        let channel = Endpoint::from_shared(target.to_owned())?.connect_lazy();
        let client = ImagesClient::new(channel).max_decoding_message_size(MESSAGE);
        let (lie, layers) = (Mutex::default(), Mutex::default());
        let state = Arc::new(State { client, lie, lied: AtomicU32::new(0), layers });
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).context("looking for a port")?;
        let address = listener.local_addr()?;
        let service = ImagesServer::new(Proxy(Arc::clone(&state))).max_encoding_message_size(MESSAGE);
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        runtime.spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        Ok(Self { address, state, runtime: Some(runtime) })
    }

    /// What nodes call instead of the server.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From the next request on.
    pub fn set(&self, lie: Lie) {
        *self.state.lie.lock().unwrap_or_else(PoisonError::into_inner) = lie;
        self.state.lied.store(0, Ordering::Relaxed);
    }

    /// Answers that were spoiled since the last [`Liar::set`].
    #[must_use]
    pub fn lied(&self) -> u32 {
        self.state.lied.load(Ordering::Relaxed)
    }

    /// Layers (`sha256:…`) whose content and windows are given for those of others; the last ones first.
    pub fn layers(&self, layers: Vec<String>) {
        *self.state.layers.lock().unwrap_or_else(PoisonError::into_inner) = layers;
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Debug)]
struct Proxy(Arc<State>);

fn passed<T: Send + 'static>(stream: Streaming<T>) -> Response<Messages<T>> {
    Response::new(Box::pin(stream))
}

fn given<T: Send + 'static>(
    messages: impl IntoIterator<Item = Result<T, Status>, IntoIter: Send + 'static>,
) -> Response<Messages<T>> {
    Response::new(Box::pin(tokio_stream::iter(messages)))
}

async fn collected<T>(mut stream: Streaming<T>) -> Result<Vec<T>, Status> {
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

fn cut() -> Status {
    Status::unavailable("cut by the test")
}

/// Turns over one bit in the middle.
fn spoil(bytes: &mut [u8]) {
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 0x10;
    }
}

#[tonic::async_trait]
impl Images for Proxy {
    type ImportStream = Messages<wire::ImportProgress>;
    type GetImageStream = Messages<wire::GetImageResponse>;
    type GetWindowsStream = Messages<wire::GetWindowsResponse>;
    type GetSkeletonStream = Messages<wire::GetSkeletonResponse>;
    type ReadFileStream = Messages<wire::ReadFileResponse>;
    type ReadDataStream = Messages<wire::ReadFileResponse>;
    type GetProfileStream = Messages<wire::GetProfileResponse>;

    async fn import(&self, request: Request<wire::ImportRequest>) -> Result<Response<Self::ImportStream>, Status> {
        Ok(passed(self.0.client.clone().import(request.into_inner()).await?.into_inner()))
    }

    async fn get_image(
        &self,
        request: Request<wire::GetImageRequest>,
    ) -> Result<Response<Self::GetImageStream>, Status> {
        let lie = self.0.heard()?;
        if lie == Lie::Hang {
            self.0.lied();
            return Ok(Response::new(Box::pin(tokio_stream::pending())));
        }
        let stream = self.0.client.clone().get_image(request.into_inner()).await?.into_inner();
        if !matches!(lie, Lie::OtherTable | Lie::StaleTable) {
            return Ok(passed(stream));
        }
        self.0.lied();
        let mut messages = collected(stream).await?;
        let described = messages.iter().find_map(|message| match &message.part {
            Some(Part::Image(image)) => Some(image.layers.clone()),
            _ => None,
        });
        let layers = described.unwrap_or_default();
        let (Some(bottom), Some(top)) = (layers.first(), layers.last()) else { return Err(cut()) };
        // The table of the top layer stands for that of the bottom one, whose own is left out.
        messages.retain(|message| !matches!(&message.part, Some(Part::Toc(part)) if part.layer == bottom.digest));
        let copies: Vec<_> = messages
            .iter()
            .filter_map(|message| match &message.part {
                Some(Part::Toc(part)) if part.layer == top.digest => {
                    let part = wire::TocPart { layer: bottom.digest.clone(), ..part.clone() };
                    Some(wire::GetImageResponse { part: Some(Part::Toc(part)) })
                }
                _ => None,
            })
            .collect();
        for message in &mut messages {
            if let (Lie::StaleTable, Some(Part::Image(image))) = (lie, &mut message.part)
                && let Some(layer) = image.layers.first_mut()
            {
                layer.toc_digest.clone_from(&top.toc_digest);
            }
        }
        messages.extend(copies);
        Ok(given(messages.into_iter().map(Ok)))
    }

    async fn get_windows(
        &self,
        request: Request<wire::GetWindowsRequest>,
    ) -> Result<Response<Self::GetWindowsStream>, Status> {
        let lie = self.0.heard()?;
        let mut request = request.into_inner();
        if lie == Lie::Window(Window::OtherLayer) {
            request.layer = self.0.another_than(&request.layer);
        }
        let stream = self.0.client.clone().get_windows(request).await?.into_inner();
        if lie == Lie::None {
            return Ok(passed(stream));
        }
        self.0.lied();
        let mut messages = collected(stream).await?;
        match lie {
            Lie::Hang | Lie::Window(Window::Hang) => return Ok(Response::new(Box::pin(tokio_stream::pending()))),
            Lie::Window(Window::Missing) => {
                messages.last_mut().and_then(|message| message.windows.pop());
            }
            Lie::Window(how) => {
                let windows = messages.iter_mut().flat_map(|message| &mut message.windows);
                // A span that needs none has an empty one.
                windows.filter(|window| !window.is_empty()).try_for_each(|window| how.spoil(window))?;
            }
            Lie::Endless => {
                return Ok(given(std::iter::repeat_with(move || Ok(messages.first().cloned().unwrap_or_default()))));
            }
            Lie::WrongBit => {
                messages.iter_mut().flat_map(|message| &mut message.windows).for_each(|window| spoil(window))
            }
            Lie::Cut => return Ok(given(messages.into_iter().take(1).map(Ok).chain([Err(cut())]))),
            _ => {}
        }
        Ok(given(messages.into_iter().map(Ok)))
    }

    async fn get_skeleton(
        &self,
        request: Request<wire::GetSkeletonRequest>,
    ) -> Result<Response<Self::GetSkeletonStream>, Status> {
        self.0.heard()?;
        Ok(passed(self.0.client.clone().get_skeleton(request.into_inner()).await?.into_inner()))
    }

    async fn get_profile(
        &self,
        request: Request<wire::GetProfileRequest>,
    ) -> Result<Response<Self::GetProfileStream>, Status> {
        self.0.heard()?;
        Ok(passed(self.0.client.clone().get_profile(request.into_inner()).await?.into_inner()))
    }

    async fn put_recording(
        &self,
        request: Request<wire::PutRecordingRequest>,
    ) -> Result<Response<wire::PutRecordingResponse>, Status> {
        self.0.heard()?;
        self.0.client.clone().put_recording(request.into_inner()).await
    }

    async fn read_file(
        &self,
        request: Request<wire::ReadFileRequest>,
    ) -> Result<Response<Self::ReadFileStream>, Status> {
        self.0.heard()?;
        Ok(passed(self.0.client.clone().read_file(request.into_inner()).await?.into_inner()))
    }

    async fn read_data(
        &self,
        request: Request<wire::ReadDataRequest>,
    ) -> Result<Response<Self::ReadDataStream>, Status> {
        let lie = self.0.heard()?;
        let mut request = request.into_inner();
        if lie == Lie::OtherLayer {
            request.layer = self.0.another_than(&request.layer);
        }
        let stream = self.0.client.clone().read_data(request).await?.into_inner();
        if matches!(lie, Lie::None | Lie::Window(_)) {
            return Ok(passed(stream));
        }
        self.0.lied();
        if lie == Lie::Hang {
            return Ok(Response::new(Box::pin(tokio_stream::pending())));
        }
        let mut data: Vec<u8> = collected(stream).await?.into_iter().flat_map(|message| message.data).collect();
        match lie {
            Lie::WrongBit => spoil(&mut data),
            Lie::OtherPlace => {
                let half = data.len() / 2;
                data.rotate_left(half);
            }
            Lie::Short => drop(data.pop()),
            Lie::Long => data.push(0),
            Lie::Endless => {
                let message = wire::ReadFileResponse { data: Vec::new() };
                return Ok(given(std::iter::repeat_with(move || Ok(message.clone()))));
            }
            Lie::Cut => {
                data.truncate(data.len() / 2);
                return Ok(given([Ok(wire::ReadFileResponse { data }), Err(cut())]));
            }
            _ => {}
        }
        let pieces: Vec<_> =
            data.chunks(64 << 10).map(|piece| Ok(wire::ReadFileResponse { data: piece.to_vec() })).collect();
        Ok(given(pieces))
    }
}
