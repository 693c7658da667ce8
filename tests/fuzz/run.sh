#!/bin/sh
# Runs the fuzz targets one after the other, each for FUZZ_SECONDS (300), or only those in FUZZ_TARGETS. Ends with an error
# at the first finding; the input that led to it is then in target/fuzz/artifacts. See README.md beside this file.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
work=$root/target/fuzz
seconds=${FUZZ_SECONDS:-300}
memory=${FUZZ_MEMORY_MB:-2048}
say() { printf '%s\n' "fuzz: $*" >&2; }

command -v cargo-fuzz >/dev/null || { say 'cargo-fuzz is missing; hint: cargo install cargo-fuzz --locked'; exit 1; }
cargo +nightly --version >/dev/null 2>&1 || { say 'no nightly toolchain; hint: rustup toolchain install nightly'; exit 1; }

cd "$root/tests/fuzz"
for target in ${FUZZ_TARGETS:-$(cargo fuzz list --fuzz-dir .)}; do
    say "$target for $seconds s"
    mkdir -p "$work/corpus/$target" "$work/artifacts/$target"
    # Each target plants its own seeds. Leaks are looked for by the memory limit: what lives as long as the process is none.
    MILLSTREAM_FUZZ_SEEDS=$work/corpus/$target cargo +nightly fuzz run --fuzz-dir . --target-dir "$work" "$target" \
        "$work/corpus/$target" -- -artifact_prefix="$work/artifacts/$target/" -max_total_time="$seconds" \
        -rss_limit_mb="$memory" -timeout=30 -max_len=131072 -detect_leaks=0 -print_final_stats=1
done
