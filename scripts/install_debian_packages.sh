#!/usr/bin/env bash
# Libraries that Python wheels of ours need and do not bring: the Mooncake Transfer Engine is linked
# against libibverbs, also where it only uses TCP. With --browser also Chromium, in which the tests look at
# the live page (about a minute). Does nothing where they are installed.
set -euo pipefail

if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install libibverbs by other means, or go without Mooncake" >&2
    exit 0
fi
missing=()
packages=(libibverbs1)
if [ "${1:-}" = "--browser" ]; then packages+=(chromium fonts-dejavu-core); fi
for package in "${packages[@]}"; do
    dpkg-query --show --showformat '${Status}' "$package" 2>/dev/null | grep --quiet 'ok installed' ||
        missing+=("$package")
done
[ "${#missing[@]}" -eq 0 ] && exit 0

install=(apt-get install --quiet --quiet --yes --no-install-recommends "${missing[@]}")
if [ "$(id --user)" -ne 0 ]; then
    echo "what needs these packages does not work, and its tests are skipped, until root runs: ${install[*]}" >&2
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
# The lists of a fresh image may be absent or old.
"${install[@]}" >/dev/null 2>&1 || { apt-get update --quiet --quiet && "${install[@]}"; }
