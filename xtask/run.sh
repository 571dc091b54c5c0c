#!/usr/bin/env bash
# Runs the GPU bundle. Needs an NVIDIA driver and NVRTC and cuBLASLt (CUDA 12.4 or newer); CUPTI for profiles, and python3 with torch for
# what is compared with PyTorch. The log and the figures land in $OUT, or in out/ beside this script.
#
#   run.sh                     correctness first, then a few figures, a short table last
#   run.sh test MODEL…         the same for some models only: tiny checkpoints and geometries, by their folders' names
#   run.sh bench               every bench at full size, the figures as JSON too, their tables once more last
#   run.sh bench GEOMETRY…     the same for some geometries only
#   run.sh serve [GEOMETRY…]   the server under load, over HTTP: throughput, time to first token, rates up to saturation
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
case $mode in test | bench | serve) ;; *)
    echo "run.sh: no mode $mode; there are test (without argument), bench and serve" >&2
    exit 1
    ;;
esac
chosen=("${@:2}")
for name in "${chosen[@]}"; do
    if [ ! -d "models/$name" ] && [ ! -d "models/geometries/$name" ]; then
        echo "run.sh: no model $name; there are $(cd models && echo tiny-*) $(cd models/geometries && echo *)" >&2
        exit 1
    fi
done
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

graphs=(--enable-breakable-cuda-graph)
problems=tests/data/mini_gsm_test.jsonl
shots=(--few-shot tests/data/mini_gsm_shots.json)

# What transformers solves of the 200 problems, as chat and with five examples.
accuracy() {
    case $1-$2 in tiny-nemotron-h-few-shot) echo 0.99 ;; *) echo 1 ;; esac
}

