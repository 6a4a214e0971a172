#!/bin/sh
# Builds the lifecycle of Cloud Native Buildpacks into one folder, from its Go module, touching nothing else.
#
# It is what `pack` runs, without a daemon: detector, analyzer, restorer, builder, exporter, creator and rebaser are
# names of one program; launcher is the process 1 of the images it makes.
#
#   scripts/install-lifecycle.sh [FOLDER]      default: ~/.local/share/gpufn/lifecycle
set -eu

version=0.20.8
module=github.com/buildpacks/lifecycle
folder=${1:-${XDG_DATA_HOME:-$HOME/.local/share}/gpufn/lifecycle}

if [ -x "$folder/launcher" ] && [ "$(cat "$folder/version" 2>/dev/null)" = "$version" ]; then
    echo "lifecycle: $version in $folder"
    exit 0
fi
# /usr/local/go is where Go's own archive goes; not every non-login shell has it on its PATH.
PATH=$PATH:/usr/local/go/bin
command -v go >/dev/null || {
    echo "install-lifecycle: no Go here." >&2
    echo "The lifecycle $version is built from its Go module." >&2
    echo "Install Go 1.24 or newer (Debian 12's is too old: https://go.dev/dl/), or unpack a released lifecycle into $folder." >&2
    exit 1
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A module of our own that wants the two commands: `go install MODULE@VERSION` refuses modules with replacements.
cat >"$work/go.mod" <<MODULE
module gpufn.dev/lifecycle

go 1.24

require $module v$version
MODULE
cat >"$work/tools.go" <<TOOLS
//go:build tools

package tools

import (
	_ "$module/cmd/launcher"
	_ "$module/cmd/lifecycle"
)
TOOLS
echo "lifecycle: building $version (a minute on an idle machine, the first time)" >&2
cd "$work"
# A newer Go than the one here is fetched as a module when the lifecycle asks for it. `-mod=mod` writes go.sum on the way:
# `go mod tidy` would fetch what the tests of all dependencies need.
export GOTOOLCHAIN=auto GOFLAGS=-mod=mod CGO_ENABLED=0
go build -trimpath \
    -ldflags "-s -w -buildid= -X $module/cmd.Version=$version" \
    -o "$work/bin/" "$module/cmd/lifecycle" "$module/cmd/launcher" >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    echo "install-lifecycle: the build failed. $(go version) is here; Go 1.24 or newer and a Go module proxy are needed." >&2
    exit 1
}
for phase in detector analyzer restorer builder exporter creator rebaser; do
    ln -s lifecycle "$work/bin/$phase"
done
# What the build image says the lifecycle can do: https://github.com/buildpacks/rfcs, RFC 11.
cat >"$work/bin/lifecycle.toml" <<DESCRIPTOR
[lifecycle]
version = "$version"

[apis.buildpack]
supported = ["0.7", "0.8", "0.9", "0.10", "0.11"]

[apis.platform]
supported = ["0.7", "0.8", "0.9", "0.10", "0.11", "0.12", "0.13", "0.14"]
DESCRIPTOR
echo "$version" >"$work/bin/version"
chmod 755 "$work/bin"

mkdir -p "$(dirname "$folder")"
rm -rf "$folder.new"
cp -R -P "$work/bin" "$folder.new"
rm -rf "$folder"
mv "$folder.new" "$folder"
echo "lifecycle: $version in $folder"
