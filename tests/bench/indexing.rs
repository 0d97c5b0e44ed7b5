//! Indexing: a layer from a file, an image in a registry.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use soci_index::format::model::{Descriptor, media_type};
use soci_index::image::layout::Layout;

use crate::data::{Data, Pushed};
use crate::process::{measured, output, soci};
use crate::report::{Goal, Report};

/// How many times the long layer repeats the other.
const REPEATS: usize = 4;

/// `soci ztoc create` against the fastest inflater there is.
pub(crate) fn ztoc(data: &Data, report: &mut Report) -> anyhow::Result<()> {
    let layer = data.layer();
    let megabytes = |path| std::fs::metadata(path).map(|metadata| metadata.len() / 1_000_000);
    let size = format!("{} MB layer ({} MB gzip)", megabytes(layer.with_extension(""))?, megabytes(layer.clone())?);
    let create = |layer: &std::path::Path| -> anyhow::Result<_> {
        let mut command = soci(&data.path("root"))?;
        measured(command.args(["ztoc", "create"]).arg(layer).arg("-o").arg(data.path("ztoc")))
    };
    let inflaters = [("igzip", Goal::AtMost(1.4)), ("gzip", Goal::None)];
    let inflaters = inflaters.into_iter().filter(|(program, _)| {
        let there = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
        if !there {
            eprintln!("SKIPPED: {program} is not installed (igzip is in the Debian package isal)");
        }
        there
    });
    let mut peaks = Vec::new();
    for (inflater, goal) in inflaters {
        let (mut ratios, mut cores) = (Vec::new(), Vec::new());
        for _ in 0..if data.quick { 3 } else { 7 } {
            let other = measured(Command::new(inflater).arg("-dc").arg(&layer))?;
            let ours = create(&layer)?;
            ratios.push(ours.wall.as_secs_f64() / other.wall.as_secs_f64());
            cores.push(ours.processor.as_secs_f64() / ours.wall.as_secs_f64());
            peaks.push(ours.peak_mib);
        }
        report.add(format!("`ztoc create`, {size}: time, in units of `{inflater} -dc`"), goal, "", ratios);
        if inflater == "igzip" {
            report.add("`ztoc create`: processor time / time", Goal::None, "", cores);
        }
    }
    report.add(format!("`ztoc create`, {size}: peak memory"), Goal::AtMost(64.0), "MiB", peaks);
    if !data.quick {
        for (what, goal, nested) in
            [("as many files", Goal::AtMost(64.0), true), ("four times the files", Goal::None, false)]
        {
            let (long, bytes) = long_layer(data, nested)?;
            let peaks = (0..3).map(|_| Ok(create(&long)?.peak_mib)).collect::<anyhow::Result<Vec<_>>>()?;
            let what = format!("`ztoc create`, {} MB layer, {what}: peak memory", bytes / 1_000_000);
            report.add(what, goal, "MiB", peaks);
            std::fs::remove_file(long)?;
        }
    }
    Ok(())
}

/// A layer of several times the bytes, and its length: the files once more each time, or (`nested`) all of them once
/// and then the archive itself as the content of further files.
fn long_layer(data: &Data, nested: bool) -> anyhow::Result<(PathBuf, u64)> {
    // Members of a gzip file may follow one another. What follows the end of a tar is padding, so the archives go
    // without theirs until the last.
    let (body, packed, long) = (data.path("body.tar"), data.path("body.tar.gz"), data.path("long.tar.gz"));
    if !packed.exists() {
        std::fs::copy(data.layer().with_extension(""), &body)?;
        let file = File::options().write(true).open(&body)?;
        file.set_len(file.metadata()?.len() - 1024)?;
        output(Command::new("gzip").arg("-6kf").arg(&body))?;
    }
    let length = std::fs::metadata(&body)?.len();
    let mut out = File::create(&long)?;
    for number in 0..REPEATS {
        if nested && number > 0 {
            let mut header = tar::Header::new_gnu();
            header.set_path(format!("again{number}"))?;
            header.set_mode(0o644);
            header.set_size(length);
            header.set_cksum();
            out.write_all(&soci_tests::image::gzip(header.as_bytes(), 6))?;
        }
        std::io::copy(&mut File::open(&packed)?, &mut out)?;
    }
    out.write_all(&soci_tests::image::gzip(&[0; 1024], 6))?;
    Ok((long, length * REPEATS as u64))
}