# All names, or those of them that were chosen.
pick() { # names…
    local name
    for name in "$@"; do
        if [ ${#chosen[@]} = 0 ] || [[ " ${chosen[*]} " == *" $name "* ]]; then echo "$name"; fi
    done
}

evaluate() { # checkpoint, style, name, flags…
    local checkpoint=$1 style=$2 name=$3
    shift 3
    if [ "$style" = few-shot ]; then set -- "${shots[@]}" "$@"; fi
    step "eval $checkpoint $style $name" 120 bin/bcg eval "$problems" --model "models/$checkpoint" --device cuda \
        --min-accuracy "$(accuracy "$checkpoint" "$style")" --dump "$work/$checkpoint-$style-$name.jsonl" "$@"
}

same_tokens() { # checkpoint, style, name, other name
    step "$1 $2: $3 = $4" 10 cmp "$work/$1-$2-$3.jsonl" "$work/$1-$2-$4.jsonl"
}

# Eagerly and healed; every replay verified; prompts in chunks; many at once; and a KV cache so small that sequences are preempted.
evaluations() { # checkpoint
    local style name
    for style in chat few-shot; do
        evaluate "$1" $style eager
        evaluate "$1" $style healed "${graphs[@]}"
        same_tokens "$1" $style eager healed
    done
    evaluate "$1" chat lazy-verified "${graphs[@]}" --capture lazy --verify-graph 1 --poison-graph-memory
    same_tokens "$1" chat eager lazy-verified
    for chunk in 16 64; do
        evaluate "$1" chat "chunks-of-$chunk" "${graphs[@]}" --chunked-prefill-size $chunk --max-running-requests 8
    done
    evaluate "$1" few-shot one-at-a-time "${graphs[@]}" --concurrency 1 --disable-radix-cache
    evaluate "$1" few-shot 64-at-once "${graphs[@]}" --concurrency 64
    evaluate "$1" few-shot 64-at-once-no-radix-cache "${graphs[@]}" --concurrency 64 --disable-radix-cache
    evaluate "$1" few-shot 64-at-once-in-chunks "${graphs[@]}" --concurrency 64 --chunked-prefill-size 64
    for name in 64-at-once 64-at-once-no-radix-cache 64-at-once-in-chunks; do
        same_tokens "$1" few-shot one-at-a-time "$name"
    done
    evaluate "$1" chat preempted "${graphs[@]}" --concurrency 64 --kv-cache-tokens 512 --context-length 256 --page-size 1
    # Of this evaluation: the log has those before it too.
    same_tokens "$1" chat eager preempted
    step "$1: some were preempted" 10 bash -c 'grep "^accuracy" "$1" | tail -n 1 | grep -Eq " [1-9][0-9]* preemptions"' _ "$log"
}

{
    cat COMMIT
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} 2>&1 | tee -a "$log"

correctness() {
    local checkpoint geometry
    if [ ${#chosen[@]} = 0 ]; then
        step "own kernel" 60 bin/own_kernel
        step "rules on the GPU" "${GPU_TESTS_SECONDS:-300}" bin/gpu --random "${GPU_RANDOM_PROGRAMS:-1000}"
    fi
    for checkpoint in $(pick $(cd models && echo tiny-*)); do
        evaluations "$checkpoint"
    done

    # Some layers of real geometries against transformers in float32.
    if python3 -c 'import torch, transformers, safetensors' 2>/dev/null; then
        for geometry in $(pick qwen3-8b qwen3-30b-a3b nemotron-h-8b deepseek-v2-lite deepseek-v3-6-layers); do
            step "reference $geometry" 120 python3 tests/geometry/reference.py "models/geometries/$geometry" "$work/geometry" \
                $(case $geometry in qwen3-8b) ;; *) echo --vocab 8192 ;; esac)
            step "geometry $geometry" 120 bin/gpu --geometry "$work/geometry"
            rm -rf "$work/geometry"
        done
    else
        table+=("skip  python3 has no torch, transformers and safetensors  geometry against transformers")
    fi

    # Fast?
    if [ ${#chosen[@]} = 0 ]; then
        local model=(--model models/tiny-qwen3 --device cuda)
        step "inspect" 60 bin/bcg inspect "${model[@]}" --size 64 --html "$out/inspect.html" --trace "$out/inspect.json"
        step "inspect: kernels were traced" 10 grep -q '"cat":"kernel"' "$out/inspect.json"
        step "generate" 60 bin/bcg generate "${model[@]}" "${graphs[@]}" --chat --prompt "Raj has 10 boxes with 12 books in each. How many books is that?"
        step "matmul bench" 60 bin/matmul --json "$out/matmul.json"
        step "replay bench" 180 bin/replay --device cuda --json "$out/replay.json"
    fi
}

# Models of real geometries with random weights.
benches() {
    local models=() geometry peers=()
    for geometry in $(pick qwen3-8b qwen3-0.6b qwen3-30b-a3b nemotron-h-8b deepseek-v2-lite); do
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
    if [ ${#chosen[@]} = 0 ]; then
        step "replay bench" 180 bin/replay --device cuda --json "$out/replay.json"
    fi
}

# Random weights and random token ids, so that no two runs share a prompt.
load() { # geometry, name, flags…
    local geometry=$1 name=$2
    shift 2
    step "serve $geometry $name" 120 bin/bcg bench serve --base-url "http://127.0.0.1:$port" --vocab-size 100000 \
        --seed "$((seed += 1))" --json "$out/serve-$geometry-$name.json" "$@"
}

serving() {
    local geometry server port=30017 seed=0 rate
    for geometry in $(pick qwen3-8b qwen3-0.6b); do
        bin/bcg serve --model "models/geometries/$geometry" --load-format dummy --skip-tokenizer-init --device cuda \
            --port "$port" "${graphs[@]}" --context-length 2048 --max-running-requests 512 --max-queued-requests 1024 \
            --chunked-prefill-size "${CHUNK:-8192}" >>"$out/server-$geometry.log" 2>&1 &
        server=$!
        step "start $geometry" 120 bash -c 'until curl -sf "http://127.0.0.1:$0/health" >/dev/null; do kill -0 "$1" || exit 1; sleep 0.2; done' \
            "$port" "$server"
        for tokens in 16 256 1024; do
            load "$geometry" "first-token-$tokens" --num-prompts 40 --max-concurrency 1 --input-len "$tokens" --output-len 8
        done
        load "$geometry" burst --num-prompts 512 --input-len 1024 --output-len 128
        load "$geometry" burst-again --num-prompts 512 --input-len 1024 --output-len 128
        case $geometry in qwen3-8b) rates=(4 8 16 24) ;; *) rates=(20 40 80 120) ;; esac
        for rate in "${rates[@]}"; do
            load "$geometry" "rate-$rate" --num-prompts "$((rate * 12))" --request-rate "$rate" --input-len 1024 --output-len 128
        done
        load "$geometry" shared-prefix --num-prompts 512 --input-len 64 --shared-prefix-len 960 --num-prefixes 8 --output-len 128
        curl -s "http://127.0.0.1:$port/metrics" >"$out/metrics-$geometry.txt"
        kill "$server"
        step "stop $geometry" 40 tail --pid="$server" -f /dev/null
    done
}

case $mode in bench) benches ;; serve) serving ;; test) correctness ;; esac

echo
awk '/^(ceilings|kernels|prefill|replay|lazy|decode|profile|capture|serve)$/ { shown = 1 } /^$/ { shown = 0 } shown' "$log"
grep -hE '^(accuracy|FAILED|[0-9]+ passed)|captured prefill' "$log" | uniq
printf '%s\n' "${table[@]}" | tee -a "$log"
exit "$failed"
