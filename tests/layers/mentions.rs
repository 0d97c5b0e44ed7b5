//! Files that others name, fetched before they are read.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_fs::foresight::mentions::{Follower, Reach};
use soci_fs::fuse::image::Image;
use soci_fs::layer::reader::LayerReader;
use soci_fs::layer::source::memory::MemorySource;
use soci_fs::layer::source::{Chunks, Source, SourceError};
use soci_fs::layer::store::Store;
use soci_tests::reading::{Layer, files_tar, noise, plain_policy};
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};

const SPAN: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(20);

/// Goes on for as long as a test may take.
fn patient() -> Reach {
    Reach { quiet: 2 * PATIENCE, ..Reach::default() }
}

/// A layer of files, in their order; a plain one, so that a span is as large as its bytes.
fn layer(files: &[(String, Vec<u8>)]) -> Layer {
    Layer::plain(files_tar(files.iter().cloned()), SPAN)
}

fn module(name: &str, imports: &str, bytes: usize) -> (String, Vec<u8>) {
    let mut content = format!("{imports}\nTEXT = '''").into_bytes();
    content.extend(noise(name.len() as u64 + bytes as u64, bytes));
    (name.to_owned(), content)
}

fn other(number: usize) -> (String, Vec<u8>) {
    (format!("srv/file{number}"), noise(number as u64, 300_000))
}

fn entry(reader: &LayerReader, name: &str) -> u32 {
    let found = reader.index().entries.iter().position(|entry| *entry.name == *name.as_bytes());
    u32::try_from(found.unwrap()).unwrap()
}

/// Whether all of a file is here.
fn is_here(reader: &LayerReader, name: &str) -> bool {
    let entry = &reader.index().entries[entry(reader, name) as usize];
    let bytes = entry.header_offset..entry.data_offset + entry.size;
    reader.index().spans.covering(bytes).all(|span| reader.store().is_present(span))
}

async fn until(what: &str, is_done: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < PATIENCE, "{what}: not in time");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The chain of imports is walked over two layers, from what was read; nothing else is fetched.
#[tokio::test]
async fn what_is_named_is_fetched() {
    let lower = layer(&[
        module("usr/lib/python3.11/os.py", "", 100_000),
        other(0),
        module("usr/lib/python3.11/json/__init__.py", "from . import decoder", 1000),
        other(1),
        module("usr/lib/python3.11/json/decoder.py", "", 100_000),
        other(2),
        module("usr/lib/python3.11/unused.py", "", 100_000),
        other(3),
    ]);
    let upper = layer(&[
        other(4),
        module("opt/app/main.py", "import os\nfrom app import part", 1000),
        other(5),
        module("opt/app/__init__.py", "", 10),
        other(6),
        module("opt/app/part.py", "import json", 1000),
        other(7),
    ]);
    for follows in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let readers: Vec<LayerReader> =
            [&lower, &upper].iter().map(|layer| layer.reader(&store, layer.memory(), plain_policy())).collect();
        let [below, above] = &readers[..] else { unreachable!() };
        let image = Image::new(readers.clone()).unwrap();
        let follower = follows.then(|| Follower::start(image.names(), readers.clone(), patient(), &Handle::current()));
        // A file of Python's own, by which its directory becomes known.
        below.read_file(entry(below, "usr/lib/python3.11/os.py"), 0, 100).await.unwrap();
        above.read_file(entry(above, "opt/app/main.py"), 0, 100).await.unwrap();
        if follows {
            until("a sibling", || is_here(above, "opt/app/part.py")).await;
            // The sibling is no more than named: what it may mean by one word waits until it is read.
            above.read_file(entry(above, "opt/app/part.py"), 0, 100).await.unwrap();
            until("another package", || is_here(below, "usr/lib/python3.11/json/decoder.py")).await;
            assert!(is_here(below, "usr/lib/python3.11/json/__init__.py"));
        } else {
            sleep(Duration::from_millis(200)).await;
            assert!(!is_here(above, "opt/app/part.py"));
        }
        assert!(!is_here(below, "usr/lib/python3.11/unused.py"));
        assert!((0..4).all(|number| !is_here(below, &format!("srv/file{number}"))));
        assert!((4..8).all(|number| !is_here(above, &format!("srv/file{number}"))));
        let counts = below.ahead().counts();
        assert_eq!(counts.foreseen > 0, follows, "{counts:?}");
        drop(follower);
    }
}

