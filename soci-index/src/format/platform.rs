//! Platforms: reading `os/arch[/variant]`, the host's own, and the choice among the entries of an image index.
//!
//! The names are Go's, as the image specification demands, and variants follow containerd: `arm64` means `arm64/v8`,
//! `arm` means `arm/v7`, `amd64/v1` is `amd64`. Invariant: a [`Platform`] is normalised, so equal platforms are equal
//! values. The choice is a pure function of the list, so it can be tested by tables.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};

/// An operating system and a processor.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Platform {
    /// The processor, for example `amd64`.
    architecture: String,
    /// The operating system, for example `linux`.
    os: String,
    /// The processor's variant, for example `v7`; empty for none.
    #[serde(skip_serializing_if = "String::is_empty")]
    variant: String,
}

/// Why a text is not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a platform: expected os/architecture[/variant], for example linux/arm64")]
pub struct PlatformError {
    /// The text as given, cut at 100 characters.
    pub text: String,
}

/// Which platforms of an image are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum PlatformSelection {
    /// The one this program runs on; an image that has only one platform yields that one.
    #[default]
    Host,
    /// These, all of them.
    Only(Vec<Platform>),
    /// Every platform of the image.
    All,
    /// Every platform of which there is a manifest: in another program's store those that were pulled.
    AllPresent,
}

impl Platform {
    /// Normalises the three parts.
    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let (architecture, implied) = match architecture.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" => ("amd64".to_owned(), ""),
            "i386" | "x86" => ("386".to_owned(), ""),
            "aarch64" => ("arm64".to_owned(), ""),
            "armhf" => ("arm".to_owned(), "v7"),
            "armel" => ("arm".to_owned(), "v6"),
            other => (other.to_owned(), ""),
        };
        let variant = variant.to_ascii_lowercase();
        let variant = if variant.is_empty() { implied.to_owned() } else { variant };
        let variant = match (architecture.as_str(), variant.as_str()) {
            ("arm64", "v8" | "8") | ("amd64", "v1") => "",
            ("arm", "" | "7") => "v7",
            ("arm", "5") => "v5",
            ("arm", "6") => "v6",
            ("arm", "8") => "v8",
            (_, other) => other,
        }
        .to_owned();
        Self { architecture, os, variant }
    }

    /// The platform that this program was built for; containers run on Linux, so the system is always `linux`.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match (std::env::consts::ARCH, cfg!(target_endian = "little")) {
            ("powerpc64", true) => "ppc64le",
            ("powerpc64", false) => "ppc64",
            ("loongarch64", _) => "loong64",
            (other, _) => other,
        };
        Self::new("linux", architecture, "")
    }

    /// The operating system.
    #[must_use]
    pub fn os(&self) -> &str {
        &self.os
    }

    /// The processor.
    #[must_use]
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// The processor's variant, empty for none.
    #[must_use]
    pub fn variant(&self) -> &str {
        &self.variant
    }

    /// Whether this is the `unknown/unknown` that build tools put on manifests which are no images.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        self.os == "unknown" || self.architecture == "unknown"
    }

    /// How well something made for `offered` runs on this platform: 0 is exact, more is worse, `None` is not at all.
    #[must_use]
    pub fn distance(&self, offered: &Self) -> Option<u32> {
        if self == offered {
            return Some(0);
        }
        if self.os != offered.os {
            return None;
        }
        let (wanted, given) = match (self.architecture.as_str(), offered.architecture.as_str()) {
            // A v7 processor runs v6 and v5; a 64-bit one runs 64-bit code of its own or a lower level.
            ("arm", "arm") | ("amd64", "amd64") | ("arm64", "arm64") => (level(self)?, level(offered)?),
            _ => return None,
        };
        wanted.checked_sub(given)
    }
}

/// The number in a variant such as `v7`; the lowest of the architecture when there is none.
fn level(platform: &Platform) -> Option<u32> {
    match (platform.architecture.as_str(), platform.variant.as_str()) {
        ("amd64", "") => Some(1),
        ("arm64", "") => Some(8),
        (_, variant) => variant.strip_prefix('v')?.parse().ok(),
    }
}

/// Picks from `offered` (an index's platforms, in its order) the entry that fits `wanted` best: the least
/// [`Platform::distance`], and among equals the first.
#[must_use]
pub fn best<'a>(wanted: &Platform, offered: impl IntoIterator<Item = &'a Platform>) -> Option<usize> {
    offered
        .into_iter()
        .enumerate()
        .filter_map(|(place, platform)| Some((wanted.distance(platform)?, place)))
        .min()
        .map(|(_, place)| place)
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let bad = || PlatformError { text: text.chars().take(100).collect() };
        let parts: Vec<&str> = text.split('/').collect();
        let word = |part: &str| {
            !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
        };
        if !parts.iter().all(|part| word(part)) {
            return Err(bad());
        }
        match parts.as_slice() {
            [os, architecture] => Ok(Self::new(os, architecture, "")),
            [os, architecture, variant] => Ok(Self::new(os, architecture, variant)),
            _ => Err(bad()),
        }
    }
}

impl<'de> Deserialize<'de> for Platform {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Raw {
            #[serde(default)]
            os: String,
            #[serde(default)]
            architecture: String,
            #[serde(default)]
            variant: Option<String>,
        }
        let raw = Raw::deserialize(deserializer)?;
        Ok(Self::new(&raw.os, &raw.architecture, raw.variant.as_deref().unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        for (text, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("Linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm/v6", "linux/arm/v6"),
            ("linux/s390x", "linux/s390x"),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), expected, "{text}");
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/am d64", "linux//v7"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
        assert_eq!(Platform::host().os(), "linux");
        assert!("unknown/unknown".parse::<Platform>().unwrap().is_unknown());
    }

    #[test]
    fn choice() {
        for (wanted, offered, expected) in [
            ("linux/amd64", &["linux/arm64", "linux/amd64"][..], Some(1)),
            ("linux/amd64", &["linux/amd64/v3", "windows/amd64"][..], None),
            ("linux/amd64/v3", &["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"][..], Some(1)),
            ("linux/arm/v7", &["linux/arm/v5", "linux/arm/v6"][..], Some(1)),
            ("linux/arm/v6", &["linux/arm/v7"][..], None),
            ("linux/arm64", &["linux/arm/v7"][..], None),
            ("linux/arm64", &["linux/arm64/v8"][..], Some(0)),
            ("linux/s390x", &["linux/s390x", "linux/s390x"][..], Some(0)),
            ("linux/amd64", &[][..], None),
        ] {
            let offered: Vec<Platform> = offered.iter().map(|text| text.parse().unwrap()).collect();
            assert_eq!(best(&wanted.parse().unwrap(), &offered), expected, "{wanted} in {offered:?}");
        }
    }
}
