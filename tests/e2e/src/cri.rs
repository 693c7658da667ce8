//! The kubelet's side of the container runtime interface, as far as tests need it.
//!
//! Calls block: a test reads from top to bottom. Pods use the host's network and live in the run's control group.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use millstream_wire::cri::runtime::v1::{
    AuthConfig, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, ImageSpec, ImageStatusRequest, KeyValue, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, PullImageRequest, RemoveContainerRequest, RemoveImageRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use tonic::transport::{Channel, Endpoint};

use crate::process::pause;
use crate::registry::Login;
use crate::workdir::Workdir;

/// Deadline of one call; a pull over a slow link is the longest.
const CALL: Duration = Duration::from_secs(300);

/// A connected client. Pods that it made are removed when it is dropped.
#[derive(Debug)]
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    channel: Channel,
    logs: PathBuf,
    cgroup: String,
    pods: Vec<Pod>,
}

/// A pod that runs.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    config: PodSandboxConfig,
}

/// What to run in a container.
#[derive(Debug, Clone, Default)]
pub struct ContainerSpec<'a> {
    /// Reference of an image that was pulled.
    pub image: &'a str,
    /// Replaces the image's entry point, unless empty.
    pub command: &'a [&'a str],
    /// Replaces the image's command, unless empty.
    pub args: &'a [&'a str],
    /// Environment, besides the image's own.
    pub env: &'a [(&'a str, &'a str)],
}

/// A container that was created.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its id.
    pub id: String,
    log: PathBuf,
}

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit code of its first process.
    pub exit_code: i32,
    /// What it wrote, both streams in the order of the log.
    pub output: String,
}

impl Cri {
    /// Connects to the runtime's socket.
    ///
    /// # Errors
    ///
    /// If nobody answers.
    pub fn connect(work: &Workdir, socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime.block_on(connect(socket))?;
        Ok(Self { runtime, channel, logs: work.dir("pods")?, cgroup: work.cgroup(), pods: Vec::new() })
    }

    /// Pulls an image and says how long that took.
    ///
    /// # Errors
    ///
    /// If the pull fails.
    pub fn pull(&self, image: &str, login: Option<&Login>) -> Result<Duration> {
        let auth = login.map(|login| AuthConfig {
            username: login.user.clone(),
            password: login.password.clone(),
            ..AuthConfig::default()
        });
        let started = Instant::now();
        let request = PullImageRequest { image: Some(spec(image)), auth, sandbox_config: None };
        self.call(async { self.images().pull_image(request).await }).with_context(|| format!("pulling {image}"))?;
        Ok(started.elapsed())
    }

    /// Whether the runtime has the image.
    ///
    /// # Errors
    ///
    /// If the call fails.
    pub fn has_image(&self, image: &str) -> Result<bool> {
        let request = ImageStatusRequest { image: Some(spec(image)), verbose: false };
        Ok(self.call(async { self.images().image_status(request).await })?.image.is_some())
    }

    /// Removes an image; one that is not there is fine.
    ///
    /// # Errors
    ///
    /// If the call fails.
    pub fn remove_image(&self, image: &str) -> Result<()> {
        let request = RemoveImageRequest { image: Some(spec(image)) };
        self.call(async { self.images().remove_image(request).await }).map(drop)
    }

