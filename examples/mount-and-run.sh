#!/bin/sh
# Runs a command in a lazily mounted image, as an ordinary user: mount-and-run.sh IMAGE COMMAND [ARGUMENT ...]
set -eu
image=$1
shift
root=$(mktemp -d)
soci mount "$image" "$root" --detach
trap 'soci umount --lazy "$root"; rmdir "$root"' EXIT
unshare --map-root-user --root="$root" "$@"
