#!/bin/sh
# Runs every test program in a directory; each prints "N passed, N failed" and fails by its status.
failed=0
for t in "$1"/*; do
    [ -f "$t" ] && [ -x "$t" ] || continue
    name=$(basename "$t")
    if out=$("$t" 2>&1); then echo "ok    $name: $(echo "$out" | tail -n 1)"
    else failed=$((failed + 1)); echo "FAIL  $name"; echo "$out" | tail -n 40; fi
done
[ "$failed" -eq 0 ]
