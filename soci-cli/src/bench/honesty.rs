//! Whether layers came as a lazy snapshotter promises: a figure of a start that was secretly a download would mislead.
//!
//! A snapshotter falls back in two ways. It leaves a layer to containerd, which the pull sees; or it says that it has
//! the layer after having fetched it whole, which only the byte counts show. Layers below a size are fetched whole by
//! design and prove nothing.

use soci_fs::node::rpull::Came;
use soci_index::format::digest::Digest;

/// How a layer came, and what went over the network meanwhile.
#[derive(Debug, Clone, Copy)]
pub struct LayerArrival {
    pub layer: Digest,
    /// Its size in the registry, in bytes.
    pub size: u64,
    pub came: Came,
    /// Bytes from the registry while it was prepared.
    pub bytes: u64,
}

/// Why a start is not reported.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NotLazy {
    /// containerd did it.
    #[error(
        "{snapshotter} left layer {layer} ({size} bytes) to containerd, which downloaded it: this is no lazy start. Its log \
         says why; is there an index for the layer?"
    )]
    Left { snapshotter: String, layer: Digest, size: u64 },
    /// The snapshotter did it.
    #[error(
        "{snapshotter} provided layer {layer} ({size} bytes) after {bytes} bytes had come: it was downloaded whole, this is \
         no lazy start. Its log says why; is there an index for the layer?"
    )]
    Whole { snapshotter: String, layer: Digest, size: u64, bytes: u64 },
    /// It was on this machine.
    #[error("{snapshotter} has layer {layer} already: this is no cold start. Remove all images that have it")]
    Warm { snapshotter: String, layer: Digest },
}

/// Says whether this was a lazy, cold pull. Layers of less than `least` bytes may come whole.
///
/// # Errors
/// [`NotLazy`] names the first layer that was not.
pub fn check(snapshotter: &str, layers: &[LayerArrival], least: u64) -> Result<(), NotLazy> {
    let snapshotter = || snapshotter.to_owned();
    for &LayerArrival { layer, size, came, bytes } in layers {
        match came {
            Came::Already => return Err(NotLazy::Warm { snapshotter: snapshotter(), layer }),
            Came::Fetched(_) if size >= least => {
                return Err(NotLazy::Left { snapshotter: snapshotter(), layer, size });
            }
            Came::Provided if size >= least && bytes >= size => {
                return Err(NotLazy::Whole { snapshotter: snapshotter(), layer, size, bytes });
            }
            Came::Fetched(_) | Came::Provided => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_fall_back_is_found() {
        let layer = Digest::of(b"layer");
        let check = |came, size, bytes| check("soci", &[LayerArrival { layer, size, came, bytes }], 1000);
        assert_eq!(check(Came::Provided, 5000, 4999), Ok(()));
        assert_eq!(check(Came::Provided, 999, 2000), Ok(()));
        assert_eq!(check(Came::Fetched(999), 999, 999), Ok(()));
        let snapshotter = || "soci".to_owned();
        let whole = NotLazy::Whole { snapshotter: snapshotter(), layer, size: 5000, bytes: 5000 };
        assert_eq!(check(Came::Provided, 5000, 5000), Err(whole));
        let left = NotLazy::Left { snapshotter: snapshotter(), layer, size: 5000 };
        assert!(left.to_string().contains(&layer.to_string()));
        assert_eq!(check(Came::Fetched(0), 5000, 0), Err(left));
        assert_eq!(check(Came::Already, 1, 0), Err(NotLazy::Warm { snapshotter: snapshotter(), layer }));
    }
}
