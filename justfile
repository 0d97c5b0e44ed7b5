# Commands for developers. `just` lists them.

default:
    @just --list

# Everything that must pass before a change lands
ci:
    bash tests/run

# Formatting and lints only
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings
    cargo clippy -p soci-cli --no-default-features -- -D warnings

# See it work
demo:
    cargo run --profile demo -p soci-cli --no-default-features --features mount -- demo

# Measure; the figures of docs/BENCHMARKS.md. `just bench cold --compare docs/benchmarks.json` is beside overlayfs, AWS and stargz
bench *names:
    cargo build --release -p soci-cli
    cargo run --release -p soci-tests --bin bench -- {{names}}

# Kill workers and supervisors under readers, so many times
chaos kills="1000":
    SOCI_CHAOS_KILLS={{kills}} cargo test -p soci-tests --test survival

# Mutate inputs of every parser for so many seconds
fuzz seconds="600":
    SOCI_FUZZ_SECONDS={{seconds}} cargo test --release -p soci-tests --test index mutation -- --nocapture
    PROPTEST_CASES=20000 cargo test --release -p soci-tests --test index model

# Licences, sources and duplicates of dependencies
deny:
    cargo deny check bans licenses sources

# A binary that needs nothing beside it: target/static/soci. For musl where its target and musl-gcc are installed
static:
    #!/usr/bin/env bash
    set -euo pipefail
    machine=$(uname -m)
    target=$machine-unknown-linux-gnu
    if command -v musl-gcc > /dev/null && rustup target list --installed | grep -qx "$machine-unknown-linux-musl"; then
        target=$machine-unknown-linux-musl
    fi
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --target "$target" --target-dir target/static -p soci-cli --bin soci
    strip -o target/static/soci "target/static/$target/release/soci"
    ls -l target/static/soci
    SOCI_STATIC=$PWD/target/static/soci cargo test -p soci-tests --test house static_binary -- --nocapture

# Manual pages and shell completions into target/
man:
    cargo run -q -p soci-cli -- man target/man
    mkdir -p target/completions
    for shell in bash zsh fish; do cargo run -q -p soci-cli -- completions $shell > target/completions/soci.$shell; done

# Write what docs/configuration.md says of options and keys, after a change of these
reference:
    SOCI_WRITE=1 cargo test -p soci-tests --test house reference
