//! The images, what they are asked, and how they are made.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use millstream_e2e::answer::Question;
use millstream_e2e::image::{ImageInfo, extract, manifest_of};
use millstream_e2e::need::bench_tool;
use millstream_e2e::process::output;
use millstream_e2e::recipe::{self, PAUSE, Recipe};
use millstream_e2e::rig::Offered;
use millstream_e2e::web;

use crate::floor::WorkingSet;
use crate::say;

/// What the registry calls the pods' own image.
pub(crate) const PAUSE_NAME: &str = "bench/pause:1";

/// The names of all of them.
pub(crate) const USUAL: [&str; 5] = ["wiki", "node", "postgres", "jvm", "layers"];
/// Those that are measured only by a full run.
pub(crate) const LARGE: [&str; 2] = ["torch", "weights"];

macro_rules! recipe {
    ($name:literal, $incompressible:literal) => {
        Recipe {
            name: $name,
            script: concat!("bench/images/", $name, ".sh"),
            text: include_str!(concat!("../../../../bench/images/", $name, ".sh")),
            incompressible: $incompressible,
        }
    };
}

fn recipe_of(name: &str) -> Result<Recipe> {
    Ok(match name {
        "wiki" => web::RECIPE,
        "node" => recipe!("node", false),
        "postgres" => recipe!("postgres", false),
        "jvm" => recipe!("jvm", false),
        "layers" | FLAT => recipe!("layers", false),
        "torch" => recipe!("torch", false),
        "weights" => recipe!("weights", true),
        other => bail!("there is no image {other}; hint: {USUAL:?}, {LARGE:?}"),
    })
}

/// All layers of the image `layers` in one.
pub(crate) const FLAT: &str = "layers-flat";

/// How a question is put to the application of an image.
pub(crate) fn question(name: &str) -> Question {
    match name {
        "postgres" => Question::query("SELECT 'place ' || count(*) FROM place WHERE ST_X(at) > 0", "place 10000"),
        "jvm" => Question::page("/examples/jsp/jsp2/el/basic-arithmetic.jsp", "Basic Arithmetic"),
        "node" => Question::page("/", "IT WORKS 2026"),
        "layers" | FLAT => Question::page("/", "It works: 45"),
        "torch" => Question::page("/", "It works: 45"),
        "weights" => Question::page("/", "It works"),
        _ => web::question(),
    }
}

/// An image that is there.
#[derive(Debug, Clone)]
pub(crate) struct Ready {
    pub(crate) name: String,
    /// Directory of all that is kept of it.
    pub(crate) dir: PathBuf,
    pub(crate) layout: PathBuf,
    pub(crate) tag: String,
    pub(crate) info: ImageInfo,
    /// Absent: nobody starts it.
    pub(crate) working_set: Option<WorkingSet>,
}

/// In which form an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As it was built.
    Plain,
    Estargz,
    /// eStargz with the files of a start first.
    Optimized,
    /// With an index of SOCI.
    Soci,
    /// The same with the files of a start as those to prefetch.
    SociPrefetch,
}

impl Form {
    pub(crate) const ALL: [Self; 5] = [Self::Plain, Self::Estargz, Self::Optimized, Self::Soci, Self::SociPrefetch];

    fn tag(self) -> &'static str {
        match self {
            Self::Plain => "1",
            Self::Estargz => "estargz",
            Self::Optimized => "optimized",
            Self::Soci => "soci",
            Self::SociPrefetch => "soci-prefetch",
        }
    }

    fn is_soci(self) -> bool {
        matches!(self, Self::Soci | Self::SociPrefetch)
    }

    /// Whether it needs a recorded start.
    fn wants_opens(self) -> bool {
        matches!(self, Self::Optimized | Self::SociPrefetch)
    }
}

