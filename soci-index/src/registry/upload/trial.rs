//! Finds out whether a login may push, without pushing: an upload is started and aborted.
//!
//! A token alone is no proof: some registries grant every right that is asked for and refuse later. What is deleted is
//! the upload of our own that was opened just now, by the address that the registry gave for it; nothing else ever is.

use crate::registry::Repository;
use crate::registry::error::RegistryError;
use crate::registry::exchange::Call;
use crate::registry::failover::HostedRepository;
use crate::registry::scopes::Scopes;
use crate::registry::transport::Method;
use crate::registry::upload::location;

/// What became of an upload that was begun only to see whether that is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    /// It is gone.
    Cancelled,
    /// The registry does not cancel it. It is empty, and registries forget uploads by themselves.
    LeftOpen {
        /// What the registry said.
        reason: String,
    },
}

impl Repository {
    /// Sees whether blobs may be pushed. Nothing is.
    ///
    /// # Errors
    /// [`RegistryError`] when they may not, or the registry cannot be asked.
    pub async fn try_upload(&self) -> Result<Trial, RegistryError> {
        try_upload(&self.push_host()?).await
    }
}

async fn try_upload(hosted: &HostedRepository) -> Result<Trial, RegistryError> {
    let (deadline, scopes) = (hosted.deadline(0), Scopes::push(hosted.name()));
    let call = Call::new(Method::Post, hosted.url("blobs/uploads/"), scopes.clone(), "beginning an upload");
    let answer = hosted.call(&call, &deadline).await?;
    if answer.status() != 202 {
        return Err(answer.error().await);
    }
    let url = location(&answer).map_err(|reason| hosted.malformed(&call.what, reason))?;
    let call = Call::new(Method::Delete, url, scopes, "cancelling an upload");
    Ok(match hosted.call(&call, &deadline).await {
        Ok(answer) if matches!(answer.status(), 200 | 202 | 204) => Trial::Cancelled,
        Ok(answer) => Trial::LeftOpen { reason: format!("HTTP {}", answer.status()) },
        Err(error) => Trial::LeftOpen { reason: error.to_string() },
    })
}
