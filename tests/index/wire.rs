//! The registry client against a scripted server: what it asks, what it believes, and where its secrets go.
//!
//! No packaged registry answers with a short 206, an expired signed URL or another repository's tag on demand, so the
//! server here is a few lines over a TCP socket. It records every request; the records prove above all what was *not*
//! sent.

mod auth;
mod chunks;
mod conformance;
mod discover;
mod fallback;
mod images;
mod listing;
mod manifests;
mod mirrors;
mod push;
mod ranges;
mod redirects;
mod referrers;
mod server;
mod tls;
mod warnings;
