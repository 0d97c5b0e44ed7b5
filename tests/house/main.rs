//! The rules of the house: what the sources, documents, examples and generated files must keep to.

#[cfg(test)]
mod architecture;
#[cfg(test)]
mod bench_command;
#[cfg(test)]
mod conformance;
#[cfg(test)]
mod documents;
#[cfg(test)]
mod examples;
#[cfg(test)]
mod generated;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod small;
mod static_binary;
