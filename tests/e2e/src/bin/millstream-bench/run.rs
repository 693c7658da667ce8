//! From a matrix to rows: what is missing is made, what is measured is left alone.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use millstream_e2e::daemons::SERVER;
use millstream_e2e::link::LinkOptions;
use millstream_e2e::need::{CONTAINERS, Need, bench_tool};
use millstream_e2e::process::{eventually, let_pass};
use millstream_e2e::recipe;
use millstream_e2e::rig::{Offered, Rig};

use crate::images::{Form, Ready};
use crate::matrix::{FEW, Group, Job, Link, Matrix, NEAR_PAIRS};
use crate::peers::{Known, Subject};
use crate::rows::{Key, Origin, Rows};
use crate::{floor, job, metrics, processor, say};

/// What the server logs when a profile of its own can be sent.
const PACKED: &str = "pages of a startup profile put together";
/// How long that may take after it was told of a start.
const LEARNED: Duration = Duration::from_secs(120);
/// Over this time the server has hardly used a processor when it is done with what it was told.
const IDLE: Duration = Duration::from_secs(1);

/// Starts that a profile is made of: as many as it takes until it is held for certain.
const STARTS: u32 = 3;

/// Failures of one cell after which it is left alone.
const ATTEMPTS: u32 = 2;

/// Images and floors; nothing is measured.
pub(crate) fn prepare(dir: &Path, matrix: &Matrix) -> Result<Vec<Ready>> {
    check(matrix)?;
    let machine = Origin::here()?.machine;
    let mut images = matrix.images().into_iter().map(|name| Ready::make(dir, name)).collect::<Result<Vec<_>>>()?;
    for image in &mut images {
        image.working_set = floor::recorded(image, &machine);
    }
    let lacking: Vec<usize> =
        (0..images.len()).filter(|at| images[*at].working_set.is_none() && matrix.starts(&images[*at].name)).collect();
    if !lacking.is_empty() {
        let offered: Vec<Offered> = lacking.iter().flat_map(|at| images[*at].offered(&[Form::Plain])).collect();
        // A line that nobody waits for.
        let line = LinkOptions { megabits: 10_000, one_way: Duration::ZERO };
        let rig = Rig::set(line, &offered, Some(&storage(dir)?))?;
        for at in lacking {
            let recorded = floor::record(&rig, &images[at], &machine);
            images[at].working_set = Some(recorded.with_context(|| format!("the floor of {}", images[at].name))?);
        }
    }
    for image in &images {
        for form in Form::ALL.into_iter().filter(|form| *form != Form::Plain && matrix.converts(&image.name, *form)) {
            image.convert(form)?;
        }
    }
    Ok(images)
}

fn check(matrix: &Matrix) -> Result<()> {
    let hint = "hint: run `make bench`, as root";
    ensure!(!matrix.groups.is_empty(), "nothing to measure: no group of the matrix has this image and link");
    let needs = [
        Need::Program(recipe::PROGRAM),
        Need::Product("millstreamd"),
        Need::Product("millstream-server"),
        Need::Containerd2,
    ];
    for need in CONTAINERS.iter().chain(&needs) {
        ensure!(need.is_met(), "missing: {need:?}; {hint}");
    }
    ensure!(bench_tool("millstream-bench-tool").is_some(), "missing: millstream-bench-tool; {hint}");
    let mut said = HashSet::new();
    for (subject, _) in matrix.groups.iter().flat_map(|group| &group.cells) {
        if let Some(missing) = subject.missing()
            && said.insert(subject.peer())
        {
            say(format_args!("{} is left out: {missing} is missing", subject.peer()));
        }
    }
    Ok(())
}

fn storage(dir: &Path) -> Result<std::path::PathBuf> {
    let storage = dir.join("registry");
    std::fs::create_dir_all(&storage)?;
    Ok(storage)
}

/// All of it.
pub(crate) fn run(dir: &Path, matrix: &Matrix) -> Result<()> {
    let images = prepare(dir, matrix)?;
    let origin = Origin::here()?;
    let mut bench = Bench { dir, images, rows: Rows::open(dir)?, origin, failures: Vec::new() };
    for link in Link::ALL {
        let groups: Vec<&Group> = matrix.groups.iter().filter(|group| group.link == link).collect();
        bench.measure_link(link, &groups)?;
    }
    if bench.failures.is_empty() {
        return Ok(());
    }
    bail!("{} runs failed; the others were kept:\n{}", bench.failures.len(), bench.failures.join("\n"))
}

struct Bench<'d> {
    dir: &'d Path,
    images: Vec<Ready>,
    rows: Rows,
    origin: Origin,
    failures: Vec<String>,
}

/// A rig, and the images that its server knows, with a profile or without.
struct Standing {
    rig: Rig,
    known: HashSet<(String, bool)>,
}

