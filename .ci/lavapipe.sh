#!/usr/bin/env bash
# Installs Mesa's software Vulkan driver (lavapipe) on Debian and its relatives. Needs root. Exit status: 0
# installed (or there already), 1 not possible here. Nothing else depends on it: SwiftShader comes with npm.
set -euo pipefail

say() { echo "lavapipe: $*" >&2; }
has_driver() { compgen -G '/usr/share/vulkan/icd.d/lvp_icd*.json' >/dev/null; }
apt() { apt-get -qq -o Dpkg::Use-Pty=0 -o Acquire::Retries=2 "$@" >/dev/null; }

if has_driver; then say "already installed"; exit 0; fi
if [ "$(id -u)" != 0 ]; then say "not installed, and installing needs root"; exit 1; fi
if ! command -v apt-get >/dev/null; then say "no apt-get here"; exit 1; fi

export DEBIAN_FRONTEND=noninteractive
release=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
origin=()
apt update || { say "the package lists could not be read"; exit 1; }

if [ "$release" = bookworm ]; then
  # Debian 12's own Mesa is older than Dawn accepts. Backports live on the mirror that this machine uses
  # already.
  mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Identifier: Packages' \
    | awk -v release="$release" '$2 == release { print $1; exit }')
  if [ -z "$mirror" ]; then say "no Debian mirror is configured"; exit 1; fi
  if ! apt-get indextargets --format '$(RELEASE)' | grep -qx "$release-backports"; then
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    signed=""; [ -e "$keys" ] && signed="[signed-by=$keys] "
    echo "deb $signed$mirror $release-backports main" > /etc/apt/sources.list.d/krait-backports.list
    apt update || { say "backports could not be read"; exit 1; }
  fi
  origin=(-t "$release-backports")
fi

packages=(mesa-vulkan-drivers libvulkan1)
apt install --no-install-recommends -y "${origin[@]}" "${packages[@]}" || { say "apt-get failed"; exit 1; }
if ! has_driver; then say "the package brought no lavapipe driver"; exit 1; fi
say "installed"
