#!/bin/bash
# Builds a real Kubernetes and Knative Serving for the tests, from Go modules: servers, and what they are set up with.
#
#   scripts/install-kubernetes.sh [--where] [FOLDER]      default: ~/.cache/gpufn/kubernetes
#
#   --where   build nothing: print a line NAME FOLDER for each part, and fail where one is missing
#
# Each part is a folder NAME-VERSION of its own. A part that is there is kept, and one that is built appears whole or not
# at all. With nothing built before it takes eight minutes on two cores, most of it Kubernetes; later runs take no time.
# Needs Go, a C compiler (the kubelet) and a module proxy.
set -euo pipefail

kubernetes=1.36.3 staging=0.36.3 # the modules that Kubernetes calls staging have versions of their own
knative=0.42.2                   # Serving 1.15: newer ones need a knative.dev/pkg that module proxies do not serve
etcd=3.6.16
coredns=1.14.7
kwok=0.8.0
parts=("etcd $etcd" "kubernetes $kubernetes" "knative $knative" "kwok $kwok" "coredns $coredns")

where='' folder=${GPUFN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gpufn}/kubernetes
for word; do
    case $word in
    --where) where=yes ;;
    -*) sed -n 's/^# \{0,1\}//; 2,11p' "$0" >&2 && exit 2 ;;
    *) folder=$word ;;
    esac
done

if [ -n "$where" ]; then
    for part in "${parts[@]}"; do
        place=$folder/${part/ /-}
        [ -d "$place" ] || { echo "install-kubernetes: no $part in $folder. Run make kubernetes." >&2 && exit 1; }
        echo "${part% *} $place"
    done
    exit 0
fi

# /usr/local/go is where Go's own archive goes; not every non-login shell has it on its PATH.
PATH=$PATH:/usr/local/go/bin
# A newer Go than the one here is fetched as a module when a part asks for it. `-mod=mod` writes go.sum on the way:
# `go mod tidy` would fetch what the tests of all dependencies need.
export GOTOOLCHAIN=auto GOFLAGS=-mod=mod

module() { # GO REQUIREMENT IMPORT...: a module of our own here, since the parts' dependencies disagree
    local go=$1 require=$2
    shift 2
    printf 'module gpufn.dev/testbed\n\ngo %s\n\nrequire %s\n' "$go" "$require" >go.mod
    { printf '//go:build tools\n\npackage tools\n\nimport (\n' && printf '\t_ "%s"\n' "$@" && echo ')'; } >tools.go
}

compile() { # OUT LDFLAGS PACKAGE...
    local out=$1 flags=$2
    shift 2
    go build -trimpath -ldflags "-s -w -buildid= $flags" -o "$out" "$@"
}

build_etcd() {
    export CGO_ENABLED=0
    module 1.26.0 "go.etcd.io/etcd/server/v3 v$etcd" go.etcd.io/etcd/server/v3
    compile "$1/etcd" "" go.etcd.io/etcd/server/v3
}

build_coredns() { # with the plugins that a cluster's names need, and no others
    export CGO_ENABLED=0
    printf 'module gpufn.dev/testbed\n\ngo 1.26.0\n\nrequire github.com/coredns/coredns v%s\n' "$coredns" >go.mod
    cat >main.go <<'GO'
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/ready"
)

func main() {
	dnsserver.Directives = []string{"ready", "errors", "kubernetes"}
	coremain.Run()
}
GO
    compile "$1/coredns" "" .
}

build_kubernetes() {
    local commands=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl)
    local source version=k8s.io/component-base/version
    module 1.26.0 "k8s.io/kubernetes v$kubernetes" "${commands[@]/#/k8s.io/kubernetes/cmd/}"
    source=$(go mod download -json "k8s.io/kubernetes@v$kubernetes" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
    # In its own repository these modules are folders.
    sed -n "s#^[[:space:]]*\([^ ]*\) => ./staging/src/.*#replace \1 => \1 v$staging#p" "$source" >>go.mod
    compile "$1/" "-X $version.gitVersion=v$kubernetes -X $version.gitMajor=1 -X $version.gitMinor=36" \
        "${commands[@]/#/k8s.io/kubernetes/cmd/}"
    # The process that holds a pod's namespaces, and is an image of its own.
    printf '#include <unistd.h>\nint main(void) { for (;;) pause(); }\n' >pause.c
    cc -static -Os -s -o "$1/pause" pause.c
}

build_knative() { # its programs become images with nothing else in them
    export CGO_ENABLED=0
    local commands=(activator autoscaler controller queue webhook)
    module 1.22.0 "knative.dev/serving v$knative" "${commands[@]/#/knative.dev/serving/cmd/}"
    compile "$1/" "" "${commands[@]/#/knative.dev/serving/cmd/}"
    local name
    for name in serving networking caching; do
        mkdir -p "$1/manifests"
        cp -R --no-preserve=mode "$(go list -m -f '{{.Dir}}' "knative.dev/$name")/config" "$1/manifests/$name"
    done
}

build_kwok() { # and the stages by which its nodes and pods live
    export CGO_ENABLED=0
    module 1.26.0 "sigs.k8s.io/kwok v$kwok" sigs.k8s.io/kwok/cmd/kwok
    compile "$1/" "" sigs.k8s.io/kwok/cmd/kwok
    cp -R --no-preserve=mode "$(go list -m -f '{{.Dir}}' sigs.k8s.io/kwok)/kustomize/stage" "$1/stages"
}

leave() {
    if [ -n "$building" ]; then
        tail -n 20 "$work/log" >&2
        echo "install-kubernetes: building $building failed. $(go version) is here; a Go module proxy is needed." >&2
    fi
    rm -rf "$work"
}

mkdir -p "$folder"
exec 9>"$folder/lock"
flock 9 # another run may be building the same
building='' work=$(mktemp -d)
trap leave EXIT
for part in "${parts[@]}"; do
    name=${part% *} place=$folder/${part/ /-}
    [ -d "$place" ] && continue
    command -v go >/dev/null || {
        echo "install-kubernetes: no Go here." >&2
        echo "$name is built from its Go module." >&2
        echo "Install Go 1.24 or newer (Debian 12's is too old: https://go.dev/dl/)." >&2
        exit 1
    }
    echo "kubernetes: building $part" >&2
    rm -rf "$place.new" "$work/module"
    mkdir "$place.new" "$work/module"
    building=$part
    (cd "$work/module"; "build_$name" "$place.new") >"$work/log" 2>&1 # no `||`: it would turn -e off inside
    building=''
    mv "$place.new" "$place"
done
echo "kubernetes: $(IFS=,; echo "${parts[*]}" | sed 's/,/, /g') in $folder"
