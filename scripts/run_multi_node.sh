#!/usr/bin/env bash
# Start a system whose instances run on several hosts, from one YAML file.
#
#   scripts/run_multi_node.sh --config F [--print] [--ssh COMMAND]
#
# Starts every instance on its `host` over ssh (those of this host directly), and the scheduler with
# the HTTP server here, in the foreground. When that ends, so do the instances. Every host needs this
# repository at the same path, the same YAML file, the model, and the key file.
#
#   --print        only print what to run on which host
#   --ssh COMMAND  what to use instead of `ssh -tt`; called as COMMAND HOST SHELL-COMMAND
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
config='' print='' ssh='ssh -tt'
while [ $# -gt 0 ]; do
    case $1 in
        --config) config=${2:?--config needs a file}; shift 2 ;;
        --ssh) ssh=${2:?--ssh needs a command}; shift 2 ;;
        --print) print=yes; shift ;;
        *) sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
    esac
done
[ -n "$config" ] || { echo "error: --config is missing" >&2; exit 2; }
config=$(realpath "$config")
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

plan=$("$python" -m hbserve.system.host_plan "$config")
command_for() {
    printf 'cd %q && PYTHONPATH=%q exec %q scripts/start_pd_disagg.py --config %q --instance-id %q' \
        "$root" "$PYTHONPATH" "$python" "$config" "$1"
}
scheduler=("$python" scripts/start_cpu_scheduler.py --config "$config")

if [ -n "$print" ]; then
    while IFS=$'\t' read -r host _ instance; do
        echo "$host: $(command_for "$instance")"
    done <<<"$plan"
    echo "here: cd $(printf %q "$root") &&$(printf ' %q' "${scheduler[@]}")"
    exit 0
fi

children=()
end() {
    trap - EXIT
    [ "${#children[@]}" -eq 0 ] || kill "${children[@]}" 2>/dev/null || true
    wait
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
while IFS=$'\t' read -r host where instance; do
    if [ "$where" = here ]; then
        bash -c "$(command_for "$instance")" </dev/null &
    else
        $ssh "$host" "$(command_for "$instance")" </dev/null &
    fi
    children+=($!)
done <<<"$plan"
cd "$root"
"${scheduler[@]}" &
children+=($!)
wait "$!"
