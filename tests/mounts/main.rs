//! What programs read through `soci mount`, while registries, networks and disks fail.

#[cfg(test)]
mod chaos;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod identity;
#[cfg(test)]
mod killed;
#[cfg(test)]
mod labels;
#[cfg(test)]
mod lazy;
#[cfg(test)]
mod mount;
#[cfg(test)]
mod partless;
#[cfg(test)]
mod places;
#[cfg(test)]
mod private;
#[cfg(test)]
mod profile_prefetch;
#[cfg(test)]
mod record;
#[cfg(test)]
mod remote;
#[cfg(test)]
mod unlisted;
