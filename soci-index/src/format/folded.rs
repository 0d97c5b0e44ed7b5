//! Objects whose keys count without regard to case, as Go's JSON decoder takes them.
//!
//! Docker's manifest.json and image configurations are read by that decoder everywhere else, and programs have come to
//! rely on it: Jib has written `config` for `Config`. Manifests stay strict, because two readings of one manifest would
//! be two images.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, IntoDeserializer as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A value that is read from an object with its keys in lower case. `T` names its fields so.
#[derive(Debug, Clone, Default)]
pub(crate) struct Folded<T>(pub(crate) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Folded<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Object(PhantomData)).map(Folded)
    }
}

struct Object<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(LowerCase(map)))
    }
}

struct LowerCase<A>(A);

impl<'de, A: MapAccess<'de>> MapAccess<'de> for LowerCase<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        let Some(mut key) = self.0.next_key::<String>()? else { return Ok(None) };
        key.make_ascii_lowercase();
        seed.deserialize(key.into_deserializer()).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.0.next_value_seed(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Pair {
        one: u32,
        #[serde(default)]
        two_words: Option<String>,
    }

    #[test]
    fn case_is_ignored() {
        for text in [r#"{"ONE":1,"Two_Words":"x"}"#, r#"{"one":1,"two_words":"x","Other":{"one":[]}}"#] {
            let Folded(pair) = serde_json::from_str::<Folded<Pair>>(text).unwrap();
            assert_eq!(pair, Pair { one: 1, two_words: Some("x".into()) }, "{text}");
        }
        for text in ["[]", "null", "{}", r#"{"one":"1"}"#] {
            assert!(serde_json::from_str::<Folded<Pair>>(text).is_err(), "{text}");
        }
    }
}
