#!/usr/bin/env bash
# Runs the GPU bundle. Needs an NVIDIA driver and NVRTC and cuBLASLt (CUDA 12.4 or newer); CUPTI for profiles, and python3 with torch for
# what is compared with PyTorch. The log and the figures land in $OUT, or in out/ beside this script.
#
#   run.sh                     correctness first, then a few figures, a short table last
#   run.sh test MODEL…         the same for some models only: tiny checkpoints and geometries, by their folders' names
#   run.sh bench               every bench at full size, the figures as JSON too, their tables once more last
#   run.sh bench GEOMETRY…     the same for some geometries only
#   run.sh serve [GEOMETRY…]   the server under load, over HTTP: throughput, time to first token, rates up to saturation
#   run.sh ranks [GEOMETRY…]   two ranks, on the GPUs that RANK_DEVICES names (0,1; 0,0 puts both on one): correctness first,
#                              then figures beside those of one GPU
#   run.sh replicas [GEOMETRY…]
#                              two replicas, on the GPUs that RANK_DEVICES names: correctness first, then load on them beside
#                              the same load on two processes, half of it each
#   run.sh roles [GEOMETRY…]   prefill apart from decode, on the GPUs that RANK_DEVICES names: correctness first, then rates up
#                              to saturation beside two replicas
#   run.sh stages [GEOMETRY…]  a pipeline of two stages, on the GPUs that RANK_DEVICES names: correctness first, then figures
#                              beside those of one GPU, and the first token of a prompt of 32,768 tokens
#   run.sh nodes [GEOMETRY…]   as ranks, with a process for each of the two GPUs, which NCCL connects
#   run.sh standing            the standing figures, in at most STANDING_SECONDS (240): standing.json, which
#                              `cargo xtask figures` reads. BCG_DEVICE=host runs the same steps with tiny checkpoints and
#                              without a GPU, to try the script: its figures say nothing
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
case $mode in test | bench | serve | ranks | replicas | roles | stages | nodes | standing) ;; *)
    echo "run.sh: no mode $mode; there are test (without argument), bench, serve, ranks, replicas, roles, stages, nodes and standing" >&2
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

# When nothing may run any more, in seconds since 1970; empty without such a time.
deadline=

step() { # name, seconds at most, command…
    local name=$1 limit=$2 begun status left
    shift 2
    if [ -n "$deadline" ]; then
        left=$((deadline - $(date +%s)))
        if [ "$left" -le 0 ]; then
            table+=("FAIL  0 s  $name (no time was left)")
            failed=1
            return
        fi
        if [ "$left" -lt "$limit" ]; then limit=$left; fi
    fi
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
    # shellcheck disable=SC2016 # the inner shell expands it
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
    # shellcheck disable=SC2046 # names without spaces, to be split
    for checkpoint in $(pick $(cd models && echo tiny-*)); do
        evaluations "$checkpoint"
    done

    # Some layers of real geometries against transformers in float32.
    if python3 -c 'import torch, transformers, safetensors' 2>/dev/null; then
        for geometry in $(pick qwen3-8b qwen3-30b-a3b nemotron-h-8b deepseek-v2-lite deepseek-v3-6-layers); do
            # shellcheck disable=SC2046 # two words or none
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
        local tiny=(--model models/tiny-qwen3 --device cuda)
        step "inspect" 60 bin/bcg inspect "${tiny[@]}" --size 64 --html "$out/inspect.html" --trace "$out/inspect.json"
        step "inspect: kernels were traced" 10 grep -q '"cat":"kernel"' "$out/inspect.json"
        step "generate" 60 bin/bcg generate "${tiny[@]}" "${graphs[@]}" --chat --prompt "Raj has 10 boxes with 12 books in each. How many books is that?"
        step "matmul bench" 60 bin/matmul --json "$out/matmul.json"
        step "mechanism bench" 180 bin/mechanism --device cuda --json "$out/mechanism.json"
        # Last, because it breaks the device of its processes.
        step "device faults" 300 python3 device_faults.py bin/gpu models/geometries/qwen3-8b "$BCG_CACHE_DIR" "$out/device_faults.json"
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
        step "mechanism bench" 180 bin/mechanism --device cuda --json "$out/mechanism.json"
    fi
}

# Waits until a server answers.
ready() { # name, seconds at most, port, process
    # shellcheck disable=SC2016 # the inner shell expands these
    step "start $1" "$2" bash -c 'until curl -sf "http://127.0.0.1:$0/health" >/dev/null; do kill -0 "$1" || exit 1; sleep 0.05; done' \
        "$3" "$4"
}

