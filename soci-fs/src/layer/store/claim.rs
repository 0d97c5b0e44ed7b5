//! What one image says of a layer: the identity of what the store keeps.
//!
//! A layer digest alone identifies the compressed bytes, not what they decode to, nor what files they hold: that is
//! said by the image's configuration (the diff_id), by the table of an index and by a pack, and each of these may be
//! forged by any author of an image. So bytes are kept per *claim*, all of these together. Images share a directory of
//! the store if they would have got exactly the same by themselves, and nothing else; once a claim is proven its bytes
//! are found by diff_id alone, see [`crate::layer::store::proven`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use soci_index::format::digest::{Digest, hex};

/// What is claimed of a layer, and by what it would be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Claim {
    /// Digest of the blob.
    pub layer: Digest,
    /// Digest of the uncompressed tar, by the image's configuration.
    pub diff_id: Digest,
    /// The TOC or zTOC of an index; none for a layer that is read whole and proven as it comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<Digest>,
    /// The start-up pack whose pages may be shown before they are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pack: Option<Digest>,
}

impl Claim {
    /// The claim of a layer that is read whole.
    #[must_use]
    pub const fn whole(layer: Digest, diff_id: Digest) -> Self {
        Self { layer, diff_id, table: None, pack: None }
    }

    /// Its identity: equal for equal claims, and for no others.
    #[must_use]
    pub fn id(&self) -> ClaimId {
        let optional = |digest: &Option<Digest>| digest.map_or_else(|| "-".to_owned(), |digest| digest.to_string());
        // A text without ambiguity: a digest has no space.
        let text = format!("{} {} {} {}", self.layer, self.diff_id, optional(&self.table), optional(&self.pack));
        let hash = Digest::of(text.as_bytes());
        let mut id = [0; ID_BYTES];
        id.iter_mut().zip(hash.bytes()).for_each(|(to, from)| *to = *from);
        ClaimId(id)
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layer {} as diff_id {}", self.layer, self.diff_id)?;
        match self.table {
            Some(table) => write!(f, " by table {table}")?,
            None => write!(f, ", whole")?,
        }
        self.pack.map_or(Ok(()), |pack| write!(f, " with pack {pack}"))
    }
}

/// Bytes of an identity: as long as SHA-1, far beyond what can be made to collide.
const ID_BYTES: usize = 20;

/// The identity of a claim, and the name of its directory: 40 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClaimId([u8; ID_BYTES]);

/// A text that is no [`ClaimId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no identity of a claim: expected 40 hexadecimal digits")]
pub struct ClaimIdError {
    pub text: String,
}

impl fmt::Display for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for ClaimId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ClaimId {
    type Err = ClaimIdError;

    fn from_str(text: &str) -> Result<Self, ClaimIdError> {
        let bad = || ClaimIdError { text: text.chars().take(100).collect() };
        let is_lower = |digit: u8| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit);
        if text.len() != 2 * ID_BYTES || !text.bytes().all(is_lower) {
            return Err(bad());
        }
        let mut id = [0; ID_BYTES];
        for (place, byte) in id.iter_mut().enumerate() {
            *byte = text
                .get(2 * place..2 * place + 2)
                .and_then(|pair| u8::from_str_radix(pair, 16).ok())
                .ok_or_else(bad)?;
        }
        Ok(Self(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts() {
        let digest = |number: u8| Digest::from_sha256([number; 32]);
        let claim = Claim { layer: digest(1), diff_id: digest(2), table: Some(digest(3)), pack: Some(digest(4)) };
        let others = [
            Claim { layer: digest(9), ..claim },
            Claim { diff_id: digest(9), ..claim },
            Claim { table: Some(digest(9)), ..claim },
            Claim { table: None, ..claim },
            Claim { pack: Some(digest(9)), ..claim },
            Claim { pack: None, ..claim },
            // The same digests in other roles.
            Claim { layer: claim.diff_id, diff_id: claim.layer, ..claim },
            Claim { table: claim.pack, pack: claim.table, ..claim },
            Claim { table: None, pack: claim.table, ..claim },
        ];
        let mut ids: Vec<ClaimId> = others.iter().chain([&claim]).map(Claim::id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), others.len() + 1);
        assert_eq!(claim.id(), claim.clone().id());
        let json = serde_json::to_string(&claim).unwrap();
        assert_eq!(serde_json::from_str::<Claim>(&json).unwrap(), claim);
    }

    #[test]
    fn names_of_directories() {
        let id = Claim::whole(Digest::of(b"layer"), Digest::of(b"tar")).id();
        assert_eq!(id.to_string().parse(), Ok(id));
        let text = id.to_string();
        for bad in ["", "..", &text[1..], &text.to_uppercase(), &format!("{text}0"), &"g".repeat(40), &"é".repeat(20)]
        {
            assert!(bad.parse::<ClaimId>().is_err(), "{bad}");
        }
    }
}
