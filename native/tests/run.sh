#!/bin/sh
# Runs every test program in a directory; each prints "N passed, N failed" and fails by its status. Those
# that execute guest code run again on the translator.
failed=0
run() {
    if out=$("$1" 2>&1); then echo "ok    $2: $(echo "$out" | tail -n 1)"
    else failed=$((failed + 1)); echo "FAIL  $2"; echo "$out" | tail -n 40; fi
}
for t in "$1"/*; do
    [ -f "$t" ] && [ -x "$t" ] || continue
    name=$(basename "$t")
    run "$t" "$name"
    case $name in
    avx_test | coherence_test | fetch_test | inflight_test | mmu_test | oracle_run | run_test | simd_test | storm_test | sys_test | transfer_test | x87_test)
        KVS_TEST_ENGINE=jit
        export KVS_TEST_ENGINE
        run "$t" "$name (jit)"
        unset KVS_TEST_ENGINE
        ;;
    esac
done
[ "$failed" -eq 0 ]
