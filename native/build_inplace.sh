#!/usr/bin/env bash
# Build the native module into the source tree, so that `import dlpoffload` works there.
#
#   native/build_inplace.sh                      with $PYTHON (default python3), which must have apache-tvm-ffi
#   native/build_inplace.sh -DCMAKE_BUILD_TYPE=Debug
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}")
build="$root/build/inplace-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')"

cmake -S "$root/native" -B "$build" -DPython_EXECUTABLE="$python" -DDLPOFFLOAD_WERROR=ON "$@" >&2
cmake --build "$build" --parallel >&2
for module in "$build"/_native*.so; do
  # A rename replaces the file in one step: whoever has the old one loaded keeps it.
  target="$root/dlpoffload/$(basename "$module")"
  cp "$module" "$target.$$"
  mv "$target.$$" "$target"
  echo "$target"
done
