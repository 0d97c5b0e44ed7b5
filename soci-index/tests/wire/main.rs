//! The registry client against a scripted server: what it asks, what it believes, and where its secrets go.
//!
//! No packaged registry answers with a short 206, an expired signed URL or another repository's tag on demand, so the
//! server here is a few lines over a TCP socket. It records every request; the records prove above all what was *not*
//! sent.

#[cfg(test)]
mod auth;
#[cfg(test)]
mod chunks;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod discover;
#[cfg(test)]
mod fallback;
#[cfg(test)]
mod images;
#[cfg(test)]
mod listing;
#[cfg(test)]
mod manifests;
#[cfg(test)]
mod mirrors;
#[cfg(test)]
mod push;
#[cfg(test)]
mod ranges;
#[cfg(test)]
mod redirects;
#[cfg(test)]
mod referrers;
#[cfg(test)]
mod server;
#[cfg(test)]
mod tls;
#[cfg(test)]
mod warnings;
