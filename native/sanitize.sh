#!/usr/bin/env bash
# The native core under the sanitizers: nothing may be found.
#
#   1. a plain C stress test under ThreadSanitizer, then under ASan, UBSan and LeakSanitizer
#   2. the module under ASan and UBSan, with every test of tests/unit/test_native_*.py; leaks count when the module
#      itself made the allocation (Python and NumPy keep some of theirs until the process ends), and in the process
#      of the tests only (the processes that they start are forked, or end with capsules alive, on purpose)
#   3. the same module under the fuzzer of lying producers, tests/fuzz/capsules.py; $FUZZ_EXAMPLES of each property
#
# Needs Linux, GCC, and $PYTHON (default python3) with the package's test requirements.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
cmake=$(dirname "$python")/cmake
[ -x "$cmake" ] || cmake=cmake
cc=${CC:-gcc}
out="$root/build/sanitize"
mkdir -p "$out"

configure() { # directory, sanitizers
  CC=$cc "$cmake" -S "$root/native" -B "$out/$1" -DPython_EXECUTABLE="$python" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DDLPOFFLOAD_WERROR=ON -DDLPOFFLOAD_TESTS=ON -DDLPOFFLOAD_SANITIZE="$2" >"$out/$1.log" || { cat "$out/$1.log"; exit 1; }
}

echo "==> stress test under ThreadSanitizer"
configure thread thread
"$cmake" --build "$out/thread" --target stress >/dev/null
# Address randomisation of newer kernels is more than older thread sanitizers can take.
TSAN_OPTIONS=halt_on_error=1 setarch -R "$out/thread/stress"

echo "==> stress test under AddressSanitizer, UBSan and LeakSanitizer"
configure address address,undefined
"$cmake" --build "$out/address" >/dev/null
ASAN_OPTIONS=detect_leaks=1 "$out/address/stress"

echo "==> tests/unit/test_native_*.py under AddressSanitizer and UBSan"
stage="$out/stage"
rm -rf "$stage" "$out"/report.*
mkdir -p "$stage"
cp -r "$root/dlpoffload" "$stage/"
rm -f "$stage"/dlpoffload/_native*.so
cp "$out"/address/_native*.so "$stage/dlpoffload/"

preload=""
for library in libasan.so libubsan.so; do
  path=$("$cc" -print-file-name="$library")
  [ "${path#/}" != "$path" ] || { echo "$cc has no $library" >&2; exit 1; }
  preload="$preload $(readlink -f "$path")"
done

# Errors of ASan and UBSan end the process; leak reports do not (exitcode=0 of LSan) and are read afterwards.
sanitized() {
  LD_PRELOAD="${preload# }" \
  ASAN_OPTIONS="detect_leaks=1:log_path=$out/report:allocator_may_return_null=1:malloc_context_size=4" \
  LSAN_OPTIONS="exitcode=0:report_objects=0:print_suppressions=0" \
  UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1:log_path=$out/report" \
  PYTHONMALLOC=malloc PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$stage" "$python" "$@"
}

cd "$root"
sanitized - "$out/pid" --import-mode=importlib -p no:cacheprovider -q tests/unit/test_native_*.py "$@" <<'PYTHON'
import os, pathlib, sys

import pytest

pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
sys.exit(pytest.main(sys.argv[2:]))
PYTHON

echo "==> tests/fuzz/capsules.py under AddressSanitizer and UBSan"
status=0
sanitized tests/fuzz/capsules.py --no-limits --examples "${FUZZ_EXAMPLES:-1000}" --trace "$out/example.txt" || status=$?
if [ "$status" != 0 ]; then
  echo "exit $status upon $(cat "$out/example.txt")" >&2
  cat "$out"/report.* >&2 || true
  exit "$status"
fi

# A report per process: a leak block opens with "Direct leak" or "Indirect leak"; frame 0 is malloc, frame 1 its caller.
"$python" - "$out" "$(cat "$out/pid")" <<'PYTHON'
import pathlib, re, sys

bad = []
for report in pathlib.Path(sys.argv[1]).glob("report.*"):
    for block in report.read_text().split("\n\n"):
        if "leak of" not in block:
            if re.search(r"ERROR: AddressSanitizer|runtime error:", block):
                bad.append(block)
        elif report.suffix == f".{sys.argv[2]}" and re.search(r"^\s*#1 .*(/native/src/|_native)", block, re.M):
            bad.append(block)
print("\n\n".join(bad))
sys.exit(f"{len(bad)} findings in the native module" if bad else 0)
PYTHON
echo "==> clean"