# Two ranks: what they compute together, models that are divided among them, and what that gains.
ranks() {
    local devices=${RANK_DEVICES:-0,1} checkpoint geometry backend tp server port=30019 tokens
    local two=(--tp 2 --devices "$devices") seed=0
    step "collectives" 200 bin/gpu collectives --devices "$devices"
    step "experts" 200 bin/gpu experts --devices "$devices"
    step "replays of all ranks" 200 bin/gpu world --devices "$devices" --replays "${RANK_REPLAYS:-1000000}" --delays
    step "replays of all ranks, host time" 60 bin/gpu world --devices "$devices" --replays 20000 --layers 36 --steady
    for checkpoint in $(cd models && echo tiny-*); do
        evaluate "$checkpoint" chat two-eager "${two[@]}"
        evaluate "$checkpoint" chat two-healed "${two[@]}" "${graphs[@]}"
        evaluate "$checkpoint" chat two-verified "${two[@]}" "${graphs[@]}" --capture lazy --verify-graph 1 --poison-graph-memory
        same_tokens "$checkpoint" chat two-eager two-healed
        same_tokens "$checkpoint" chat two-eager two-verified
    done
    for checkpoint in tiny-qwen3-moe tiny-deepseek-v3; do
        for backend in none push break; do
            evaluate "$checkpoint" chat "two-experts-$backend" "${two[@]}" --ep 2 --moe-a2a-backend "$backend" "${graphs[@]}"
        done
    done
    for geometry in $(pick qwen3-8b qwen3-30b-a3b nemotron-h-8b); do
        local flags=(--model "models/geometries/$geometry" --load-format dummy --skip-tokenizer-init --device cuda)
        for tp in 1 2; do
            if [ "$tp" = 2 ]; then flags+=("${two[@]}"); fi
            step "prefill $geometry tp $tp" 100 bin/bcg bench prefill "${flags[@]}" --rounds 12 --seconds 1 \
                --sizes 16,256,1024,4096 --json "$out/prefill-$geometry-tp$tp.json"
            step "decode $geometry tp $tp" 100 bin/bcg bench decode "${flags[@]}" --rounds 12 --seconds 1 \
                --batches 1,64,256 --context 1024 --json "$out/decode-$geometry-tp$tp.json"
        done
        for backend in none push; do
            if [ "$geometry" != qwen3-30b-a3b ]; then continue; fi
            local owned=("${flags[@]}" --ep 2 --moe-a2a-backend "$backend")
            step "prefill $geometry ep 2 $backend" 100 bin/bcg bench prefill "${owned[@]}" --rounds 12 --seconds 1 \
                --sizes 16,256,1024,4096 --json "$out/prefill-$geometry-ep2-$backend.json"
            step "decode $geometry ep 2 $backend" 100 bin/bcg bench decode "${owned[@]}" --rounds 12 --seconds 1 \
                --batches 1,64,256 --context 1024 --json "$out/decode-$geometry-ep2-$backend.json"
        done
        bin/bcg serve "${flags[@]}" --port "$port" "${graphs[@]}" --context-length 8192 --max-running-requests 512 \
            --max-queued-requests 1024 >>"$log" 2>&1 &
        server=$!
        ready "$geometry tp 2" 120 "$port" "$server"
        for tokens in 16 256 1024 4096; do
            load "$geometry" "tp2-first-token-$tokens" --num-prompts 20 --max-concurrency 1 --input-len "$tokens" --output-len 4
        done
        load "$geometry" tp2-burst --num-prompts 512 --warmup-requests 128 --input-len 1024 --output-len 128
        kill "$server"
        step "stop $geometry tp 2" 20 tail --pid="$server" -f /dev/null
    done
    step "replay qwen3-8b tp 2" 60 bin/bcg bench replay --model models/geometries/qwen3-8b --load-format dummy \
        --skip-tokenizer-init --device cuda "${two[@]}" --rounds 60 --seconds 2 --sizes 16,256
}

