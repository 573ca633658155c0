#!/usr/bin/env bash
# recordings.sh FOLDER PACKAGE…: unpack Debian packages into a folder. Needs apt-get, dpkg and a network, but no rights.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: recordings.sh FOLDER PACKAGE…" >&2; exit 2; }
for tool in apt-get dpkg; do
    command -v "$tool" >/dev/null || { printf '%s\n' >&2 \
        "recordings.sh: this system has no $tool, which gets the recordings of speech and music that some tests need." \
        "Run the tests on Debian or Ubuntu (a container will do). Or get these packages there, unpack them into $1" \
        "with dpkg -x, and say that they are there with: touch $1/.recordings" \
        "  ${*:2}" \
        "make demo, make lab and make docs work without them."; exit 1; }
done
folder=$(realpath -m "$1")
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir -p state/lists/partial cache/archives/partial "$folder"
apt=(apt-get -qq -o Dir::State="$work/state" -o Dir::Cache="$work/cache" -o Dir::State::status=/var/lib/dpkg/status
     -o APT::Sandbox::User=root)  # lists and archives of our own
"${apt[@]}" update && "${apt[@]}" download "$@" ||
    { echo "recordings.sh: apt-get could not download $*: is there a network, and are these in the system's sources?" >&2; exit 1; }
for deb in *.deb; do dpkg -x "$deb" "$folder"; done
