//! What is measured: which subjects, on which images and links, how often.

use std::time::Duration;

use millstream_e2e::containerd::Version::{V1, V2};
use millstream_e2e::link::LinkOptions;

use crate::images::{FLAT, Form, LARGE, USUAL};
use crate::peers::{Known, Subject};

/// Runs of a cell whose ratio decides no target, of one whose ratio does, and of one whose ratio is near it.
pub(crate) const FEW: u32 = 2;
pub(crate) const PAIRS: u32 = 5;
pub(crate) const NEAR_PAIRS: u32 = 10;

/// A line to the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// To a registry far away.
    Slow,
    /// Within a region.
    Fast,
    /// So long that round trips can be counted by the time they take.
    Long,
}

impl Link {
    pub(crate) const ALL: [Self; 3] = [Self::Slow, Self::Fast, Self::Long];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Slow => "100mbit-20ms",
            Self::Fast => "1gbit-10ms",
            Self::Long => "1gbit-210ms",
        }
    }

    pub(crate) fn options(self) -> LinkOptions {
        let (megabits, milliseconds) = match self {
            Self::Slow => (100, 10),
            Self::Fast => (1000, 5),
            Self::Long => (1000, 105),
        };
        LinkOptions { megabits, one_way: Duration::from_millis(milliseconds) }
    }

    pub(crate) fn round_trip(self) -> Duration {
        self.options().one_way * 2
    }

    pub(crate) fn bytes_per_second(self) -> f64 {
        f64::from(self.options().megabits) * 1e6 / 8.0
    }
}

/// What is done with a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Job {
    /// Pull and start until the first answer.
    Start,
    /// The same, and then until the whole image is local.
    Local,
    /// Pull only.
    Pull,
    /// Read everything that was made local.
    Files,
}

impl Job {
    /// Name in the rows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Start | Self::Local => "start",
            Self::Pull => "pull",
            Self::Files => "files",
        }
    }
}

/// Subjects that are run in turns on one image.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) image: &'static str,
    pub(crate) link: Link,
    pub(crate) cells: Vec<(Subject, Job)>,
    /// Those of them that are far behind on such a line, and show that it is so: in the first rounds only.
    pub(crate) few: Vec<Subject>,
    pub(crate) rounds: u32,
    /// Whether its ratios decide targets, and so need more rounds where they are near.
    pub(crate) decides: bool,
}

/// Everything.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    pub(crate) groups: Vec<Group>,
}

const TUNED: Subject = Subject::Overlayfs { version: V2, tuned: true };
const DEFAULT: Subject = Subject::Overlayfs { version: V2, tuned: false };
const ESTARGZ: Subject = Subject::Stargz { form: Form::Estargz, tuned: false };
const OPTIMIZED: Subject = Subject::Stargz { form: Form::Optimized, tuned: false };
const PROFILE: Subject = ours(Known::Profile, true);
const INDEXED: Subject = ours(Known::Indexed, true);
const COLD: Subject = ours(Known::Nothing, true);

const fn ours(known: Known, hydration: bool) -> Subject {
    Subject::Millstream { version: V2, known, hydration }
}

impl Matrix {
    /// One image, one link, three runs.
    pub(crate) fn quick() -> Self {
        let cells = vec![(TUNED, Job::Start), (ESTARGZ, Job::Start), (PROFILE, Job::Local)];
        Self {
            groups: vec![Group { image: "wiki", link: Link::Slow, cells, few: Vec::new(), rounds: 3, decides: false }],
        }
    }

    /// What fits into two hours.
    pub(crate) fn usual() -> Self {
        let slow = vec![
            (TUNED, Job::Start),
            (OPTIMIZED, Job::Start),
            (PROFILE, Job::Local),
            (ours(Known::Profile, false), Job::Start),
            (ours(Known::Indexed, false), Job::Start),
        ];
        let fast = vec![
            (DEFAULT, Job::Start),
            (TUNED, Job::Start),
            (ESTARGZ, Job::Start),
            (OPTIMIZED, Job::Start),
            (PROFILE, Job::Local),
            (INDEXED, Job::Start),
            (COLD, Job::Start),
        ];
        let mut groups = Vec::new();
        for (link, cells, few) in [(Link::Slow, slow, vec![TUNED]), (Link::Fast, fast, vec![DEFAULT, ESTARGZ])] {
            groups.extend(USUAL.iter().map(|image| Group { few: few.clone(), ..decisive(image, link, cells.clone()) }));
        }
        groups.extend(files());
        groups.extend(round_trips());
        Self { groups }
    }