impl Ready {
    /// Makes it, unless it is there.
    pub(crate) fn make(dir: &Path, name: &str) -> Result<Self> {
        let recipe = recipe_of(name)?;
        let own = dir.join("images").join(name);
        std::fs::create_dir_all(&own)?;
        // The demo has the same wiki, and may have made it already.
        let place = if recipe == web::RECIPE { web::default_dir()? } else { dir.join("images").join(recipe.name) };
        let layout = recipe.layout(&place).with_context(|| format!("making the image {name}"))?;
        let tag = if name == FLAT { FLAT } else { recipe.name }.to_owned();
        let info = recipe::info(&layout, &tag)?;
        Ok(Self { name: name.to_owned(), dir: own, layout, tag, info, working_set: None })
    }

    /// Bytes in the registry.
    pub(crate) fn size(&self) -> u64 {
        self.info.layers.iter().map(|layer| layer.size).sum()
    }

    /// What the registry calls it.
    pub(crate) fn registry_name(&self, form: Form) -> String {
        format!("bench/{}:{}", self.name, form.tag())
    }

    /// Converts it to a form, unless it was.
    pub(crate) fn convert(&self, form: Form) -> Result<()> {
        let stamp = self.dir.join(format!("{}.of", form.tag()));
        if std::fs::read_to_string(&stamp).is_ok_and(|of| of == self.info.manifest) {
            return Ok(());
        }
        say(format_args!("converting {} ({})", self.name, form.tag()));
        let opens: &[String] = match &self.working_set {
            Some(set) => &set.opens,
            None if form.wants_opens() => bail!("no start of {} was recorded", self.name),
            None => &[],
        };
        let opens = if form.wants_opens() { opens } else { &[] };
        if form.is_soci() {
            self.index_for_soci(form, opens)?
        } else {
            self.convert_to_estargz(form, opens)?
        }
        Ok(std::fs::write(&stamp, &self.info.manifest)?)
    }

    fn convert_to_estargz(&self, form: Form, opens: &[String]) -> Result<()> {
        let mut command = Command::new(bench_tool("millstream-bench-tool").context("the bench's tool is missing")?);
        command.arg("estargz").arg(&self.layout).args([&self.tag, &self.tag_of(form)]);
        if !opens.is_empty() {
            let list = self.dir.join("opens.list");
            std::fs::write(&list, opens.join("\n"))?;
            command.arg(list);
        }
        output(&mut command).map(drop)
    }

    fn index_for_soci(&self, form: Form, opens: &[String]) -> Result<()> {
        // Content is shared by hard links, so all of it lies beside the layout.
        let (source, result) = (self.layout.with_file_name("soci-source"), self.layout_of(form));
        for dir in [&source, &result] {
            match std::fs::remove_dir_all(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
        }
        extract(&self.layout, &self.tag, &source)?;
        let mut command = Command::new(bench_tool("soci").context("soci is missing")?);
        command.arg("--root").arg(self.dir.join("soci-state")).args(["convert", "--standalone", "--format", "oci-dir"]);
        if !opens.is_empty() {
            let list = self.dir.join("opens.json");
            std::fs::write(&list, serde_json::to_vec(opens)?)?;
            command.arg("--prefetch-files-json").arg(list);
        }
        output(command.arg(&source).arg(&result))?;
        Ok(std::fs::remove_dir_all(&source)?)
    }

    fn layout_of(&self, form: Form) -> PathBuf {
        if form.is_soci() {
            self.layout.with_file_name(format!("{}-{}", self.tag, form.tag()))
        } else {
            self.layout.clone()
        }
    }

    /// Whether the layout has it in this form.
    pub(crate) fn has(&self, form: Form) -> bool {
        manifest_of(&self.layout_of(form), &self.tag_of(form)).is_ok()
    }

    fn tag_of(&self, form: Form) -> String {
        match form {
            Form::Plain => self.tag.clone(),
            Form::Soci | Form::SociPrefetch => String::new(),
            Form::Estargz | Form::Optimized => format!("{}-{}", self.tag, form.tag()),
        }
    }

    /// What the registry is to have of it.
    pub(crate) fn offered(&self, forms: &[Form]) -> Vec<Offered> {
        let own = forms
            .iter()
            .map(|form| Offered::new(&self.layout_of(*form), &self.tag_of(*form), &self.registry_name(*form)));
        own.chain([Offered::new(&self.layout, PAUSE, PAUSE_NAME)]).collect()
    }
}
