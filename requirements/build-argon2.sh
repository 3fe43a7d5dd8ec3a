#!/bin/sh
# Build argon2-cffi-bindings for a processor, and leave the wheel in FOLDER: build-argon2.sh PYTHON FOLDER.
# CFLAGS says for which. Without any it is the processor at hand on x86-64, and nothing in particular elsewhere.
# The published wheel knows SSE2 only, which costs half the logins. Sources and tools are pinned by their hashes.
set -eu
python=$1 folder=$2 here=$(dirname "$0")

if [ -z "${CFLAGS:-}" ]; then
    case $(uname -m) in x86_64) CFLAGS="-O3 -march=native" ;; *) CFLAGS="-O3" ;; esac
fi
export CFLAGS

rm -rf "$folder"
mkdir -p "$folder"
"$python" -m venv "$folder/tools"
pip="$folder/tools/bin/python -m pip --disable-pip-version-check -q"
$pip install --no-deps --only-binary=:all: --require-hashes -r "$here/fast-hash.txt"
awk '/^[a-z]/ { wanted = /^argon2-cffi-bindings==/ } wanted' "$here/fast-hash.txt" > "$folder/argon2.txt"
$pip wheel --no-deps --no-cache-dir --no-build-isolation --no-binary=:all: --require-hashes -r "$folder/argon2.txt" -w "$folder"
rm -rf "$folder/tools"