impl Bench<'_> {
    fn measure_link(&mut self, link: Link, groups: &[&Group]) -> Result<()> {
        let mut standing = None;
        for group in groups {
            let mut cells: Vec<(Subject, Job)> = group.cells.clone();
            cells.retain(|(subject, _)| subject.missing().is_none());
            self.measure_rounds(&mut standing, link, group, &cells, 0..group.rounds)?;
            if group.decides && group.rounds < NEAR_PAIRS {
                let near = metrics::near(&self.rows.latest(), group.image, link, &cells);
                if !near.is_empty() {
                    say(format_args!("{} on {}: {} cells are near a target", group.image, link.name(), near.len()));
                    self.measure_rounds(&mut standing, link, group, &near, group.rounds..NEAR_PAIRS)?;
                }
            }
        }
        Ok(())
    }

    fn measure_rounds(
        &mut self,
        standing: &mut Option<Standing>,
        link: Link,
        group: &Group,
        cells: &[(Subject, Job)],
        rounds: std::ops::Range<u32>,
    ) -> Result<()> {
        let mut failed = vec![0; cells.len()];
        for round in rounds {
            // The first one of a round changes: a busy machine must not favour one of them.
            for position in 0..cells.len() {
                let at = (position + round as usize) % cells.len();
                let (subject, job) = cells[at];
                if (FEW..group.rounds).contains(&round) && group.few.contains(&subject) {
                    continue;
                }
                if failed[at] < ATTEMPTS && !self.measure(standing, link, group.image, subject, job, round)? {
                    failed[at] += 1;
                }
            }
        }
        Ok(())
    }

    /// Whether this run was made, now or before.
    fn measure(
        &mut self,
        standing: &mut Option<Standing>,
        link: Link,
        image: &str,
        subject: Subject,
        job: Job,
        round: u32,
    ) -> Result<bool> {
        let image = self.images.iter().find(|ready| ready.name == image).context("an image that was not made")?;
        let key = Key {
            image: image.name.clone(),
            link: link.name().to_owned(),
            peer: subject.peer(),
            settings: subject.settings(),
            job: job.name().to_owned(),
            round,
        };
        if self.rows.has(&key, &image.info.manifest, &self.origin) {
            return Ok(true);
        }
        let stand = match standing.take() {
            Some(stand) => stand,
            None => self.stand(link)?,
        };
        let stand = standing.insert(stand);
        let values = stand.know(image, subject).and_then(|()| job::run(&mut stand.rig, image, link, subject, job));
        let name = format!("{} {} {}, {} ({})", key.image, key.link, key.peer, key.settings, key.job);
        match values {
            Ok(values) => {
                let ready = values.ready_s.map_or_else(String::new, |ready| format!(", ready after {ready:.2} s"));
                say(format_args!("{name} #{round}: pulled after {:.2} s{ready}", values.pull_s));
                self.rows.add(key, values, &image.info.manifest, &self.origin)?;
                Ok(true)
            }
            Err(error) => {
                say(format_args!("{name} #{round} failed: {error:#}"));
                self.failures.push(format!("{name} #{round}: {error:#}"));
                // Whatever it left behind goes with the rig.
                *standing = None;
                Ok(false)
            }
        }
    }

    fn stand(&self, link: Link) -> Result<Standing> {
        say(format_args!("setting registry and server behind a line of {}", link.name()));
        let mut offered = Vec::new();
        for image in &self.images {
            let forms = Form::ALL.into_iter().filter(|form| image.has(*form)).collect::<Vec<_>>();
            offered.extend(image.offered(&forms));
        }
        Ok(Standing { rig: Rig::set(link.options(), &offered, Some(&storage(self.dir)?))?, known: HashSet::new() })
    }
}

impl Standing {
    /// Has the server learn what the subject takes for granted. Not counted: it is done once for all nodes.
    fn know(&mut self, image: &Ready, subject: Subject) -> Result<()> {
        let Subject::Millstream { version, known, .. } = subject else { return Ok(()) };
        let profile = match known {
            Known::Nothing => return Ok(()),
            Known::Indexed | Known::First => false,
            Known::Profile => true,
        };
        let imported = self.known.insert((image.name.clone(), false));
        if imported {
            self.rig.start_server()?;
            let taken = self.rig.import(&self.rig.registry.reference(&image.registry_name(Form::Plain)))?;
            say(format_args!("{}: imported by the server in {:.1} s", image.name, taken.as_secs_f64()));
        }
        let started = profile && self.known.insert((image.name.clone(), true));
        if started {
            let log = self.rig.work.log(SERVER);
            let put_together = || -> Result<usize> {
                let text = std::fs::read_to_string(&log)?;
                Ok(text.lines().filter(|line| line.contains(PACKED) && line.contains(&image.info.manifest)).count())
            };
            let before = put_together()?;
            // On other nodes: the state is wiped afterwards.
            let first = Subject::Millstream { version, known: Known::First, hydration: false };
            for number in 1..=STARTS {
                job::run(&mut self.rig, image, Link::Fast, first, Job::Start)
                    .with_context(|| format!("start {number} of {}, for its profile", image.name))?;
            }
            eventually("the pages of the profile", LEARNED, || {
                put_together().is_ok_and(|now| now > before).then_some(())
            })?;
            say(format_args!("{}: started on {STARTS} other nodes", image.name));
        }
        if imported || started { self.await_idle_server() } else { Ok(()) }
    }

    /// What the server makes of an image and of its starts takes the processors that are measured, too; and the pages of the last
    /// start are put together after those of the first.
    fn await_idle_server(&self) -> Result<()> {
        let Some(server) = self.rig.server_process() else { return Ok(()) };
        eventually("the server to be idle", LEARNED, || {
            let before = processor::used(&[server]);
            let_pass(IDLE);
            (processor::used(&[server]) - before < IDLE.as_secs_f64() / 20.0).then_some(())
        })
    }
}
