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

# See it work
demo:
    cargo run --release -p soci-cli -- demo

# Measure; the figures of docs/BENCHMARKS.md
bench *names:
    cargo build --release -p soci-cli
    cargo run --release -p soci-tests --bin bench -- {{names}}

# Kill workers and supervisors under readers, so many times
chaos kills="1000":
    SOCI_CHAOS_KILLS={{kills}} cargo test -p soci-fs --test survival

# Mutate inputs of every parser for so many seconds
fuzz seconds="600":
    SOCI_FUZZ_SECONDS={{seconds}} cargo test --release -p soci-index --test mutation -- --nocapture
    PROPTEST_CASES=20000 cargo test --release -p soci-index --test model

# Licences, sources and duplicates of dependencies
deny:
    cargo deny check bans licenses sources

# Manual pages and shell completions into target/
man:
    cargo run -q -p soci-cli -- man target/man
    mkdir -p target/completions
    for shell in bash zsh fish; do cargo run -q -p soci-cli -- completions $shell > target/completions/soci.$shell; done
