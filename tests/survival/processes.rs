//! What the program of `survival.rs` is when it is started again: the supervisor, or a worker.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use soci_fs::fuse::error::OpenError;
use soci_fs::fuse::forest::{Forest, ForestOptions, Opener};
use soci_fs::fuse::mount::device::{self, DeviceOptions, ServeOptions};
use soci_fs::layer::reader::{LayerReader, Policy};
use soci_fs::layer::source::faulty::{Fault, FaultySource};
use soci_fs::layer::store::Store;
use soci_fs::node::supervisor::{Address, Inherited, SupervisorOptions, run};
use soci_index::format::digest::Digest;
use soci_index::format::index::Compression;

use super::{LAYERS, SOURCE_DELAY};
use soci_tests::reading::Layer;

#[derive(Debug)]
struct Shelf {
    directory: PathBuf,
    store: Store,
    runtime: tokio::runtime::Handle,
}

impl Opener for Shelf {
    fn open(&self, slot: u16, digest: Digest) -> BoxFuture<'_, Result<LayerReader, OpenError>> {
        async move {
            let read = fs::read(self.directory.join(format!("{slot}.tar")));
            let blob = read.map_err(|cause| OpenError::Failed { digest, cause: Arc::new(cause) })?;
            let layer = Layer::from_blob(blob, Compression::None, 64 << 10);
            let source = FaultySource::and_then_always(layer.memory(), [], Fault::Delay(SOURCE_DELAY));
            Ok(layer.reader_on(&self.store, Arc::new(source), Policy::default(), &self.runtime))
        }
        .boxed()
    }
}

/// A process that serves the layers.
pub(crate) fn worker(directory: &Path) -> ExitCode {
    let Inherited { kept, listener, supervisor, memory: _ } = match Inherited::receive() {
        Ok(inherited) => inherited,
        Err(error) => {
            eprintln!("worker: {error}");
            return ExitCode::FAILURE;
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let pid = std::process::id();
    // An empty store for each, so that every worker has to fetch everything again.
    let store = Store::open(&directory.join(format!("store-{pid}"))).unwrap();
    let shelf = Shelf { directory: directory.to_owned(), store, runtime: runtime.handle().clone() };
    let forest = Arc::new(Forest::new(ForestOptions { opener: Some(Arc::new(shelf)), ..ForestOptions::default() }));
    for slot in 1..=LAYERS {
        let digest = fs::read_to_string(directory.join(format!("{slot}.digest"))).unwrap();
        forest.expect(slot, digest.parse().unwrap()).unwrap();
    }
    let serving = device::serve(forest, kept, &ServeOptions::default(), runtime.handle().clone()).unwrap();
    let written = directory.join(format!("pid-{pid}"));
    fs::write(&written, pid.to_string()).unwrap();
    fs::rename(written, directory.join("pid")).unwrap();
    supervisor.ready().unwrap();
    std::thread::spawn(move || {
        serving.wait().unwrap();
        std::process::exit(0);
    });
    runtime.block_on(async {
        let listener = tokio::net::UnixListener::from_std(listener).unwrap();
        loop {
            let (connection, _) = listener.accept().await.unwrap();
            let _ = connection.writable().await;
            let _ = connection.try_write(pid.to_string().as_bytes());
        }
    })
}

/// The process that starts workers and outlives them.
pub(crate) fn supervisor(directory: &Path) -> ExitCode {
    // As it is on an older kernel.
    let always_relay = directory.join("relay").exists();
    let options = SupervisorOptions {
        program: directory.join("program"),
        arguments: vec!["worker".into(), directory.into()],
        environment: &[],
        mountpoint: directory.join("fs"),
        also_unmount: Vec::new(),
        device: DeviceOptions { subtype: "soci-survival".to_owned(), always_relay, ..DeviceOptions::default() },
        address: Address::Path(directory.join("socket")),
        end_limit: Duration::from_secs(5),
    };
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("supervisor: {error}");
            ExitCode::FAILURE
        }
    }
}
