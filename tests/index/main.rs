//! `soci-index` as a library: formats against golden, random and damaged data, and the registry client against a
//! scripted server.

#[cfg(test)]
mod compact;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod golden_images;
#[cfg(test)]
mod model;
#[cfg(test)]
mod mutation;
#[cfg(test)]
mod wire;
