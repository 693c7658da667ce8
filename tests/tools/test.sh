#!/bin/sh
# Runs `cargo test` with the given arguments, all of it even after a failure, and counts at the end what the test binaries
# did. A test that said `skipped: ...` is not counted as passed.
set -eu

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
{
    status=0
    cargo test --locked --no-fail-fast "$@" 2>&1 || status=$?
    echo $status >"$dir/status"
} | tee "$dir/log"
# The runner may have begun the line with the name of the test.
awk '
    /^test result: / { passed += $4; failed += $6; ignored += $8 }
    /^(test .* )?skipped: / { skipped++ }
    END {
        printf "\nignored: %d (make clients, make big, make soak)\n", ignored
        printf "%d passed, %d failed, %d skipped\n", passed - skipped, failed, skipped
    }
' "$dir/log"
exit "$(cat "$dir/status")"
