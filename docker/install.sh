#!/bin/sh
# Steps of both images: `install.sh cpu` into /opt/venv, `install.sh cuda` into the Python that
# SGLang's image has. Behind it the source tree is gone: what runs is the wheel.
set -eu
kind=$1
source=/opt/orbitflow
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

case $kind in
cpu)
  python3 -m venv /opt/venv
  python=/opt/venv/bin/python3
  $python -m pip install --quiet torch==2.13.0
  $python -m pip install --quiet --no-deps -r "$source/requirements/cpu.txt"
  ;;
cuda)
  python=$(command -v python3)
  $python -c 'import sglang; print("found SGLang", sglang.__version__)'
  # SGLang's image has everything else.
  $python -m pip install --quiet 'setuptools>=77'
  ;;
*)
  echo "usage: install.sh cpu|cuda" >&2
  exit 2
  ;;
esac

wheel=$(mktemp -d)
$python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheel" "$source"
$python -m pip install --quiet --no-deps "$wheel"/*.whl
$python -m orbitflow_sglang.patches apply
$python -m orbitflow_sglang.patches check

install -m 644 "$source/docker/health.py" /usr/local/bin/orbitflow-health
useradd --create-home --uid 10001 orbitflow
install -d -o orbitflow -g orbitflow /home/orbitflow/.cache  # a volume mounted there is writable
rm -rf "$source" "$wheel"
