//! Leases: what is made under one is not collected until it is over.
//!
//! The holder of a lease deletes it; one that is left behind by a killed process expires.

use std::time::Duration;

use soci_index::clock;
use soci_index::format::digest::Digest;
use soci_index::format::ztoc::rfc3339;

use crate::node::grpc::containerd::{Containerd, ContainerdError, Labels, name};
use crate::node::grpc::generated::client as wire;

/// How long what an interrupted run has made is kept.
const LEASE_LIFE: Duration = Duration::from_secs(24 * 3600);

/// A lease, and the connection by which things are made under it.
#[derive(Debug, Clone)]
pub struct Lease {
    id: String,
    containerd: Containerd,
}

impl Lease {
    /// Makes a lease that says what it is for.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn begin(containerd: &Containerd, purpose: &str) -> Result<Self, ContainerdError> {
        let id = format!("soci-{purpose}-{}-{:x}", std::process::id(), unique());
        let question = wire::LeaseRequest { id: id.clone(), labels: expiring() };
        let () = containerd.ask("/containerd.services.leases.v1.Leases/Create", "make a lease", question).await?;
        let containerd = Containerd { lease: Some(name(&id)?), ..containerd.clone() };
        Ok(Self { id, containerd })
    }

    /// The same, with uploads of its own: two runs that upload the same content at the same time do not meet, and one
    /// that is repeated begins anew.
    #[must_use]
    pub fn with_own_uploads(mut self) -> Self {
        self.containerd.uploads.clone_from(&self.id);
        self
    }

    /// containerd, with all that is made belonging to the lease.
    #[must_use]
    pub const fn containerd(&self) -> &Containerd {
        &self.containerd
    }

    /// Adds content, which need not be there yet.
    ///
    /// # Errors
    /// [`ContainerdError`].
    pub async fn add_content(&self, digest: &Digest) -> Result<(), ContainerdError> {
        let resource = wire::LeaseResource { id: digest.to_string(), kind: "content".to_owned() };
        let question = wire::AddResourceRequest { id: self.id.clone(), resource: Some(resource) };
        let path = "/containerd.services.leases.v1.Leases/AddResource";
        self.containerd.ask(path, &format!("keep {digest}"), question).await
    }

    /// Ends the lease: what only it has kept is garbage from now on.
    ///
    /// # Errors
    /// [`ContainerdError`]. It is over in some hours all the same.
    pub async fn end(&self) -> Result<(), ContainerdError> {
        let question = wire::LeaseRequest { id: self.id.clone(), labels: Labels::new() };
        self.containerd.ask("/containerd.services.leases.v1.Leases/Delete", "end a lease", question).await
    }
}

/// A label by which containerd expires a lease.
fn expiring() -> Labels {
    let until = rfc3339::format(clock::timestamp(Duration::from_secs(clock::seconds()) + LEASE_LIFE));
    Labels::from([("containerd.io/gc.expire".to_owned(), until)])
}

/// A number that nothing else made by this process has.
fn unique() -> u128 {
    clock::since_epoch().as_nanos()
}