    /// Starts a pod on the host's network. `name` is unique among the pods of this client.
    ///
    /// # Errors
    ///
    /// If the call fails.
    pub fn run_pod(&mut self, name: &str) -> Result<Pod> {
        let logs = self.logs.join(name);
        std::fs::create_dir_all(&logs)?;
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.cgroup.clone(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(host_network()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let answer = self
            .call(async { self.containers().run_pod_sandbox(request).await })
            .with_context(|| format!("running the pod {name}"))?;
        let pod = Pod { id: answer.pod_sandbox_id, config };
        self.pods.push(pod.clone());
        Ok(pod)
    }

    /// Creates a container; `name` is unique in its pod.
    ///
    /// # Errors
    ///
    /// If the call fails.
    pub fn create(&self, pod: &Pod, name: &str, wanted: &ContainerSpec<'_>) -> Result<Container> {
        let log = format!("{name}.log");
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(spec(wanted.image)),
            command: wanted.command.iter().map(|word| (*word).to_owned()).collect(),
            args: wanted.args.iter().map(|word| (*word).to_owned()).collect(),
            envs: wanted
                .env
                .iter()
                .map(|(key, value)| KeyValue { key: (*key).to_owned(), value: value.as_bytes().to_vec() })
                .collect(),
            log_path: log.clone(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(host_network()),
                    ..LinuxContainerSecurityContext::default()
                }),
                ..LinuxContainerConfig::default()
            }),
            ..ContainerConfig::default()
        };
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self
            .call(async { self.containers().create_container(request).await })
            .with_context(|| format!("creating a container of {}", wanted.image))?;
        Ok(Container { id: answer.container_id, log: Path::new(&pod.config.log_directory).join(log) })
    }

    /// Starts a created container and says how long the call took.
    ///
    /// # Errors
    ///
    /// If the call fails.
    pub fn start(&self, container: &Container) -> Result<Duration> {
        let started = Instant::now();
        let request = StartContainerRequest { container_id: container.id.clone() };
        self.call(async { self.containers().start_container(request).await }).context("starting a container")?;
        Ok(started.elapsed())
    }

    /// The state of a container.
    ///
    /// # Errors
    ///
    /// If the call fails.
    pub fn status(&self, container: &Container) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
        let answer = self.call(async { self.containers().container_status(request).await })?;
        answer.status.context("the runtime gave no status")
    }

    /// Waits until a started container has ended.
    ///
    /// # Errors
    ///
    /// If it has not within `deadline`.
    pub fn wait(&self, container: &Container, deadline: Duration) -> Result<Ended> {
        let started = Instant::now();
        loop {
            let status = self.status(container)?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(Ended { exit_code: status.exit_code, output: self.output(container)? });
            }
            if started.elapsed() >= deadline {
                bail!("still running after {deadline:?}; so far it wrote:\n{}", self.output(container)?);
            }
            pause();
        }
    }

    /// What a container wrote until now.
    ///
    /// # Errors
    ///
    /// If its log cannot be read.
    pub fn output(&self, container: &Container) -> Result<String> {
        let log =
            std::fs::read_to_string(&container.log).with_context(|| format!("reading {}", container.log.display()))?;
        Ok(plain_output(&log))
    }

    /// Creates, starts and awaits one container in a pod.
    ///
    /// # Errors
    ///
    /// If a call fails, or the container does not end within `deadline`, or ends with a code other than 0.
    pub fn run(&self, pod: &Pod, name: &str, wanted: &ContainerSpec<'_>, deadline: Duration) -> Result<String> {
        let container = self.create(pod, name, wanted)?;
        self.start(&container)?;
        let ended = self.wait(&container, deadline)?;
        ensure!(ended.exit_code == 0, "{name} ended with {}:\n{}", ended.exit_code, ended.output);
        Ok(ended.output)
    }

    /// Kills and removes a container.
    ///
    /// # Errors
    ///
    /// If a call fails.
    pub fn remove(&self, container: &Container) -> Result<()> {
        let id = &container.id;
        let stop = StopContainerRequest { container_id: id.clone(), timeout: 0 };
        self.call(async { self.containers().stop_container(stop).await })?;
        let remove = RemoveContainerRequest { container_id: id.clone() };
        self.call(async { self.containers().remove_container(remove).await }).map(drop)
    }

    /// Stops and removes every pod that this client made, with their containers.
    ///
    /// # Errors
    ///
    /// The first call that fails; the others are made all the same, and a further attempt is possible.
    pub fn remove_pods(&mut self) -> Result<()> {
        let mut first = Ok(());
        for pod in std::mem::take(&mut self.pods) {
            let stop = StopPodSandboxRequest { pod_sandbox_id: pod.id.clone() };
            let remove = RemovePodSandboxRequest { pod_sandbox_id: pod.id.clone() };
            let removed = self
                .call(async { self.containers().stop_pod_sandbox(stop).await })
                .and_then(|_| self.call(async { self.containers().remove_pod_sandbox(remove).await }));
            if removed.is_err() {
                self.pods.push(pod);
            }
            first = first.and(removed.map(drop));
        }
        first
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    fn containers(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    fn call<T>(&self, call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Result<T> {
        let answer = self.runtime.block_on(async { tokio::time::timeout(CALL, call).await });
        Ok(answer.context("no answer from the runtime")??.into_inner())
    }
}

impl Drop for Cri {
    fn drop(&mut self) {
        // If the runtime was restarted meanwhile, the first call on the old connection fails.
        if let Err(error) = self.remove_pods().or_else(|_| self.remove_pods()) {
            // The workdir ends their processes anyway.
            eprintln!("pods not removed: {error:#}");
        }
    }
}

/// Connects to a gRPC server on a unix socket.
///
/// # Errors
///
/// If nobody accepts.
pub async fn connect(socket: &Path) -> Result<Channel> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is only what stands in the requests; the connector decides.
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint.connect_with_connector(connector).await.with_context(|| format!("connecting to {}", socket.display()))
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec { image: image.to_owned(), ..ImageSpec::default() }
}

fn host_network() -> NamespaceOption {
    NamespaceOption { network: NamespaceMode::Node.into(), ..NamespaceOption::default() }
}

/// Lines of a CRI log are `<time> <stream> <tags> <text>`; the tag `P` says that the line goes on in the next one.
fn plain_output(log: &str) -> String {
    let mut output = String::new();
    for line in log.lines() {
        let mut fields = line.splitn(4, ' ').skip(2);
        let partial = fields.next().is_some_and(|tags| tags.split(':').any(|tag| tag == "P"));
        output.push_str(fields.next().unwrap_or_default());
        if !partial {
            output.push('\n');
        }
    }
    output
}

#[cfg(test)]
mod tests {
    use super::plain_output;

    #[test]
    fn parts_of_a_line_are_joined() {
        let log = "2026-11-22T06:00:00.1Z stdout P one \n2026-11-22T06:00:00.2Z stdout F two\n2026-11-22T06:00:00.3Z stderr F \n";
        assert_eq!(plain_output(log), "one two\n\n");
    }
}