# Two replicas in one process, and two processes, each with half of the load at the same time.
replicas() {
    local devices=${RANK_DEVICES:-0,1} cache=() checkpoint=tiny-qwen3 geometry port=30020 seed=0 half round first second
    # Replicas on one GPU divide its memory by hand.
    if [ "${devices%,*}" = "${devices#*,}" ]; then cache=(--kv-cache-tokens "${REPLICA_TOKENS:-200000}"); fi
    evaluate $checkpoint chat alone "${graphs[@]}"
    evaluate $checkpoint chat replicas "${graphs[@]}" --dp 2 --devices "$devices" --kv-cache-tokens 4096
    same_tokens $checkpoint chat alone replicas
    for geometry in $(pick qwen3-0.6b qwen3-8b); do
        local flags=(--model "models/geometries/$geometry" --load-format dummy --skip-tokenizer-init --device cuda
            "${graphs[@]}" --context-length 2048 --max-running-requests 512 --max-queued-requests 2048
            --chunked-prefill-size "${CHUNK:-8192}" "${cache[@]}")
        bin/bcg serve "${flags[@]}" --port "$port" --dp 2 --devices "$devices" >>"$log" 2>&1 &
        first=$!
        ready "$geometry, two replicas" 180 "$port" "$first"
        for round in 1 2 3; do
            load "$geometry" "replicas-burst-$round" --num-prompts 1024 --warmup-requests 256 --input-len 1024 --output-len 128
        done
        load "$geometry" replicas-shared-prefix --num-prompts 1024 --input-len 64 --shared-prefix-len 960 --num-prefixes 16 \
            --output-len 128
        curl -s "http://127.0.0.1:$port/metrics" >"$out/metrics-$geometry-replicas.txt"
        kill "$first"
        step "stop $geometry, two replicas" 40 tail --pid="$first" -f /dev/null
        bin/bcg serve "${flags[@]}" --port "$port" --devices "${devices%,*}" >>"$log" 2>&1 &
        first=$!
        bin/bcg serve "${flags[@]}" --port "$((port + 1))" --devices "${devices#*,}" >>"$log" 2>&1 &
        second=$!
        ready "$geometry, first process" 180 "$port" "$first"
        ready "$geometry, second process" 180 "$((port + 1))" "$second"
        for round in 1 2 3; do
            half=(bin/bcg bench serve --vocab-size 100000 --num-prompts 512 --warmup-requests 128 --input-len 1024 --output-len 128)
            "${half[@]}" --base-url "http://127.0.0.1:$((port + 1))" --seed "$((seed += 1))" \
                --json "$out/serve-$geometry-processes-$round-second.json" >>"$log" 2>&1 &
            load "$geometry" "processes-$round-first" --num-prompts 512 --warmup-requests 128 --input-len 1024 --output-len 128
            wait $!
        done
        kill "$first" "$second"
        step "stop $geometry, first process" 40 tail --pid="$first" -f /dev/null
        step "stop $geometry, second process" 40 tail --pid="$second" -f /dev/null
    done
    # Last, because it breaks the devices of its processes; on one GPU both replicas would be lost.
    if [ ${#cache[@]} = 0 ]; then
        step "replica faults" 300 python3 device_faults.py bin/gpu models/geometries/qwen3-0.6b "$BCG_CACHE_DIR" \
            "$out/replica_faults.json" --replicas "$devices"
    fi
}

# Prefill apart from decode: rows and models in two roles against one, and their load beside that of two mixed replicas.
roles() {
    local devices=${RANK_DEVICES:-0,1} cache=() pair layout checkpoint geometry name rate server port=30020 seed=0
    pair=(--disaggregation "prefill:${devices%,*},decode:${devices#*,}")
    # Roles on one GPU divide its memory by hand.
    if [ "${devices%,*}" = "${devices#*,}" ]; then cache=(--kv-cache-tokens "${ROLE_TOKENS:-150000}"); fi
    step "roles" 300 bin/gpu roles --devices "$devices"
    for checkpoint in $(cd models && echo tiny-*); do
        evaluate "$checkpoint" chat eager
        evaluate "$checkpoint" chat roles-eager "${pair[@]}" --kv-cache-tokens 4096
        evaluate "$checkpoint" chat roles-healed "${pair[@]}" --kv-cache-tokens 4096 "${graphs[@]}"
        evaluate "$checkpoint" chat roles-verified "${pair[@]}" --kv-cache-tokens 4096 "${graphs[@]}" --capture lazy \
            --verify-graph 1 --poison-graph-memory
        for name in roles-eager roles-healed roles-verified; do same_tokens "$checkpoint" chat eager "$name"; done
    done
    for geometry in $(pick qwen3-8b); do
        local flags=(--model "models/geometries/$geometry" --load-format dummy --skip-tokenizer-init --device cuda
            "${graphs[@]}" --context-length 8192 --max-running-requests 256 --max-queued-requests 2048
            --chunked-prefill-size "${CHUNK:-4096}" --disable-radix-cache "${cache[@]}")
        for name in roles replicas; do
            case $name in roles) layout=("${pair[@]}") ;; *) layout=(--dp 2 --devices "$devices") ;; esac
            bin/bcg serve "${flags[@]}" "${layout[@]}" --port "$port" >>"$log" 2>&1 &
            server=$!
            ready "$geometry, $name" 180 "$port" "$server"
            for rate in 4 6 8 10 12 inf; do
                load "$geometry" "$name-rate-$rate" --num-prompts 256 --warmup-requests 32 --input-len 4096 --output-len 256 \
                    --request-rate "$rate"
            done
            curl -s "http://127.0.0.1:$port/metrics" >"$out/metrics-$geometry-$name.txt"
            kill "$server"
            step "stop $geometry, $name" 40 tail --pid="$server" -f /dev/null
        done
    done
}

