#!/usr/bin/env bash
# Runs the GPU bundle. Needs an NVIDIA driver and NVRTC and cuBLASLt (CUDA 12.4 or newer); CUPTI for profiles, and python3 with torch for
# what is compared with PyTorch. The log and the figures land in $OUT, or in out/ beside this script.
#
#   run.sh         correctness first, then a few figures, a short table last
#   run.sh bench   every bench at full size, the figures as JSON too, their tables once more last
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here" || exit 1
out=${OUT:-$here/out}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
log=$out/run.log
: >"$log"

export BCG_ROOT=$here BCG_CACHE_DIR=${BCG_CACHE_DIR:-$work/cache} RUST_BACKTRACE=1 RUST_LOG=info,bcg_runtime=warn
mode=${1:-test}
case $mode in test | bench) ;; *)
    echo "run.sh: no mode $mode; there are test (without argument) and bench" >&2
    exit 1
    ;;
esac
table=()
failed=0

step() { # name, seconds at most, command…
    local name=$1 limit=$2 begun status
    shift 2
    echo "==> $name: $*" | tee -a "$log"
    begun=$(date +%s.%N)
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n 40
    status=${PIPESTATUS[0]}
    begun=$(awk -v a="$begun" -v b="$(date +%s.%N)" 'BEGIN { printf "%.1f", b - a }')
    if [ "$status" = 0 ]; then table+=("ok    $begun s  $name"); else
        table+=("FAIL  $begun s  $name (status $status)")
        failed=1
    fi
}

model=(--model models/tiny-qwen3 --device cuda)
graphs=(--enable-breakable-cuda-graph)
problems=tests/data/mini_gsm_test.jsonl
shots=(--few-shot tests/data/mini_gsm_shots.json)

evaluate() { # name, flags…
    local name=$1
    shift
    step "eval $name" 120 bin/bcg eval "$problems" "${model[@]}" --min-accuracy 1 --dump "$work/$name.jsonl" "$@"
}

{
    cat COMMIT
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} 2>&1 | tee -a "$log"

correctness() {
    step "own kernel" 60 bin/own_kernel
    step "rules on the GPU" "${GPU_TESTS_SECONDS:-300}" bin/gpu --random "${GPU_RANDOM_PROGRAMS:-1000}"
    evaluate chat-eager
    evaluate chat-graphs "${graphs[@]}"
    evaluate few-shot-eager "${shots[@]}"
    evaluate few-shot-graphs "${shots[@]}" "${graphs[@]}"
    evaluate chat-lazy-verified "${graphs[@]}" --capture lazy --verify-graph 1 --poison-graph-memory
    step "chat: equal tokens" 10 cmp "$work/chat-eager.jsonl" "$work/chat-graphs.jsonl"
    step "chat, lazy: equal tokens" 10 cmp "$work/chat-eager.jsonl" "$work/chat-lazy-verified.jsonl"
    step "few-shot: equal tokens" 10 cmp "$work/few-shot-eager.jsonl" "$work/few-shot-graphs.jsonl"

    # A model of a real geometry against transformers in float32.
    if python3 -c 'import torch, transformers, safetensors' 2>/dev/null; then
        step "geometry: reference" 240 python3 tests/geometry/reference.py models/geometries/qwen3-8b "$work/geometry"
        step "geometry: rules" 240 bin/gpu --geometry "$work/geometry"
    else
        table+=("skip  python3 has no torch, transformers and safetensors  geometry against transformers")
    fi

    # Fast?
    step "inspect" 60 bin/bcg inspect "${model[@]}" --size 64 --html "$out/inspect.html" --trace "$out/inspect.json"
    step "inspect: kernels were traced" 10 grep -q '"cat":"kernel"' "$out/inspect.json"
    step "generate" 60 bin/bcg generate "${model[@]}" "${graphs[@]}" --chat --prompt "Raj has 10 boxes with 12 books in each. How many books is that?"
    step "matmul bench" 60 bin/matmul --json "$out/matmul.json"
    step "replay bench" 180 bin/replay --device cuda --json "$out/replay.json"
}

# Models of real geometries with random weights.
benches() {
    local geometries=(qwen3-8b qwen3-0.6b) models=() geometry peers=()
    for geometry in "${geometries[@]}"; do
        models+=(--model "models/geometries/$geometry")
        local random=(--model "models/geometries/$geometry" --load-format dummy --skip-tokenizer-init --device cuda)
        step "bench prefill $geometry" 200 bin/bcg bench prefill "${random[@]}" --profile --json "$out/prefill-$geometry.json"
        step "bench replay $geometry" 200 bin/bcg bench replay "${random[@]}" --rounds 60 --json "$out/replay-$geometry.json"
        step "bench lazy $geometry" 100 bin/bcg bench lazy "${random[@]}" --json "$out/lazy-$geometry.json"
        step "bench decode $geometry" 200 bin/bcg bench decode "${random[@]}" --profile --json "$out/decode-$geometry.json"
        step "inspect $geometry" 60 bin/bcg inspect "${random[@]}" --size 256 --html "$out/inspect-$geometry.html"
        step "bench capture $geometry" 100 bin/bcg bench capture "${random[@]}" --json "$out/capture-$geometry.json"
    done
    if python3 -c 'import torch' 2>/dev/null; then
        step "peers" 200 python3 benches/peers/kernels.py "${models[@]}" --json "$out/peers.json"
        if [ -f "$out/peers.json" ]; then peers=(--peers "$out/peers.json"); fi
    else
        table+=("skip  python3 has no torch  peers")
    fi
    step "bench kernels" 200 bin/bcg bench kernels "${models[@]}" --device cuda "${peers[@]}" --json "$out/kernels.json"
    step "replay bench" 180 bin/replay --device cuda --json "$out/replay.json"
}

if [ "$mode" = bench ]; then benches; else correctness; fi

echo
awk '/^(ceilings|kernels|prefill|replay|lazy|decode|profile|capture)$/ { shown = 1 } /^$/ { shown = 0 } shown' "$log"
grep -hE '^(accuracy|FAILED|[0-9]+ passed)|captured prefill' "$log" | uniq
printf '%s\n' "${table[@]}" | tee -a "$log"
exit "$failed"
