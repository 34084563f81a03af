#!/usr/bin/env bash
# What needs four or eight GPUs of one host, in at most ten minutes: tests, tensor and expert parallelism, and systems of
# several instances beside each other. Logs, JSON and a table go to the folder OUT.
#
#   benchmarks/many_gpus.sh NUM_GPUS OUT TRACE...      (traces as for `python -m benchmarks compare`)
#
# PYTHON names the interpreter (default: python3). A part that fails or runs out of its time is reported; the rest goes on.
set -uo pipefail

num_gpus=${1:?number of GPUs} out=${2:?folder for results}
shift 2
traces=("$@")
python=${PYTHON:-python3}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
half=$((num_gpus / 2))

part() { # NAME SECONDS COMMAND...
    local name=$1 limit_s=$2 began=$SECONDS
    shift 2
    timeout "$limit_s" "$@" >"$out/$name.log" 2>&1
    echo "$name: exit $?, $((SECONDS - began)) s: $(grep -E 'median|passed|failed' "$out/$name.log" | tail -1)"
}

offline() { # NAME SECONDS MODEL OPTIONS...
    local name=$1 limit_s=$2 model=$3
    shift 3
    part "$name" "$limit_s" "$python" -m hbserve.bench offline --model "$model" --load-format dummy --repeats 2 \
        --json "$out/$name.json" "$@"
}

on_all=(--engine-arg "tensor_parallel_size=$num_gpus")
on_half=(--engine-arg "tensor_parallel_size=$half")

part tests 120 "$python" -m pytest -q -m gpu tests/system/test_tensor_parallel.py tests/system/test_short_dtype_logits.py \
    -k "ranks or gpus or tensor_parallel"
offline tp_all_70b_nano 90 llama-3.1-70b "${on_all[@]}"
offline tp_all_70b_one_stream 60 llama-3.1-70b "${on_all[@]}" --preset one-stream
offline tp_half_32b_nano 70 qwen3-32b "${on_half[@]}"
offline tp_all_32b_nano 70 qwen3-32b "${on_all[@]}"
offline moe_tensor_parallel 60 qwen3-30b-a3b "${on_all[@]}"
offline moe_expert_parallel 60 qwen3-30b-a3b "${on_all[@]}" --engine-arg expert_parallel=true

if ((${#traces[@]})); then
    systems=("unified*$num_gpus" "${half}p${half}d" "$((num_gpus - 1))p1d" "semi_pd@100-100*$num_gpus")
    arguments=()
    for system in "${systems[@]}"; do arguments+=(--system "$system"); done
    for trace in "${traces[@]}"; do arguments+=(--trace "$trace"); done
    part systems 180 "$python" -m benchmarks compare --model qwen3-8b "${arguments[@]}" --slo-scale 7.5:10 --attainment 0.11 \
        --duration 8 --rates "$((8 * num_gpus))" --max-input-len 32768 --max-output-len 512 --max-model-len 36864 \
        --time-limit 170 --json "$out/systems.json"
    grep -A40 "^measured, and" "$out/systems.log"
fi
