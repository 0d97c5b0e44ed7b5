//! The handshake that makes containerd skip the download of a layer, and the release of layers.
//!
//! containerd prepares a snapshot to unpack into and names the one that it wants to end up with. If the provider shows
//! that layer, the wanted snapshot is committed under its bare name and the answer is that it exists already;
//! containerd then looks it up by label *and parent* and skips the download. The bare name is shared by all namespaces,
//! but parents are not: where the name is taken by a snapshot on another parent, a second name is used, that of the
//! pair.
//!
//! A layer may be promised to one call while another removes the last snapshot that used it. So layers are released
//! only while no `provide` call is in flight, and only after another look at the database; a concurrent call waits, on
//! a thread that may block. No lock is held while that goes on.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};
use tokio::runtime::Handle;

#[cfg(test)]
mod tests;

use crate::node::snapshots::database::View;
use crate::node::snapshots::labels::{self, REMOTE, REMOTE_VALUE, TARGET};
use crate::node::snapshots::provider::{LayerRequest, Provided};
use crate::node::snapshots::record::{Kind, Lower, Record};
use crate::node::snapshots::{Mount, SnapshotError, Snapshots, non_empty, now, require_committed, require_free};

/// What became of a request to prepare a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prepared {
    /// An active snapshot, to be mounted like this.
    Mounts(Vec<Mount>),
    /// The snapshot that it should have become is there already, under this name.
    Remote { name: String },
}

/// Layers that may have to be released.
#[derive(Debug, Default)]
pub(super) struct Releases {
    /// Calls that are with the provider.
    providing: usize,
    /// Whether layers are being released.
    returning: bool,
    candidates: BTreeSet<u16>,
    /// Whether a mapping of owners may be unused.
    id_maps: bool,
}

/// The same, shared by all calls.
#[derive(Debug, Default)]
pub(super) struct SharedReleases {
    state: Mutex<Releases>,
    /// Notified when layers have been released.
    returned: Condvar,
}

impl Snapshots {
    /// Prepares a snapshot as [`Snapshots::prepare`] does, unless the request names what the snapshot is to become and
    /// the provider has that.
    ///
    /// # Errors
    /// As [`Snapshots::prepare`].
    pub async fn prepare_or_provide(self: Arc<Self>, request: LayerRequest) -> Result<Prepared, SnapshotError> {
        let target = request.labels.get(TARGET).filter(|target| !target.is_empty()).cloned();
        if let Some(target) = target
            && let Some(name) = self.provided(target, &request).await?
        {
            return Ok(Prepared::Remote { name });
        }
        let key = request.key.clone();
        let prepare = move |snapshots: &Self| snapshots.prepare(&request.key, &request.parent, request.labels);
        self.blocking(&key, prepare).await.map(Prepared::Mounts)
    }

    /// The name of the snapshot that a request wants, if it is there or the provider has its layer.
    async fn provided(
        self: &Arc<Self>,
        target: String,
        request: &LayerRequest,
    ) -> Result<Option<String>, SnapshotError> {
        let LayerRequest { key, parent, .. } = request;
        let (wanted, asked) = (target.clone(), request.clone());
        let this = Arc::clone(self);
        let begin = move |snapshots: &Self| match snapshots.existing(&wanted, &asked)? {
            Some(name) => Ok((Some(name), None)),
            None => Ok((None, Some(Providing::begin(this)))),
        };
        let (existing, providing) = self.blocking(key, begin).await?;
        if existing.is_some() {
            return Ok(existing);
        }
        let mut providing = ProvidingHere(providing);
        match self.provider.provide(request).await {
            Provided::Layer { slot, is_whole } => {
                let asked = request.clone();
                let providing = providing.0.take();
                let commit = move |snapshots: &Self| {
                    let result = snapshots.commit_layer(&target, &asked, slot);
                    if let Some(providing) = providing {
                        providing.end(slot);
                    }
                    result
                };
                let name = self.blocking(key, commit).await?;
                if is_whole {
                    tracing::info!(
                        "remote-snapshot-prepared" = "false",
                        "local-snapshot-prepared" = "true",
                        key,
                        parent,
                        "prepared local snapshot"
                    );
                } else {
                    tracing::info!("remote-snapshot-prepared" = "true", key, parent, "prepared remote snapshot");
                }
                Ok(Some(name))
            }
            Provided::Leave { reason } => {
                tracing::info!(
                    "remote-snapshot-prepared" = "false",
                    "defer-snapshot-runtime" = "true",
                    key,
                    parent,
                    reason,
                    "left to containerd"
                );
                Ok(None)
            }
        }
    }