    /// All images, peers and settings.
    pub(crate) fn full() -> Self {
        let mut cells: Vec<(Subject, Job)> = Vec::new();
        for version in [V1, V2] {
            cells.extend([false, true].map(|tuned| (Subject::Overlayfs { version, tuned }, Job::Start)));
        }
        for form in [Form::Estargz, Form::Optimized] {
            cells.extend([false, true].map(|tuned| (Subject::Stargz { form, tuned }, Job::Start)));
        }
        cells.extend([false, true].map(|prefetch| (Subject::Soci { prefetch }, Job::Start)));
        cells.extend([
            (PROFILE, Job::Local),
            (ours(Known::Profile, false), Job::Start),
            (INDEXED, Job::Local),
            (ours(Known::Indexed, false), Job::Start),
            (COLD, Job::Start),
            (Subject::Millstream { version: V1, known: Known::Profile, hydration: true }, Job::Start),
            (Subject::Millstream { version: V1, known: Known::Nothing, hydration: true }, Job::Start),
        ]);
        let mut groups = Vec::new();
        for link in [Link::Slow, Link::Fast] {
            groups.extend(USUAL.iter().chain(&LARGE).map(|image| decisive(image, link, cells.clone())));
        }
        groups.extend(files());
        groups.extend(round_trips());
        Self { groups }
    }

    /// Leaves out what is not named; nothing named: all of it stays.
    pub(crate) fn restrict(&mut self, images: &[String], links: &[String], peers: &[String], rounds: Option<u32>) {
        let named = |names: &[String], name: &str| names.is_empty() || names.iter().any(|one| one == name);
        for group in &mut self.groups {
            let wanted = |name: String| peers.is_empty() || peers.iter().any(|part| name.contains(part.as_str()));
            group.cells.retain(|(subject, _)| wanted(format!("{}, {}", subject.peer(), subject.settings())));
        }
        self.groups
            .retain(|group| named(images, group.image) && named(links, group.link.name()) && !group.cells.is_empty());
        if let Some(rounds) = rounds {
            for group in &mut self.groups {
                group.rounds = rounds;
                group.decides = false;
            }
        }
    }

    /// The images that it needs, each once.
    pub(crate) fn images(&self) -> Vec<&'static str> {
        let mut images: Vec<&'static str> = Vec::new();
        for group in &self.groups {
            if !images.contains(&group.image) {
                images.push(group.image);
            }
        }
        images
    }

    /// Whether somebody starts this image.
    pub(crate) fn starts(&self, image: &str) -> bool {
        self.groups.iter().any(|group| group.image == image && group.cells.iter().any(|(_, job)| *job != Job::Pull))
    }

    /// Whether somebody pulls this image in this form.
    pub(crate) fn converts(&self, image: &str, form: Form) -> bool {
        let converted = |(subject, _): &(Subject, Job)| subject.form() == form && subject.missing().is_none();
        self.groups.iter().any(|group| group.image == image && group.cells.iter().any(converted))
    }
}

fn decisive(image: &'static str, link: Link, cells: Vec<(Subject, Job)>) -> Group {
    Group { image, link, cells, few: Vec::new(), rounds: PAIRS, decides: true }
}

/// What a wholly local image is like to read.
fn files() -> impl Iterator<Item = Group> {
    ["wiki", "node"].into_iter().map(|image| {
        let cells = vec![(TUNED, Job::Files), (PROFILE, Job::Files)];
        decisive(image, Link::Fast, cells)
    })
}

/// What round trips a pull waits for, and whether they grow with the number of layers.
fn round_trips() -> impl Iterator<Item = Group> {
    [("layers", Link::Fast), (FLAT, Link::Fast), ("layers", Link::Long), (FLAT, Link::Long)].into_iter().map(
        |(image, link)| {
            let cells = vec![(ours(Known::Indexed, false), Job::Pull)];
            Group { decides: false, ..decisive(image, link, cells) }
        },
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn no_two_cells_of_a_group_have_the_same_key() {
        for matrix in [Matrix::quick(), Matrix::usual(), Matrix::full()] {
            for group in &matrix.groups {
                let mut keys: Vec<_> =
                    group.cells.iter().map(|(subject, job)| (subject.peer(), subject.settings(), job.name())).collect();
                let all = keys.len();
                keys.sort();
                keys.dedup();
                assert_eq!(keys.len(), all, "{} {}", group.image, group.link.name());
            }
        }
    }

    #[test]
    fn a_matrix_can_be_cut_down_to_an_image_and_a_link() {
        let mut matrix = Matrix::usual();
        matrix.restrict(&["node".to_owned()], &["1gbit-10ms".to_owned()], &["stargz".to_owned()], Some(2));
        assert_eq!(matrix.images(), ["node"]);
        assert!(matrix.groups.iter().all(|group| group.rounds == 2 && group.link == Link::Fast));
        assert!(!matrix.converts("wiki", Form::Estargz));
        let peers: Vec<String> =
            matrix.groups.iter().flat_map(|group| &group.cells).map(|(subject, _)| subject.peer()).collect();
        assert!(peers.len() == 2 && peers.iter().all(|peer| peer.starts_with("stargz")), "{peers:?}");
    }
}
