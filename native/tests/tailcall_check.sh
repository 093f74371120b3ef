#!/bin/sh
# tailcall_check.sh LIBRARY: what the compiler made of the interpreter's handlers, and what the library exports.
#
# A handler that chains to the next may call nothing and save nothing: one prologue costs as much as the
# instruction. Not meant: slow twins, handlers that are an ordinary function (x_<name>), those that only
# raise, x87 (the host's state is set up around each), an immediate that chooses among host instructions
# (an indirect call), and bit manipulation that keeps temporaries.
library=$1
bad=$(objdump -d --no-show-raw-insn "$library" | awk '
    /^[0-9a-f]+ <op_[^>]*>:$/ { f = $2; gsub(/[<>:]/, "", f); names[++n] = f; next }
    /^[0-9a-f]+ <.*>:$/ { f = ""; next }
    f != "" && $2 ~ /^call/ {
        t = $0
        if (t ~ /\*/) { indirect[f] = 1; next }
        sub(/.*</, "", t); sub(/[>+.].*/, "", t)
        if (t ~ /^x_/) function_of[f] = 1
        calls[f] = calls[f] " " t
    }
    f != "" && $2 == "push" { pushes[f]++ }
    END {
        for (i = 1; i <= n; i++) {
            f = names[i]
            if (function_of[f] || f ~ /_slow/ || f ~ /^op_f/ || f ~ /^op_(ud|nm|gp0|mf)$/) continue
            if (f ~ /^op_(adcx|adox|bextr|bzhi|blsi|blsr|blsmsk|pext|pdep|mulx|rorx|sarx|shlx|shrx)/) continue
            hot++
            if (indirect[f] && !calls[f]) continue
            if (calls[f] || pushes[f]) print "  " f ":" (calls[f] ? " calls" calls[f] : "") (pushes[f] ? " saves " pushes[f] : "")
        }
        if (hot < 1000) print "  only " hot + 0 " handlers found"
    }')
exported=$(nm -D --defined-only "$library" | awk '$3 !~ /^kvs_/ { print "  " $3 }')
failed=0
if [ -n "$bad" ]; then echo "handlers that do more than tail calls:"; echo "$bad"; failed=$((failed + 1)); fi
if [ -n "$exported" ]; then echo "exported, but no part of the ABI:"; echo "$exported"; failed=$((failed + 1)); fi
echo "$((2 - failed)) passed, $failed failed"
[ "$failed" -eq 0 ]
