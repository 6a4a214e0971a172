#!/bin/sh
# Packages of a newer Debian, fetched and unpacked without installing anything. Sourced by the scripts beside it.
# shellcheck shell=sh

suite=trixie
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

debian_mirror() { # prints the one that this machine already uses for Debian's own suites; nothing where there is none
    {
        sed -n 's/^URIs: *\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null | grep -v security
        sed -n 's/^deb  *\(\[[^]]*\] *\)\{0,1\}\([^ ]*\) .*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null
    } | grep '/debian/*$' | head -n 1
}

debian_lists() { # WORK MIRROR: reads the suite's package list into a folder, with apt's own signature checks
    chmod 755 "$1"
    mkdir -p "$1/lists/partial" "$1/debs" "$1/root"
    echo "deb [signed-by=$keyring] $2 $suite main" >"$1/sources.list"
    apt_options="-o Dir::Etc::sourcelist=$1/sources.list -o Dir::Etc::sourceparts=- -o Dir::State::Lists=$1/lists -o Dir::Cache=$1 -o Dir::State::status=/dev/null -o APT::Sandbox::User=root"
    # shellcheck disable=SC2086  # the options are words
    apt-get $apt_options update -qq
}

debian_needs() { # PACKAGE: prints it and all that it depends on, one a line
    # shellcheck disable=SC2086
    apt-cache $apt_options depends --recurse --no-recommends --no-suggests --no-conflicts \
        --no-breaks --no-replaces --no-enhances "$1" | grep '^[a-z0-9]' | sort -u
}

debian_unpack() { # WORK PACKAGE...: their files, in WORK/root
    debian_work=$1
    shift
    # shellcheck disable=SC2086
    (cd "$debian_work/debs" && apt-get $apt_options download -qq "$@")
    for deb in "$debian_work"/debs/*.deb; do
        dpkg -x "$deb" "$debian_work/root"
    done
    rm -rf "$debian_work/debs" "$debian_work/root/usr/share" "$debian_work/root/var" "$debian_work/root/etc"
}
