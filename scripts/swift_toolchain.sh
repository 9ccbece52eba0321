#!/usr/bin/env bash
# Swift for Linux: a Debian trixie root with the package swiftlang, made once, in a cache outside the checkout.
#   scripts/swift_toolchain.sh               makes the root where it is missing and prints its path
#   scripts/swift_toolchain.sh COMMAND...    runs a command inside it, in this checkout's ios_demo
# LORDBA_SWIFT_CACHE names the cache (default: lordba-swift in the user's cache folder); it takes 3.3 GB.
# The host stays untouched: mounts live in a namespace of their own, which ends with the command.
set -euo pipefail

cache=${LORDBA_SWIFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lordba-swift}
root=$cache/trixie
project=$(cd "$(dirname "$0")/.." && pwd)
as_other=()
[ "$(id -u)" = 0 ] || as_other=(--map-root-user --map-auto)

make_root() {
  if ! command -v mmdebstrap >/dev/null; then
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root apt-get update -qq
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends mmdebstrap >/dev/null
  fi
  # the system's own mirror where it names one; mmdebstrap knows Debian's otherwise
  mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    grep -oEm 1 '^(URIs:|deb) +https?://[^ ]+/debian/? *' | grep -oE 'https?://[^ ]+' || true)
  rm -rf --one-file-system "$root.partial"
  unshare --mount --pid --fork --kill-child "${as_other[@]}" mmdebstrap --quiet --mode=root --variant=minbase \
    --include=swiftlang,libc6-dev,libstdc++-14-dev,git,ca-certificates,pkg-config \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    trixie "$root.partial" ${mirror:+"$mirror"}
  mv "$root.partial" "$root"
}

if [ ! -d "$root" ]; then
  mkdir -p "$cache"
  exec 9>"$cache/lock" # a second caller waits for the first one's root
  flock 9
  [ -d "$root" ] || make_root >&2
  exec 9>&-
fi
if [ $# = 0 ]; then
  echo "$root"
  exit
fi

enter='
mkdir -p "$1/proc" "$1/dev" "$1/tmp" "$1$2"
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --bind "$2" "$1$2"
root=$1 project=$2
shift 2
exec chroot "$root" /usr/bin/env -i HOME=/root LANG=C.UTF-8 PATH=/usr/libexec/swift/bin:/usr/bin:/bin \
  sh -c "cd \"\$0/ios_demo\" && exec \"\$@\"" "$project" "$@"
'
exec unshare --mount --pid --fork --kill-child "${as_other[@]}" sh -euc "$enter" sh "$root" "$project" "$@"