/// A file that names much: fetched as far as the credit goes, and on as what was fetched is read.
#[tokio::test]
async fn what_may_be_wrong_is_bounded() {
    const CREDIT: u64 = 4 << 20;
    let count = 160;
    let imports: String = (0..count).map(|number| format!("import m{number}\n")).collect();
    let mut files = vec![module("lib/main.py", &imports, 10)];
    files.extend((0..count).map(|number| module(&format!("lib/m{number}.py"), "", 128 << 10)));
    let layer = layer(&files);
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let reader = layer.reader(&store, layer.memory(), plain_policy());
    let image = Image::new(vec![reader.clone()]).unwrap();
    let _follower = Follower::start(image.names(), vec![reader.clone()], patient(), &Handle::current());
    reader.read_file(entry(&reader, "lib/main.py"), 0, 100).await.unwrap();
    let settled = async || {
        let mut before = 0;
        let start = Instant::now();
        loop {
            sleep(Duration::from_millis(200)).await;
            let now = reader.counts().fetched_bytes;
            if now == before {
                return now;
            }
            assert!(start.elapsed() < PATIENCE, "it goes on and on");
            before = now;
        }
    };
    let first = settled().await;
    assert!((CREDIT..CREDIT + (2 << 20)).contains(&first), "{first}");
    assert_eq!(patient().credit_bytes, CREDIT);
    for number in 0..30 {
        reader.read_file(entry(&reader, &format!("lib/m{number}.py")), 0, 128 << 10).await.unwrap();
    }
    let second = settled().await;
    assert!(second > first + (2 << 20) && second < CREDIT + (12 << 20), "{first} {second}");
    let counts = reader.ahead().counts();
    assert!(counts.foreseen_unread > 0 && counts.foreseen > counts.foreseen_unread, "{counts:?}");
}

/// A source whose answers take a while.
#[derive(Debug)]
struct Slow(Arc<MemorySource>);

const ANSWER: Duration = Duration::from_millis(800);

impl Source for Slow {
    fn read(&self, range: Range<u64>) -> BoxFuture<'_, Result<Chunks, SourceError>> {
        async move {
            sleep(ANSWER).await;
            self.0.read(range).await
        }
        .boxed()
    }
}

/// A chain of imports: what takes longer than a program is quiet waits until it reads on.
#[tokio::test]
async fn nothing_is_begun_for_a_program_that_is_quiet() {
    let chain = 4;
    let import = |number: usize| format!("import m{}", number + 1);
    let mut files: Vec<_> =
        (0..chain).map(|number| module(&format!("lib/m{number}.py"), &import(number), 100_000)).collect();
    files.extend((0..chain).map(other));
    let layer = layer(&files);
    for (quiet, is_all) in [(ANSWER / 2, false), (2 * PATIENCE, true)] {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let reader = layer.reader(&store, Arc::new(Slow(layer.memory())), plain_policy());
        let image = Image::new(vec![reader.clone()]).unwrap();
        let reach = Reach { quiet, ..Reach::default() };
        let _follower = Follower::start(image.names(), vec![reader.clone()], reach, &Handle::current());
        reader.read_file(entry(&reader, "lib/m0.py"), 0, 100_000).await.unwrap();
        // It was waited for just now, however long that took.
        until("what was read names it", || is_here(&reader, "lib/m1.py")).await;
        if is_all {
            until("the end of the chain", || is_here(&reader, "lib/m3.py")).await;
            continue;
        }
        sleep(4 * ANSWER).await;
        assert!(!is_here(&reader, "lib/m3.py"));
        reader.read_file(entry(&reader, "srv/file0"), 0, 100).await.unwrap();
        until("the program goes on", || is_here(&reader, "lib/m2.py")).await;
    }
}

/// Files that all name each other, thousands of them: programs are served meanwhile, and afterwards.
#[tokio::test]
async fn a_layer_that_names_everything() {
    let count = 3000;
    let imports: String = (0..count).map(|number| format!("import m{number}\n")).collect();
    let files: Vec<(String, Vec<u8>)> =
        (0..count).map(|number| (format!("lib/m{number}.py"), imports.clone().into_bytes())).collect();
    let layer = Layer::gzip(files_tar(files), SPAN);
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let reader = layer.reader(&store, layer.memory(), plain_policy());
    let image = Image::new(vec![reader.clone()]).unwrap();
    let follower = Follower::start(image.names(), vec![reader.clone()], patient(), &Handle::current());
    reader.read_file(entry(&reader, "lib/m0.py"), 0, 100).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    assert_eq!(reader.read_file(entry(&reader, "lib/m2999.py"), 0, 9).await.unwrap(), b"import m0");
    drop(follower);
    assert_eq!(reader.read_file(entry(&reader, "lib/m1500.py"), 0, 9).await.unwrap(), b"import m0");
}
