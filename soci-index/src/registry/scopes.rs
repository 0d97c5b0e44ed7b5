//! Scopes: what a token is asked for, as token services write it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Rights to be asked for: `repository:NAME:ACTION,ACTION`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(crate) struct Scopes(BTreeMap<String, BTreeSet<String>>);

impl Scopes {
    pub(crate) fn pull(repository: &str) -> Self {
        Self::actions(repository, &["pull"])
    }

    pub(crate) fn push(repository: &str) -> Self {
        Self::actions(repository, &["pull", "push"])
    }

    pub(crate) fn delete(repository: &str) -> Self {
        Self::actions(repository, &["pull", "delete"])
    }

    fn actions(repository: &str, actions: &[&str]) -> Self {
        let actions = actions.iter().map(|action| (*action).to_owned()).collect();
        Self(BTreeMap::from([(format!("repository:{repository}"), actions)]))
    }

    pub(crate) fn and(mut self, other: &Self) -> Self {
        for (name, actions) in &other.0 {
            self.0.entry(name.clone()).or_default().extend(actions.iter().cloned());
        }
        self
    }

    /// Adds what a challenge asks for beyond the names that we want ourselves: a server cannot make us ask for more.
    pub(crate) fn widen(&mut self, challenged: &str) {
        for scope in challenged.split(' ') {
            let Some((name, actions)) = scope.rsplit_once(':') else { continue };
            if let Some(known) = self.0.get_mut(name) {
                let plain = actions.split(',').filter(|action| matches!(*action, "pull" | "push" | "delete"));
                known.extend(plain.map(str::to_owned));
            }
        }
    }

    /// Adds all that the same repositories may need.
    pub(crate) fn allow_push(&mut self) {
        self.0.values_mut().for_each(|actions| actions.extend(["pull", "push"].map(str::to_owned)));
    }

    /// One text per scope.
    pub(crate) fn texts(&self) -> Vec<String> {
        let list = |actions: &BTreeSet<String>| actions.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        self.0.iter().map(|(name, actions)| format!("{name}:{}", list(actions))).collect()
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.texts().join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes() {
        let mut scopes = Scopes::pull("p/r");
        assert_eq!(scopes.to_string(), "repository:p/r:pull");
        scopes.widen("repository:p/r:push,pull repository:other:pull registry:catalog:* garbage repository:p/r:*");
        assert_eq!(scopes, Scopes::push("p/r"));
        assert_eq!(scopes.and(&Scopes::pull("a")).to_string(), "repository:a:pull repository:p/r:pull,push");
    }
}
