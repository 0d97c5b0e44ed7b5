//! The snapshotter and the daemon on a node.

#[cfg(test)]
mod bounds;
#[cfg(test)]
mod containerd;
#[cfg(test)]
mod convert_containerd;
#[cfg(test)]
mod cri;
#[cfg(test)]
mod daemon;
#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod metrics;
#[cfg(test)]
mod rpull;
#[cfg(test)]
mod trees;
#[cfg(test)]
mod userns;