# A pipeline of two stages: the tokens of one GPU on every path, and what it gains.
stages() {
    local devices=${RANK_DEVICES:-0,1} checkpoint geometry name pp chunk server port=30020
    local two=(--pp 2 --devices "$devices") seed=0
    for checkpoint in $(cd models && echo tiny-*); do
        evaluate "$checkpoint" chat eager
        evaluate "$checkpoint" chat stages-eager "${two[@]}"
        evaluate "$checkpoint" chat stages-healed "${two[@]}" "${graphs[@]}"
        evaluate "$checkpoint" chat stages-verified "${two[@]}" "${graphs[@]}" --capture lazy --verify-graph 1 --poison-graph-memory
        for name in stages-eager stages-healed stages-verified; do same_tokens "$checkpoint" chat eager "$name"; done
    done
    for geometry in $(pick qwen3-30b-a3b qwen3-8b); do
        local flags=(--model "models/geometries/$geometry" --load-format dummy --skip-tokenizer-init --device cuda)
        for pp in 1 2; do
            if [ "$pp" = 2 ]; then flags+=("${two[@]}"); fi
            step "prefill $geometry pp $pp" 100 bin/bcg bench prefill "${flags[@]}" --rounds 12 --seconds 1 \
                --sizes 16,256,1024,4096 --json "$out/prefill-$geometry-pp$pp.json"
            step "decode $geometry pp $pp" 100 bin/bcg bench decode "${flags[@]}" --rounds 12 --seconds 1 \
                --batches 1,64,256 --context 1024 --json "$out/decode-$geometry-pp$pp.json"
            for chunk in 1024 2048 4096; do
                step "prompt $geometry pp $pp, chunks of $chunk" 120 bin/bcg bench prompt "${flags[@]}" "${graphs[@]}" \
                    --tokens 32768 --chunked-prefill-size "$chunk" --json "$out/prompt-$geometry-pp$pp-$chunk.json"
            done
            bin/bcg serve "${flags[@]}" --port "$port" "${graphs[@]}" --context-length 8192 --max-running-requests 512 \
                --max-queued-requests 1024 >>"$log" 2>&1 &
            server=$!
            ready "$geometry pp $pp" 120 "$port" "$server"
            load "$geometry" "pp$pp-burst" --num-prompts 512 --warmup-requests 128 --input-len 1024 --output-len 128
            kill "$server"
            step "stop $geometry pp $pp" 20 tail --pid="$server" -f /dev/null
        done
    done
}

