#!/bin/bash
# Makes the layers of the images that cold starts are measured with: `image.sh DIRECTORY NAME...`.
#
# DIRECTORY/NAME.tar.gz appears when it is whole; one that is there is not made again. Each layer is made on top of those
# before it by an overlay, so what is in it is what a build would have put there: files that were deleted become
# white-outs, dates and owners are those of the packages. Names: base (Debian, minimal), python (its python3), hep (numpy
# and scipy), cppyy (that and a compiler, on top of hep), ml (tensorflow-cpu).
set -euo pipefail
directory=$(realpath -m "$1")
shift
mkdir -p "$directory"
work=$(mktemp -d "$directory/making.XXXXXX")
mounted=
clean() {
    if [ -n "$mounted" ]; then umount "$mounted"; fi
    rm -rf "$work"
}
trap clean EXIT
suite=bookworm

unpacked() { # a layer's tree, for those above it
    if [ ! -d "$directory/$1.tree" ]; then
        mkdir "$work/$1.tree"
        tar -xzpf "$directory/$1.tar.gz" -C "$work/$1.tree"
        mv "$work/$1.tree" "$directory/$1.tree"
    fi
    echo "$directory/$1.tree"
}

packed() { # tree, name
    # What overlays mark deletions with is not what images do.
    find "$1" -type c | while read -r gone; do
        rm "$gone"
        touch "$(dirname "$gone")/.wh.$(basename "$gone")"
    done
    tar --sort=name --numeric-owner -C "$1" -c . | gzip -n6 > "$work/$2.tar.gz"
    mv "$work/$2.tar.gz" "$directory/$2.tar.gz"
}

packages() { # wheels, for the Python of the image
    pip install --quiet --root-user-action=ignore --target "$work/upper/usr/local/lib/python3.11/dist-packages" \
        --only-binary=:all: --python-version 3.11 --implementation cp --platform manylinux2014_x86_64 --no-compile "$@"
    chroot "$work/root" python3 -m compileall -q /usr/local/lib/python3.11/dist-packages || true
}

debian() { # packages of the image's Debian
    cp /etc/resolv.conf "$work/root/etc/resolv.conf"
    chroot "$work/root" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "$@" > "$work/log" 2>&1 || { tail "$work/log" >&2; exit 1; }
    rm -rf "$work"/root/var/cache/apt/* "$work"/root/etc/resolv.conf
}

cppyy() { # its interpreter comes as a wheel; the rest of it is compiled in the image
    debian g++ python3-dev python3-pip
    # It asks the same places as this machine's pip, and believes the same authorities.
    local authorities=/etc/ssl/certs/ca-certificates.crt
    cp /etc/resolv.conf "$work/root/etc/resolv.conf"
    cp "$work/root$authorities" "$work/authorities"
    cp "$authorities" "$work/root$authorities"
    chroot "$work/root" pip install --quiet --root-user-action=ignore --break-system-packages --no-cache-dir cppyy
    cp "$work/authorities" "$work/root$authorities"
    # The first import compiles the headers of the standard library.
    chroot "$work/root" python3 -c 'import cppyy'
    rm -rf "$work"/root/etc/resolv.conf "$work"/root/tmp/* "$work"/root/root/.cache
}

below=
for name in "$@"; do
    if [ ! -f "$directory/$name.tar.gz" ]; then
        rm -rf "$work/upper" "$work/inside" "$directory/$name.tree"
        mkdir -p "$work/upper" "$work/inside" "$work/root"
        if [ "$name" = base ]; then
            debootstrap --variant=minbase "$suite" "$work/upper" > "$work/log" || { tail "$work/log" >&2; exit 1; }
            rm -rf "$work"/upper/var/cache/apt/archives/*.deb "$work"/upper/dev/* "$work"/upper/proc/*
        else
            mount -t overlay overlay -o "lowerdir=$below,upperdir=$work/upper,workdir=$work/inside" "$work/root"
            mounted=$work/root
            case $name in
                python) debian python3 ;;
                hep) mkdir -p "$work/upper/usr/local/lib/python3.11/dist-packages"; packages numpy scipy ;;
                cppyy) cppyy ;;
                ml) mkdir -p "$work/upper/usr/local/lib/python3.11/dist-packages"; packages tensorflow-cpu ;;
                *) echo "image.sh: no layer $name" >&2; exit 2 ;;
            esac
            umount "$work/root"
            mounted=
        fi
        packed "$work/upper" "$name"
    fi
    tree=$(unpacked "$name")
    below=$tree${below:+:$below}
done