    /// Runs work that blocks on the disk on the blocking pool.
    ///
    /// # Errors
    /// Those of the work, and [`SnapshotError::Abandoned`] if it did not come to its end.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        key: &str,
        work: impl FnOnce(&Self) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, SnapshotError> {
        let snapshots = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&snapshots)).await;
        done.unwrap_or_else(|_| Err(SnapshotError::Abandoned { key: key.to_owned() }))
    }

    /// The committed snapshot that a request wants, if there is one; errors that need no provider come first.
    fn existing(&self, target: &str, request: &LayerRequest) -> Result<Option<String>, SnapshotError> {
        labels::checked(request.labels.clone())?;
        let parent = non_empty(&request.parent);
        self.database.read(|view| {
            require_free(&request.key, view.get(&request.key)?.as_ref())?;
            require_committed(&request.key, parent, |name| view.get(name))?;
            for name in [target.to_owned(), second_name(target, &request.parent)] {
                if view.get(&name)?.is_some_and(|record| is_wanted(&record, target, parent)) {
                    return Ok(Some(name));
                }
            }
            Ok(None)
        })
    }

    /// Commits the snapshot that a request wants, standing on a layer of the provider, and returns its name.
    fn commit_layer(&self, target: &str, request: &LayerRequest, slot: u16) -> Result<String, SnapshotError> {
        let mut given = labels::checked(request.labels.clone())?;
        given.insert(REMOTE.to_owned(), REMOTE_VALUE.to_owned());
        let parent = non_empty(&request.parent);
        self.database.write(|edit| {
            require_committed(target, parent, |name| edit.get(name))?;
            for name in [target.to_owned(), second_name(target, &request.parent)] {
                match edit.get(&name)? {
                    Some(record) if is_wanted(&record, target, parent) => return Ok(name),
                    Some(_) => {}
                    None => {
                        let content = Lower::Layer { slot };
                        let id = edit.next_id()?;
                        edit.put(&name, &Record::new(id, Kind::Committed, parent, content, given.clone(), now()))?;
                        return Ok(name);
                    }
                }
            }
            Err(SnapshotError::Exists { key: second_name(target, &request.parent) })
        })
    }

    /// Records that a layer or a mapping may be unused now, and releases what is. Blocks.
    pub(super) fn release(&self, candidate: Option<u16>, id_map: Option<u8>) {
        {
            let mut releases = self.releases.state.lock();
            releases.candidates.extend(candidate);
            releases.id_maps |= id_map.is_some();
        }
        let Some(mut returning) = Returning::begin(self) else { return };
        while let Some((candidates, id_maps)) = returning.next() {
            returning.later.extend(candidates.into_iter().filter(|slot| !self.give_back(*slot)));
            returning.id_maps_later |= id_maps && !self.give_back_id_maps();
        }
    }

    /// Releases a layer unless it is used; `false` if that cannot be determined.
    fn give_back(&self, slot: u16) -> bool {
        match self.database.read(|view: &View| view.slot_is_used(slot)) {
            Ok(false) => self.provider.release(slot),
            Ok(true) => {}
            Err(error) => {
                tracing::warn!(slot, %error, "cannot determine whether a layer is still used; it is kept until the next cleaning");
                return false;
            }
        }
        true
    }

    fn give_back_id_maps(&self) -> bool {
        let given_back = self.release_id_maps();
        given_back
            .inspect_err(|error| {
                tracing::warn!(%error, "cannot determine which mappings of owners are used; they are kept until later");
            })
            .is_ok()
    }
}

/// Guard: layers are being released, by one thread at a time, and no call goes to the provider until this is dropped.
struct Returning<'s> {
    snapshots: &'s Snapshots,
    is_over: bool,
    /// What could not be determined, for a retry.
    later: BTreeSet<u16>,
    id_maps_later: bool,
}

impl<'s> Returning<'s> {
    /// `None` while a call is with the provider, which releases what it finds at its end, or another thread does it.
    fn begin(snapshots: &'s Snapshots) -> Option<Self> {
        let mut releases = snapshots.releases.state.lock();
        if releases.providing > 0 || releases.returning {
            return None;
        }
        releases.returning = true;
        Some(Self { snapshots, is_over: false, later: BTreeSet::new(), id_maps_later: false })
    }

    /// What came since the last look; it is over when there is nothing.
    fn next(&mut self) -> Option<(BTreeSet<u16>, bool)> {
        let mut releases = self.snapshots.releases.state.lock();
        let found = (std::mem::take(&mut releases.candidates), std::mem::take(&mut releases.id_maps));
        if !found.0.is_empty() || found.1 {
            return Some(found);
        }
        // Under this lock, so that what is added from now on is released by the call that adds it.
        self.end(&mut releases);
        None
    }

    fn end(&mut self, releases: &mut Releases) {
        releases.candidates.append(&mut self.later);
        releases.id_maps |= self.id_maps_later;
        releases.returning = false;
        self.is_over = true;
        self.snapshots.releases.returned.notify_all();
    }
}

impl Drop for Returning<'_> {
    fn drop(&mut self) {
        // After a panic: the waiting calls must not block indefinitely.
        if !self.is_over {
            let snapshots = self.snapshots;
            self.end(&mut snapshots.releases.state.lock());
        }
    }
}

/// A call that is with the provider, until it is dropped. Both block.
pub(super) struct Providing<S: Deref<Target = Snapshots>> {
    snapshots: S,
    slot: Option<u16>,
}

impl<S: Deref<Target = Snapshots>> Providing<S> {
    pub(super) fn begin(snapshots: S) -> Self {
        {
            let mut releases = snapshots.releases.state.lock();
            snapshots.releases.returned.wait_while(&mut releases, |releases| releases.returning);
            releases.providing += 1;
        }
        Self { snapshots, slot: None }
    }

    /// The layer was committed, or was not needed after all: the database knows.
    fn end(mut self, slot: u16) {
        self.slot = Some(slot);
    }
}

impl<S: Deref<Target = Snapshots>> Drop for Providing<S> {
    fn drop(&mut self) {
        self.snapshots.releases.state.lock().providing -= 1;
        self.snapshots.release(self.slot, None);
    }
}

/// The same on a thread that must not block: it ends on one that may.
struct ProvidingHere(Option<Providing<Arc<Snapshots>>>);

impl Drop for ProvidingHere {
    fn drop(&mut self) {
        let Some(providing) = self.0.take() else { return };
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn_blocking(move || drop(providing)));
        }
    }
}

fn is_wanted(record: &Record, target: &str, parent: Option<&str>) -> bool {
    record.kind == Kind::Committed
        && record.parent.as_deref() == parent
        && record.labels.get(TARGET).is_some_and(|name| name == target)
}

fn second_name(target: &str, parent: &str) -> String {
    format!("{target} on {parent}")
}
