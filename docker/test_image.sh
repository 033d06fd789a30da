#!/bin/sh
# Builds the CPU image for real, starts the server in it, and asks it for tokens; then runs the
# steps of the CUDA image, on an image that has SGLang for CPUs. For a Debian machine with root
# and no container engine: `buildah` with `--isolation chroot` needs none.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
image=localhost/orbitflow-cpu
base=localhost/orbitflow-base
with_sglang=localhost/orbitflow-with-sglang

if ! command -v buildah >/dev/null || ! command -v debootstrap >/dev/null; then
  apt-get update -q && apt-get install -q -y --no-install-recommends buildah debootstrap
fi

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  echo "Making a base image with Python from Debian"
  debootstrap --variant=minbase --include=python3,python3-venv,python3-dev,gcc,libc6-dev,ca-certificates \
    bookworm "$work/root" ${DEBIAN_MIRROR:-}
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/root" /
  buildah commit --quiet --rm "$container" "$base"
fi

echo "Fetching packages"
# By this machine's pip, whatever it needs to reach them: the image then needs no network.
fetch() { .venv/bin/python -m pip download --quiet --dest "$work/wheels" --python-version 3.11 \
  --only-binary :all: "$@"; }
fetch torch==2.13.0
fetch --no-deps -r requirements/cpu.txt
printf '[global]\nno-index = true\nfind-links = /wheels\n' > "$work/pip.conf"
build() { # BASE DOCKERFILE IMAGE
  buildah bud --build-arg BASE="$1" --volume "$work/pip.conf:/etc/pip.conf:ro" \
    --volume "$work/wheels:/wheels:ro" -f "$2" -t "$3" .
}
build "$base" docker/Dockerfile.cpu "$image"

model=$(make -s tiny-model | tail -1)
container=$(buildah from "$image")
trap 'buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT
echo "Starting the server in the image"
buildah run --network host --volume "$model:/model:ro" "$container" -- sh -euc '
  log=$(mktemp)
  python3 -m sglang.launch_server --enable-orbitflow --host 127.0.0.1 --port 30123 \
    --dtype float32 --model-path /model --orbitflow-arena-tokens 2048 \
    --orbitflow-host-memory-gb 0.2 --skip-server-warmup >"$log" 2>&1 &
  server=$!
  trap "kill $server" EXIT
  for second in $(seq 300); do
    PORT=30123 python3 /usr/local/bin/orbitflow-health >/dev/null 2>&1 && break
    kill -0 $server 2>/dev/null || { cat "$log"; exit 1; }
    sleep 1
  done
  python3 - <<"PYTHON"
import getpass, json, urllib.request

def post(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        "http://127.0.0.1:30123" + path, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=120))

answer = post("/generate", {"input_ids": list(range(1, 300)), "sampling_params": {
    "temperature": 0, "ignore_eos": True, "max_new_tokens": 16}})
state = post("/server_info")["internal_states"][0]["orbitflow"]
assert len(answer["output_ids"]) == 16, answer
assert state["policy"] == "orbitflow" and not state["failed_idle_checks"], state
assert getpass.getuser() == "orbitflow", getpass.getuser()
print("16 tokens from the image, as user", getpass.getuser())
PYTHON
'

echo "Running the steps of the CUDA image"
buildah run --user root "$container" -- sh -euc 'python3 -m orbitflow_sglang.patches revert
  python3 -m pip uninstall --quiet --yes orbitflow-sglang
  userdel --remove orbitflow'
buildah config --user root --env SGLANG_PLATFORM- "$container"
buildah commit --quiet "$container" "$with_sglang"
build "$with_sglang" docker/Dockerfile localhost/orbitflow-cuda-steps
steps=$(buildah from localhost/orbitflow-cuda-steps)
trap 'buildah rm "$container" "$steps" >/dev/null; rm -rf "$work"' EXIT
buildah run "$steps" -- python3 -m orbitflow_sglang.patches check
echo "make image-test: passed"
