//! Which tags a repository has.
//!
//! Asked for one purpose: images of one repository share layers, and what was indexed for one need not be indexed for
//! the next. So a list that is cut, absent or refused is only a shorter list. Invariants: pages are followed on the
//! same origin only; their number and the number of tags are bounded.

use serde::Deserialize;

use crate::registry::Repository;
use crate::registry::auth::Scopes;
use crate::registry::error::RegistryError;
use crate::registry::exchange::Call;
use crate::registry::failover::{HostedRepository, Need};
use crate::registry::headers;
use crate::registry::redirect;
use crate::registry::transport::{Body, Method};

/// Pages that are read.
const PAGES_MAX: usize = 5;
/// Tags that are asked for at a time.
const PAGE_TAGS: usize = 1000;

#[derive(Deserialize)]
struct Page {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

impl Repository {
    /// Tags of the repository, in the registry's order; the first some thousand of them.
    ///
    /// # Errors
    /// [`RegistryError`] when the registry cannot be asked. One that has no such list has no tags.
    pub async fn tags(&self) -> Result<Vec<String>, RegistryError> {
        let tags = self.first(Need::Tag, |place| async move { place.tags().await.map(Some) }).await?;
        Ok(tags.unwrap_or_default())
    }
}

impl HostedRepository {
    async fn tags(&self) -> Result<Vec<String>, RegistryError> {
        let what = "listing tags";
        let mut url = self.url("tags/list");
        url.query_pairs_mut().append_pair("n", &PAGE_TAGS.to_string());
        let deadline = self.deadline(0);
        let mut tags = Vec::new();
        for _ in 0..PAGES_MAX {
            let call = Call {
                method: Method::Get,
                url: url.clone(),
                headers: vec![("accept", "application/json".to_owned())],
                body: Body::Empty,
                scopes: Scopes::pull(self.name()),
                what: what.to_owned(),
            };
            let answer = self.call(&call, &deadline).await?;
            match answer.status() {
                200 => {}
                404 | 405 | 501 => return Ok(tags),
                _ => return Err(self.status_error(answer, what).await),
            }
            let (next, at) = (headers::next_link(answer.response.headers("link")), answer.url.clone());
            let body = self.document(answer, what, self.options().limits.manifest_bytes_max, &deadline).await?;
            let page: Page = serde_json::from_slice(&body).map_err(|error| self.malformed(what, &error.to_string()))?;
            tags.extend(page.tags.unwrap_or_default());
            let Some(next) = next else { break };
            let next = redirect::page(&at, &next)
                .map_err(|reason| self.malformed(what, &format!("the next page is refused: {reason}")))?;
            url = self.endpoint().named(next);
        }
        Ok(tags)
    }
}
