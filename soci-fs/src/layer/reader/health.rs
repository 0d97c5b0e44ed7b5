//! Whether a layer may be read: condemned for good, suspended until its proof comes, or in service; and what becomes of
//! what the kernel has cached of it when it turns out to be wrong.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use soci_index::format::digest::Digest;
use soci_index::format::span::SpanId;
use tokio::runtime::Handle;

use crate::layer::reader::error::{Cause, ReadError};
use crate::layer::store::LayerStore;

/// Forgets what the kernel has cached of a layer. Called on a thread that may block, never from a FUSE request.
type Forget = Arc<dyn Fn() + Send + Sync>;

/// Where a layer stands.
pub struct Health {
    digest: Digest,
    /// Where verdicts are kept.
    store: Arc<LayerStore>,
    /// Where the kernel's caches are dropped.
    runtime: Handle,
    /// Why the claim is condemned.
    condemned: OnceLock<Cause>,
    /// Why it is out of service until it is proven.
    suspended: Mutex<Option<String>>,
    /// Whether either is set: all that a read looks at.
    is_out: AtomicBool,
    /// Reads that failed.
    failures: AtomicU64,
    last_error: Mutex<Option<String>>,
    forget: Mutex<Vec<Forget>>,
    /// The pack whose pages may be shown, once it is expected.
    pack: Mutex<Option<Digest>>,
    is_pack_condemned: AtomicBool,
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health")
            .field("condemned", &self.condemned)
            .field("suspended", &self.suspended)
            .finish_non_exhaustive()
    }
}

impl Health {
    pub(super) fn new(digest: Digest, store: Arc<LayerStore>, runtime: Handle) -> Self {
        Self {
            digest,
            store,
            runtime,
            condemned: OnceLock::new(),
            suspended: Mutex::default(),
            is_out: AtomicBool::new(false),
            failures: AtomicU64::new(0),
            last_error: Mutex::default(),
            forget: Mutex::default(),
            pack: Mutex::default(),
            is_pack_condemned: AtomicBool::new(false),
        }
    }

    pub(super) const fn digest(&self) -> Digest {
        self.digest
    }

    pub(super) const fn store(&self) -> &Arc<LayerStore> {
        &self.store
    }

    /// The latest failure, in words.
    #[must_use]
    pub fn last_error(&self) -> Option<String> {
        self.last_error.lock().clone()
    }

    /// Why the claim is condemned, if it is.
    #[must_use]
    pub fn condemned(&self) -> Option<&Cause> {
        self.condemned.get()
    }

    /// That the layer is in service.
    ///
    /// # Errors
    /// Why nothing of it may be shown, be it bytes or names.
    pub(crate) fn check_service(&self) -> Result<(), ReadError> {
        let out = self.out_of_service();
        out.map_or(Ok(()), |cause| Err(ReadError { layer: self.digest, span: None, offset: 0, file: None, cause }))
    }

    /// Condemns the claim: all reads fail from now on, in this process and later ones.
    pub fn condemn(&self, what: String) {
        self.condemn_for(Cause::Condemned { what });
    }

    /// Why the layer is out of service until it is proven, if it is.
    #[must_use]
    pub fn suspended(&self) -> Option<String> {
        self.suspended.lock().clone()
    }

    /// Takes the layer out of service until [`Health::resume`]: its proof is being withheld.
    pub fn suspend(&self, why: String) {
        if self.suspended.lock().replace(why.clone()).is_none() {
            self.is_out.store(true, Ordering::Release);
            tracing::error!(layer = %self.digest, why, "a layer that cannot be proven is suspended: reads of it fail");
            self.forget_cached();
        }
    }

    /// Puts a suspended layer back into service.
    pub fn resume(&self) {
        if self.suspended.lock().take().is_some() {
            self.is_out.store(self.condemned.get().is_some(), Ordering::Release);
            tracing::info!(layer = %self.digest, "a suspended layer is proven and in service again");
        }
    }

    /// Registers what drops the kernel's caches of the layer, when what it was given turns out to be wrong.
    pub(crate) fn on_distrust(&self, forget: Forget) {
        self.forget.lock().push(forget);
    }

    /// Expects pages from a pack. `false` if it is not the claim's own, or was condemned.
    pub(crate) fn takes_pack(&self, pack: Digest) -> bool {
        let takes = self.store.claim().pack == Some(pack) && !self.is_pack_condemned.load(Ordering::Acquire);
        if takes {
            *self.pack.lock() = Some(pack);
        }
        takes
    }

    /// The pack whose pages may be shown; none once it was condemned.
    pub(crate) fn pack(&self) -> Option<Digest> {
        *self.pack.lock()
    }

    pub(super) fn condemn_for(&self, cause: Cause) {
        if self.condemned.set(cause.clone()).is_err() {
            return;
        }
        self.is_out.store(true, Ordering::Release);
        tracing::error!(layer = %self.digest, claim = %self.store.claim(), %cause, "a claim is condemned; its layer is out of service");
        *self.last_error.lock() = Some(cause.to_string());
        if let Err(error) = self.store.condemn(&cause.to_string()) {
            tracing::error!(layer = %self.digest, %error, "the verdict is not on disk: after a restart it has to be found again");
        }
        self.forget_cached();
    }

    /// A page that a pack brought is not what the layer has: nothing that it brought is believed any more.
    pub(super) fn condemn_pack(&self, offset: u64) {
        self.is_pack_condemned.store(true, Ordering::Release);
        if let Err(error) = self.store.forget_parts() {
            tracing::error!(layer = %self.digest, %error, "what a condemned pack has brought stays recorded");
        }
        let Some(pack) = self.pack.lock().take() else { return };
        let reason = format!("its page at byte {offset} of layer {} is not what the layer has", self.digest);
        tracing::error!(layer = %self.digest, %pack, reason, "a start-up pack is condemned");
        if let Err(error) = self.store.condemn_pack(pack, &reason) {
            tracing::error!(%pack, %error, "the verdict is not on disk: after a restart it has to be found again");
        }
        *self.last_error.lock() = Some(format!("pack {pack} is condemned: {reason}"));
        self.forget_cached();
    }

    /// Drops what the kernel has cached, in a task of its own: a request of the kernel may be what found it out.
    fn forget_cached(&self) {
        for forget in self.forget.lock().clone() {
            self.runtime.spawn_blocking(move || forget());
        }
    }

    /// Why no byte of the layer may be shown, if so.
    pub(super) fn out_of_service(&self) -> Option<Cause> {
        if !self.is_out.load(Ordering::Acquire) {
            return None;
        }
        let suspended = || self.suspended.lock().clone().map(|why| Cause::Suspended { why });
        self.condemned.get().cloned().or_else(suspended)
    }

    /// That a read may go on.
    ///
    /// # Errors
    /// As [`Health::check_service`]; it counts as a failure.
    pub(super) fn in_service(&self, offset: u64) -> Result<(), ReadError> {
        self.out_of_service().map_or(Ok(()), |cause| Err(self.failed(None, offset, cause)))
    }

    /// Counts and keeps a failure.
    pub(super) fn failed(&self, span: Option<SpanId>, offset: u64, cause: Cause) -> ReadError {
        let error = ReadError { layer: self.digest, span, offset, file: None, cause };
        self.failures.fetch_add(1, Ordering::Relaxed);
        *self.last_error.lock() = Some(error.to_string());
        error
    }

    pub(super) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }
}
