#!/usr/bin/env bash
# recordings.sh FOLDER PACKAGE…: unpack Debian packages into a folder. Needs apt-get and dpkg, and not to be root.
set -euo pipefail
folder=$(realpath -m "$1")
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir -p state/lists/partial cache/archives/partial "$folder"
apt=(apt-get -qq -o Dir::State="$work/state" -o Dir::Cache="$work/cache" -o Dir::State::status=/var/lib/dpkg/status
     -o APT::Sandbox::User=root)  # lists and archives of our own
"${apt[@]}" update
"${apt[@]}" download "$@"
for deb in *.deb; do dpkg -x "$deb" "$folder"; done
