//! Which tags a repository has.
//!
//! Asked for one purpose: images of one repository share layers, and what was indexed for one need not be indexed for
//! the next. So a list that is cut, absent or refused is only a shorter list. Invariants: pages are followed on the
//! same origin only; their number and the number of tags are bounded.

use serde::Deserialize;

use crate::registry::Repository;
use crate::registry::error::RegistryError;
use crate::registry::exchange::Call;
use crate::registry::failover::HostedRepository;
use crate::registry::headers;
use crate::registry::need::Need;
use crate::registry::redirect;
use crate::registry::scopes::Scopes;
use crate::registry::transport::Method;

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
    pub(crate) async fn tags(&self) -> Result<Vec<String>, RegistryError> {
        let tags = self.first(Need::Tag, |hosted| async move { tags(&hosted).await.map(Some) }).await?;
        Ok(tags.unwrap_or_default())
    }
}

async fn tags(hosted: &HostedRepository) -> Result<Vec<String>, RegistryError> {
    let what = "listing tags";
    let mut url = hosted.url("tags/list");
    url.query_pairs_mut().append_pair("n", &PAGE_TAGS.to_string());
    let deadline = hosted.deadline(0);
    let mut tags = Vec::new();
    for _ in 0..PAGES_MAX {
        let call = Call::new(Method::Get, url, Scopes::pull(hosted.name()), what);
        let call = call.with_header("accept", "application/json");
        let answer = hosted.call(&call, &deadline).await?;
        match answer.status() {
            200 => {}
            404 | 405 | 501 => return Ok(tags),
            _ => return Err(answer.error().await),
        }
        let (next, at) = (headers::next_link(answer.response.headers("link")), answer.url.clone());
        let body = answer.document().await?;
        let page: Page = serde_json::from_slice(&body).map_err(|error| hosted.malformed(what, error))?;
        tags.extend(page.tags.unwrap_or_default());
        let Some(next) = next else { break };
        let next = redirect::page(&at, &next)
            .map_err(|reason| hosted.malformed(what, format!("the next page is refused: {reason}")))?;
        url = hosted.endpoint().named(next);
    }
    Ok(tags)
}