/// `soci publish` of an image without an index, against AWS's library, which builds the same zTOCs and index from
/// a directory into a directory; and of one that is indexed already.
pub(crate) fn publish(data: &Data, image: &Pushed, report: &mut Report) -> anyhow::Result<()> {
    let (mut cores, mut peaks, mut times, mut ratios) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut theirs, mut their_peaks, mut again) = (Vec::new(), Vec::new(), Vec::new());
    let (mut of_both, mut peaks_of_both) = (Vec::new(), Vec::new());
    let peer = soci_tests::go::peer().map(|program| Ok::<_, anyhow::Error>((program, layout(data)?))).transpose()?;
    for round in 0..if data.quick { 3 } else { 5 } {
        let publish = |more: &[&str]| -> anyhow::Result<_> {
            let mut command = soci(&data.path("root"))?;
            measured(command.args(["publish", &image.name, "--min-layer-size", "1000000"]).args(more))
        };
        let usage = publish(&["--force", "--format", "aws"])?;
        let both = publish(&["--force"])?;
        of_both.push(both.wall.as_secs_f64() / usage.wall.as_secs_f64());
        peaks_of_both.push(both.peak_mib);
        // One after another on one core, without hashing and without a registry.
        let mut inflating = 0.0;
        for number in 0..3 {
            let file = data.path(&format!("layer{number}.tar.gz"));
            inflating += measured(Command::new("gzip").arg("-dc").arg(file))?.wall.as_secs_f64();
        }
        if let Some((program, layout)) = &peer {
            // What it wrote the last time it would find this time.
            let copy = data.path(&format!("layout{round}"));
            output(Command::new("cp").arg("-rl").args([layout, &copy]))?;
            // This file it writes in place.
            let index = copy.join("index.json");
            std::fs::remove_file(&index)?;
            std::fs::copy(layout.join("index.json"), &index)?;
            let mut command = Command::new(program);
            let other = measured(command.arg("create").arg(&copy).args(["--min-layer-size", "1000000"]))?;
            std::fs::remove_dir_all(&copy)?;
            theirs.push(usage.wall.as_secs_f64() / other.wall.as_secs_f64());
            their_peaks.push(other.peak_mib);
        }
        cores.push(usage.processor.as_secs_f64() / usage.wall.as_secs_f64());
        peaks.push(usage.peak_mib);
        times.push(usage.wall.as_secs_f64());
        ratios.push(usage.wall.as_secs_f64() / inflating);
        again.push(publish(&[])?.wall.as_secs_f64() * 1000.0);
    }
    report.add(
        "`publish --format aws`, three layers: time, in units of AWS's library's build",
        Goal::AtMost(0.25),
        "",
        theirs,
    );
    report.add("`publish`, three layers: processor time / time", Goal::AtLeast(1.5), "", cores);
    report.add("`publish`, three layers: peak memory", Goal::AtMost(128.0), "MiB", peaks);
    let what = "`publish` of both forms of an index";
    report.add(format!("{what}: time, in units of AWS's form alone"), Goal::None, "", of_both);
    report.add(format!("{what}: peak memory"), Goal::AtMost(128.0), "MiB", peaks_of_both);
    report.add("AWS's library, the same layers: peak memory", Goal::None, "MiB", their_peaks);
    report.add("`publish`, three layers: time", Goal::None, "s", times);
    report.add("`publish`, three layers: time, in units of `gzip -dc` of all", Goal::None, "", ratios);
    report.add("`publish` of what is published: time", Goal::None, "ms", again);
    Ok(())
}

/// The image as a layout.
fn layout(data: &Data) -> anyhow::Result<PathBuf> {
    let directory = data.path("layout");
    let layout = Layout::open_or_create(&directory)?;
    let mut writer = layout.lock()?;
    let image = data.image()?;
    for blob in &image.blobs {
        writer.add_blob(blob)?;
    }
    writer.add_manifest(Descriptor::of(media_type::MANIFEST, b""), &image.manifest)?;
    Ok(directory)
}
