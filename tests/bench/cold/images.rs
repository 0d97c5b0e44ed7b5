//! The images that are started, in a registry on this machine.
//!
//! Layers are made by `image.sh` and kept below `target/cold`, as is the registry's content: only what our own tools
//! write is written anew in each run.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use bytes::Bytes;
use soci_tests::image;
use soci_tests::registry::{DockerRegistry, client};

use super::machine::{Kind, Programs};
use crate::process::{output, soci};

/// An image.
#[derive(Debug)]
pub(crate) struct Image {
    /// Its repository.
    pub(crate) name: &'static str,
    /// Names of its layers, lowest first.
    pub(crate) layers: &'static [&'static str],
}

/// Where they are kept.
#[derive(Debug)]
pub(crate) struct Shelf {
    directory: PathBuf,
    /// The registry.
    pub(crate) registry: DockerRegistry,
}

impl Shelf {
    /// The one of this checkout; `None`, with a word on standard error, where there is no registry or nothing to make
    /// images with.
    pub(crate) fn open() -> anyhow::Result<Option<Self>> {
        let tools = ["debootstrap", "pip"];
        let has = |tool: &&str| Command::new(tool).arg("--version").output().is_ok();
        if let Some(tool) = tools.iter().find(|tool| !has(tool)) {
            eprintln!("SKIPPED: images for cold starts need {tool}");
            return Ok(None);
        }
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cold");
        std::fs::create_dir_all(directory.join("registry"))?;
        let directory = directory.canonicalize()?;
        let Some(registry) = DockerRegistry::start_keeping(&directory.join("registry")) else { return Ok(None) };
        Ok(Some(Self { directory, registry }))
    }

    /// The image's name, with a tag.
    pub(crate) fn name(&self, image: &Image, tag: &str) -> String {
        format!("{}/cold/{}:{tag}", self.registry.address, image.name)
    }

    /// The name that a snapshotter starts the image by. Profiles stand beside copies in repositories of their own, one for
    /// each workload.
    pub(crate) fn name_for(&self, image: &Image, kind: Kind, workload: &str) -> String {
        let of = |what: &str| format!("{}/cold/{}-{workload}-{what}:latest", self.registry.address, image.name);
        match kind {
            Kind::Profile => of("profile"),
            Kind::Pack | Kind::FusePack => of("pack"),
            Kind::Overlayfs | Kind::Aws | Kind::Stargz | Kind::Soci | Kind::Fuse => self.name(image, kind.tag()),
        }
    }

    /// The image without any index: its repository, in which nothing is ever published, and which it is pushed to if need
    /// be.
    pub(crate) async fn plain(&self, image: &Image) -> anyhow::Result<String> {
        let repository = format!("cold/{}-plain", image.name);
        self.copy(image, &repository).await?;
        Ok(repository)
    }

    /// Pushes the image to another repository, once.
    async fn copy(&self, image: &Image, repository: &str) -> anyhow::Result<()> {
        let done = self.directory.join(format!("{}.pushed", repository.replace('/', "-")));
        if !done.exists() {
            self.read(image)?.push(&client(&self.registry.address).repository(repository), "latest").await;
            std::fs::write(done, Bytes::new())?;
        }
        Ok(())
    }

    /// Copies the image to where its profile is to be, records a start there, and publishes its profile.
    pub(crate) async fn record(&self, image: &Image, kind: Kind, workload: &str, command: &str) -> anyhow::Result<()> {
        let (name, root) = (self.name_for(image, kind, workload), tempfile::tempdir()?);
        let repository = name.rsplit_once(':').and_then(|(name, _)| name.split_once('/')).context("a name")?.1;
        self.copy(image, repository).await?;
        output(soci(root.path())?.args(["publish", &name]))?;
        let file = root.path().join("start.profile");
        let words = ["record", &name, "-o"];
        output(soci(root.path())?.args(words).arg(&file).args(["--", "sh", "-c", command]))?;
        let mut push = soci(root.path())?;
        push.args(["profile", "push", &name]).arg(&file).arg("--default");
        if kind == Kind::Pack {
            push.arg("--pack");
        }
        output(&mut push)?;
        Ok(())
    }

    /// The image, from its layers.
    fn read(&self, image: &Image) -> anyhow::Result<image::Image> {
        let mut layers = Vec::new();
        for name in image.layers {
            let file = self.directory.join(format!("{name}.tar.gz"));
            let blob = std::fs::read(&file).with_context(|| format!("reading {}", file.display()))?;
            let mut tar = Vec::new();
            std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&blob[..]), &mut tar)?;
            layers.push((image::GZIP, blob, tar));
        }
        Ok(image::Image::new(layers))
    }

    /// Makes the image's layers, those that are not here.
    fn make(&self, image: &Image) -> anyhow::Result<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/cold/image.sh");
        eprintln!("  making the image {}", image.name);
        output(Command::new("bash").arg(script).arg(&self.directory).args(image.layers))?;
        Ok(())
    }

    /// Makes an image if need be, and publishes what each snapshotter reads.
    pub(crate) async fn publish(&self, image: &Image, programs: &Programs) -> anyhow::Result<()> {
        self.make(image)?;
        let done = self.directory.join(format!("{}.pushed", image.name));
        if !done.exists() {
            let pushed = self.read(image)?;
            let repository = client(&self.registry.address).repository(&format!("cold/{}", image.name));
            pushed.push(&repository, "latest").await;
            output(Command::new(&programs.stargz).args(["convert", &self.name(image, "latest"), "esgz"]))?;
            std::fs::write(done, Bytes::new())?;
        }
        let root = tempfile::tempdir()?;
        output(soci(root.path())?.args(["publish", &self.name(image, "latest")]))?;
        let with_index = self.name(image, "v2");
        output(soci(root.path())?.args(["publish", "--v2", "--as", &with_index, &self.name(image, "latest")]))?;
        Ok(())
    }
}
