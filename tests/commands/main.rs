//! `soci` as its users run it, against registries, files and containerd.

#[cfg(test)]
mod convert;
#[cfg(test)]
mod demo;
#[cfg(test)]
mod doctor;
#[cfg(test)]
mod finder;
#[cfg(test)]
mod golden_cli;
#[cfg(test)]
mod images;
#[cfg(test)]
mod index_choice;
#[cfg(test)]
mod local_store;
#[cfg(test)]
mod manners;
#[cfg(test)]
mod oci_client;
#[cfg(test)]
mod peer;
#[cfg(test)]
mod profile;
#[cfg(test)]
mod publish;
#[cfg(test)]
mod registries;
#[cfg(test)]
mod reuse;
#[cfg(test)]
mod secrets;
#[cfg(test)]
mod signatures;
#[cfg(test)]
mod signing;
#[cfg(test)]
mod sources;
#[cfg(test)]
mod span_index;
#[cfg(test)]
mod trust;
#[cfg(test)]
mod uploads;
#[cfg(test)]
mod webhook;
#[cfg(test)]
mod writers;