# Two processes with a rank each: what `ranks` does, and the same tokens as both ranks in one process.
nodes() {
    local devices=${RANK_DEVICES:-0,1} checkpoint geometry server other port=30019 seed=0 tokens
    local first=${devices%,*} second=${devices#*,} meet=(--tp 2 --nnodes 2 --dist-init-addr 127.0.0.1:30021)
    step "nodes" 300 bin/gpu nodes --devices "$devices"
    for checkpoint in $(cd models && echo tiny-*); do
        evaluate "$checkpoint" chat one-process --tp 2 --devices "$devices" "${graphs[@]}"
        bin/bcg serve --model "models/$checkpoint" --device cuda "${meet[@]}" --node-rank 1 --devices "$second" "${graphs[@]}" \
            >>"$log" 2>&1 &
        other=$!
        evaluate "$checkpoint" chat two-processes "${meet[@]}" --devices "$first" "${graphs[@]}"
        step "the other node of $checkpoint ends in order" 20 tail --pid="$other" -f /dev/null
        same_tokens "$checkpoint" chat one-process two-processes
    done
    for geometry in $(pick qwen3-8b); do
        local flags=(--model "models/geometries/$geometry" --load-format dummy --skip-tokenizer-init --device cuda "${meet[@]}" "${graphs[@]}"
            --context-length 8192 --max-running-requests 512 --max-queued-requests 1024)
        bin/bcg serve "${flags[@]}" --node-rank 1 --devices "$second" >>"$log" 2>&1 &
        other=$!
        bin/bcg serve "${flags[@]}" --devices "$first" --port "$port" >>"$log" 2>&1 &
        server=$!
        ready "$geometry, two nodes" 180 "$port" "$server"
        for tokens in 16 256 1024 4096; do
            load "$geometry" "nodes-first-token-$tokens" --num-prompts 20 --max-concurrency 1 --input-len "$tokens" --output-len 4
        done
        load "$geometry" nodes-burst --num-prompts 512 --warmup-requests 128 --input-len 1024 --output-len 128
        kill "$server"
        step "stop $geometry, two nodes" 20 tail --pid="$server" -f /dev/null
        step "the other node of $geometry ends in order" 20 tail --pid="$other" -f /dev/null
    done
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
        # shellcheck disable=SC2016 # the inner shell expands these
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

# Starts of a server, each timed until it answers, but for the first, which fills the caches; then load on the last.
standing_server() { # model
    local model=$1 server begun round
    for round in 0 1 2 3; do
        begun=$(date +%s.%N)
        bin/bcg serve --model "$(folder "$model")" "${random[@]}" --port "$port" "${graphs[@]}" --context-length 2048 \
            --max-running-requests "${burst[0]}" --max-queued-requests 1024 >>"$log" 2>&1 &
        server=$!
        # shellcheck disable=SC2016 # the inner shell expands these
        step "start $model, round $round" 60 bash -c '
            until curl -sf "http://127.0.0.1:$0/health" >/dev/null; do kill -0 "$1" || exit 1; sleep 0.02; done
            if [ "$4" != 0 ]; then awk -v a="$2" -v b="$(date +%s.%N)" "BEGIN { print b - a }" >>"$3"; fi' \
            "$port" "$server" "$begun" "$reports/ready-$model.txt" "$round"
        if [ "$round" = 3 ]; then standing_load "$model"; fi
        kill "$server"
        step "stop $model" 20 tail --pid="$server" --sleep-interval=0.1 -f /dev/null
        # Where that took too long: nothing may keep the port and the memory.
        kill -9 "$server" 2>/dev/null
    done
}

# First tokens of one request at a time, and three bursts after one that warms up.
standing_load() { # model
    local model=$1 tokens round warm=${burst[0]} seed=0
    local bench=(bin/bcg bench serve --base-url "http://127.0.0.1:$port" --vocab-size "$vocab")
    for tokens in "${first_tokens[@]}"; do
        step "first token $model $tokens" 20 "${bench[@]}" --seed "$((seed += 1))" --num-prompts 20 \
            --max-concurrency 1 --input-len "$tokens" --output-len 4 --json "$reports/first-$model-$tokens.json"
    done
    for round in 1 2 3; do
        step "burst $model, round $round" 30 "${bench[@]}" --seed "$((seed += 1))" --num-prompts "${burst[0]}" \
            --warmup-requests "$warm" --input-len "${burst[1]}" --output-len "${burst[2]}" \
            --json "$reports/burst-$model-$round.json"
        warm=0
    done
}

folder() { # model
    if [ -d "models/geometries/$1" ]; then echo "models/geometries/$1"; else echo "models/$1"; fi
}

standing() {
    local device=${BCG_DEVICE:-cuda} reports=$work/standing port=30018 model round tool
    for tool in python3 curl; do
        if ! command -v "$tool" >/dev/null; then
            echo "run.sh: standing needs $tool, which is not here; install it" >&2
            exit 1
        fi
    done
    deadline=$(($(date +%s) + ${STANDING_SECONDS:-240}))
    mkdir -p "$reports"
    # Qwen3 large and small; experts, states and latents; whose experts the kernels have.
    local models=(qwen3-8b qwen3-0.6b) families=(qwen3-30b-a3b nemotron-h-8b deepseek-v2-lite) experts=qwen3-30b-a3b
    # Tokens of prompts, and the other families' one; batches, and their one; tokens before a decode; sizes of replays.
    local prefills=16,256,1024,4096 prefill=256 decodes=1,64,256 decode=64 context=1024 replays=16,128,256
    # Prompts whose first token is awaited; requests of a burst, tokens of their prompts and answers; known token ids.
    local first_tokens=(16 256) burst=(128 1024 32) vocab=100000
    # Batches of the kernels of prefill and decode; flags of the captured sizes.
    local long=1x4096 wide=64x4096 ladder=()
    case $device in cuda) ;; host)
        models=(tiny-qwen3) families=(tiny-qwen3-moe tiny-nemotron-h tiny-deepseek-v3) experts=tiny-deepseek-v3
        prefills=16,32 prefill=16 decodes=1,4 decode=4 context=32 replays=16,32
        first_tokens=(16 32) burst=(8 64 8) vocab=500
        long=1x32 wide=4x32 ladder=(--cuda-graph-sizes "16,32" --cuda-graph-decode-sizes "1,4")
        ;;
    *)
        echo "run.sh: no device $device; there are cuda (without BCG_DEVICE) and host" >&2
        exit 1
        ;;
    esac
    local random=(--load-format dummy --skip-tokenizer-init --device "$device") few=(--rounds 20 --seconds 2)
    local kernels=(bin/bcg bench kernels --device "$device" --rounds 12 --seconds 1)
    local states=${families[1]} latents=${families[2]}

    # The kernels come between the others, because each of these steps measures the ceilings again.
    step "kernels: attention" 30 "${kernels[@]}" --model "$(folder "${models[0]}")" --op attention --prefill "$long" \
        --decode "$wide" --json "$reports/kernels-attention.json"
    for model in "${models[@]}"; do
        step "prefill $model" 40 bin/bcg bench prefill --model "$(folder "$model")" "${random[@]}" "${few[@]}" \
            --sizes "$prefills" --json "$reports/prefill-$model.json"
        step "decode $model" 40 bin/bcg bench decode --model "$(folder "$model")" "${random[@]}" "${few[@]}" \
            --batches "$decodes" --context "$context" --json "$reports/decode-$model.json"
    done
    step "mechanism" 20 bin/mechanism --device "$device" --breaks 36 --rounds 100 --json "$reports/mechanism.json"
    step "replay ${models[0]}" 30 bin/bcg bench replay --model "$(folder "${models[0]}")" "${random[@]}" --rounds 60 \
        --seconds 2 --sizes "$replays" --json "$reports/replay-${models[0]}.json"
    step "kernels: products" 30 "${kernels[@]}" --model "$(folder "${models[0]}")" --model "$(folder "$experts")" \
        --op linear --tokens 16,256 --logits 1 --json "$reports/kernels-products.json"
    for model in "${models[@]}"; do standing_server "$model"; done
    for model in "${families[@]}"; do
        step "prefill $model" 40 bin/bcg bench prefill --model "$(folder "$model")" "${random[@]}" "${few[@]}" \
            --sizes "$prefill" --json "$reports/prefill-$model.json"
        step "decode $model" 40 bin/bcg bench decode --model "$(folder "$model")" "${random[@]}" "${few[@]}" \
            --batches "$decode" --context "$context" --json "$reports/decode-$model.json"
    done
    for round in 1 2 3; do
        step "capture ${models[0]}, round $round" 30 bin/bcg bench capture --model "$(folder "${models[0]}")" \
            "${random[@]}" "${ladder[@]}" --json "$reports/capture-$round.json"
    done
    step "kernels: scan" 30 "${kernels[@]}" --model "$(folder "$states")" --op ssd_scan --prefill "$long" \
        --json "$reports/kernels-scan.json"
    step "kernels: latents" 30 "${kernels[@]}" --model "$(folder "$latents")" --op mla_decode --decode "$wide" \
        --json "$reports/kernels-latents.json"
    echo
    printf '%s\n' "${table[@]}" | tee -a "$log"
    python3 standing.py "$reports" "$out/standing.json" 2>&1 | tee -a "$log" || failed=1
    exit "$failed"
}

case $mode in bench) benches ;; serve) serving ;; ranks) ranks ;; replicas) replicas ;; roles) roles ;; stages) stages ;; nodes) nodes ;; standing) standing ;; test) correctness ;; esac

echo
awk '/^(ceilings|kernels|prefill|prompt|replay|lazy|decode|profile|capture|serve)$/ { shown = 1 } /^$/ { shown = 0 } shown' "$log"
grep -hE '^(accuracy|FAILED|[0-9]+ passed)|captured prefill' "$log" | uniq
printf '%s\n' "${table[@]}" | tee -a "$log"
exit "$failed"
