//! `soci` as its users run it, against registries, files and containerd.

/// Makes tests of `how`, given the address of a server that is started for each and asks for no login.
#[cfg(test)]
macro_rules! on_each_server {
    ($how:ident: $($name:ident on $server:ident,)*) => {
        $(
            #[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                let Some(registry) = $server::start() else { return };
                $how(&registry.address).await;
            }
        )*
    };
}

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
