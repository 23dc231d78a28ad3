#!/usr/bin/env bash
# What a node of cluster/aws.yaml needs before ray starts. Each part may run again.
#   prepare    room for shared experts, a fast disk for checkpoints, this package in ~/venv
#   secrets    on the head: ray's token and the API key, where there are none yet
#   pin-image  on the head: workers launch from the image that the head runs
set -euo pipefail

ours="$HOME/.buddymoe"

# Prints a folder on the instance's own NVMe, or one on the root disk where there is none.
fast_folder() {
  local disk
  if mountpoint -q /opt/dlami/nvme; then # the image has mounted it
    echo /opt/dlami/nvme
    return
  fi
  disk=$(lsblk -dnpo NAME,MODEL | awk '/Instance Storage/ { print $1; exit }')
  if [ -n "$disk" ] && ! mountpoint -q /mnt/nvme; then
    blkid "$disk" > /dev/null || sudo mkfs.ext4 -q "$disk" # only a disk that holds nothing
    sudo mkdir -p /mnt/nvme
    sudo mount "$disk" /mnt/nvme
  fi
  if mountpoint -q /mnt/nvme; then echo /mnt/nvme; else echo "$HOME/.cache"; fi
}

prepare() {
  local folder
  # Host tiers and ray's object store live in /dev/shm, which is half of the memory unless told.
  sudo mount -o remount,size=80% /dev/shm
  folder="$(fast_folder)/huggingface"
  sudo mkdir -p "$folder"
  sudo chown "$(id -u):$(id -g)" "$folder"

  sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y python3.12-venv python3.12-dev gcc # triton compiles its launchers
  [ -x "$HOME/venv/bin/python" ] || python3.12 -m venv "$HOME/venv"
  "$HOME/venv/bin/pip" install -q "$HOME/buddymoe[gpu]" 'boto3>=1.34,<2' # boto3: the head launches workers

  mkdir -p -m 700 "$ours"
  cat > "$ours/env" << EOF
export PATH="$HOME/venv/bin:\$PATH" RAY_AUTH_MODE=token HF_HOME="$folder"
if [ -s "$ours/api_key" ]; then export BUDDYMOE_API_KEY="\$(cat "$ours/api_key")"; fi
EOF
  # first, because Ubuntu's .bashrc ends early in a shell that nobody types into
  touch "$HOME/.bashrc"
  if ! grep -qxF ". $ours/env" "$HOME/.bashrc"; then
    { echo ". $ours/env"; cat "$HOME/.bashrc"; } > "$ours/bashrc"
    cp "$ours/bashrc" "$HOME/.bashrc"
  fi

  if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
    "$HOME/venv/bin/python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || {
      echo "torch finds no GPU where nvidia-smi does: its CUDA build is newer than the driver." >&2
      echo "hint: use a newer image, or install a build of torch for this driver into ~/venv" >&2
      exit 1
    }
  fi
}

secrets() {
  umask 077
  mkdir -p "$HOME/.ray" "$ours"
  [ -s "$HOME/.ray/auth_token" ] || "$HOME/venv/bin/ray" get-auth-token --generate > /dev/null
  [ -s "$ours/api_key" ] || "$HOME/venv/bin/python" -c 'import secrets; print("sk-" + secrets.token_hex(24))' > "$ours/api_key"
  chmod 600 "$HOME/.ray/auth_token" "$ours/api_key"
}

pin_image() {
  local metadata=http://169.254.169.254/latest token image
  token=$(curl -sfX PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/api/token")
  image=$(curl -sf -H "X-aws-ec2-metadata-token: $token" "$metadata/meta-data/ami-id")
  # the head's role may launch instances, not read SSM's parameters
  sed -i "s|resolve:ssm:[^\"]*|$image|g" "$HOME/ray_bootstrap_config.yaml"
}

case "${1:-}" in
  prepare) prepare ;;
  secrets) secrets ;;
  pin-image) pin_image ;;
  *)
    echo "usage: node.sh prepare|secrets|pin-image" >&2
    exit 2
    ;;
esac
