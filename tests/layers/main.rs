//! `soci-fs` as a library: readers, stores and trees, with and without the kernel.

#[cfg(test)]
mod cluster;
#[cfg(test)]
mod device_files;
#[cfg(test)]
mod erofs;
#[cfg(test)]
mod erofs_mount;
#[cfg(test)]
mod forest;
#[cfg(test)]
mod forest_mount;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod mentions;
#[cfg(test)]
mod mount;
#[cfg(test)]
mod pack;
#[cfg(test)]
mod reader;
#[cfg(test)]
mod whole_layers;
#[cfg(test)]
mod windows;
