//! Values that are more than numbers and texts.

use serde::{Deserialize, Serialize};

/// What kind of address metrics are served on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetricsNetwork {
    /// `host:port`.
    #[default]
    #[serde(alias = "")]
    Tcp,
    /// The path of a socket.
    Unix,
}

/// How AWS keeps file tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MetadataStore {
    /// One database.
    #[default]
    #[serde(alias = "")]
    Db,
    /// One for each layer.
    DbMulti,
}

/// Which of too many spans to fetch is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DropPolicy {
    /// The newest.
    #[default]
    #[serde(alias = "")]
    Newest,
    /// The oldest.
    Oldest,
}

/// Whose content store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContentStoreType {
    /// Ours.
    #[default]
    #[serde(alias = "")]
    Soci,
    /// containerd's.
    Containerd,
}

/// A number of bytes, written as a number with a unit: `512`, `1.5 GB`, `64mb`. Units are powers of 1024. Zero, or
/// nothing, is no limit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Size {
    text: String,
    bytes: u64,
}

impl Size {
    /// So many gigabytes.
    #[must_use]
    pub fn gigabytes(number: u64) -> Self {
        Self { text: format!("{number}gb"), bytes: number << 30 }
    }

    /// The limit, if there is one.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        (self.bytes > 0).then_some(self.bytes)
    }
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || format!("{text:?} is no size: expected a number and b, kb, mb or gb");
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.find(|letter: char| !letter.is_ascii_digit() && letter != '.').unwrap_or(lower.len());
        let factor: u64 = match lower[digits..].trim() {
            "" | "b" => 1,
            "kb" => 1 << 10,
            "mb" => 1 << 20,
            "gb" => 1 << 30,
            _ => return Err(malformed()),
        };
        if lower.is_empty() {
            return Ok(Self::default());
        }
        let number: f64 = lower[..digits].parse().map_err(|_| malformed())?;
        let bytes = number * factor as f64;
        // Every number of bytes that a disk can have is exact enough.
        if !bytes.is_finite() || bytes >= 2f64.powi(63) {
            return Err(malformed());
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and 2^63")]
        Ok(Self { text: text.to_owned(), bytes: bytes as u64 })
    }
}

impl Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What answers for the names in layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TreeMode {
    /// The kernel where it can, else the daemon.
    #[default]
    Auto,
    /// The kernel; the daemon does not start where it cannot.
    Erofs,
    /// The daemon.
    Fuse,
}

/// Which layers without an index are left to containerd: `false`, none; `true`, each of them; `"images"`, those of images
/// that have no usable index at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LeaveUnindexed {
    #[default]
    None,
    Layers,
    Images,
}

impl Serialize for LeaveUnindexed {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_bool(false),
            Self::Layers => serializer.serialize_bool(true),
            Self::Images => serializer.serialize_str("images"),
        }
    }
}

impl<'de> Deserialize<'de> for LeaveUnindexed {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::Boolean(false) => Ok(Self::None),
            toml::Value::Boolean(true) => Ok(Self::Layers),
            toml::Value::String(text) if text == "images" => Ok(Self::Images),
            other => Err(serde::de::Error::custom(format!("expected true, false or \"images\", found {other}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("", 0), ("0", 0), ("512", 512), ("1.5 GB", 3 << 29), ("64mb", 64 << 20), (" 2 KB ", 2048)]
        {
            assert_eq!(text.parse::<Size>().unwrap().bytes, bytes, "{text}");
        }
        for text in ["mb", "1tb", "-1", "1.2.3", "1e300 gb", "nan"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }
}
