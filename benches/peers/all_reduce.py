"""Times NCCL's all-reduce as `gpu collectives` times ours: 40 in a row in one CUDA graph, replayed back to back by a process
for each GPU, bf16; prints the same table, and with --json FILE writes {"us": {bytes: median}}.

    python3 all_reduce.py --gpus 2 --json nccl.json

NVLink multicast is off (NCCL_NVLS_ENABLE=0). Every wait ends: the collectives by --timeout, the whole run by twice that.
Needs PyTorch with NCCL and as many GPUs."""

import argparse
import datetime
import json
import multiprocessing
import os
import queue
import socket
import sys
import time

SUMS = 40
BYTES = [2 << 10, 8 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20, 32 << 20]
SAMPLES = 40
SAMPLE_S = 0.003
REPLAYS_MAX = 200


def seconds(graph, replays):
    import torch

    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(replays):
        graph.replay()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def slowest(value):
    """The largest of all ranks' values, which every rank gets."""
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([value], dtype=torch.float64, device="cuda")
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def timed(num_bytes):
    """Microseconds of one sum, sorted, of the slowest rank."""
    import torch
    import torch.distributed as dist

    x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            dist.all_reduce(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(SUMS):
            dist.all_reduce(x)
    slowest(seconds(graph, 3))
    one = slowest(seconds(graph, 10)) / 10
    replays = int(max(1, min(REPLAYS_MAX, -(-SAMPLE_S // one))))
    return sorted(slowest(seconds(graph, replays)) * 1e6 / (replays * SUMS) for _ in range(SAMPLES))


def rank_main(rank, args, port, results):
    os.environ.update(NCCL_NVLS_ENABLE="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    timeout = datetime.timedelta(seconds=args.timeout)
    dist.init_process_group("nccl", rank=rank, world_size=args.gpus, timeout=timeout)
    for num_bytes in BYTES:
        times = timed(num_bytes)
        if rank == 0:
            results.put((num_bytes, times))
    if rank == 0:
        results.put(("nccl", ".".join(map(str, torch.cuda.nccl.version()))))
    results.close()
    results.join_thread()
    os._exit(0)  # graphs hold communicators, whose end may wait for the other ranks


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that a collective may take")
    parser.add_argument("--json")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, args, port, results)) for rank in range(args.gpus)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + 2 * args.timeout
    table, version = {}, None
    try:
        while version is None:
            left = deadline - time.monotonic()
            if left <= 0 or any(rank.exitcode not in (None, 0) for rank in ranks):
                break
            try:
                key, value = results.get(timeout=min(left, 1.0))
            except queue.Empty:  # look again whether all ranks live
                continue
            if key == "nccl":
                version = value
            else:
                table[key] = value
        for rank in ranks:
            rank.join(max(0.0, min(10.0, deadline - time.monotonic())))
    finally:
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
    print(f"NCCL {version}, {args.gpus} GPUs, bf16, us of one of {SUMS} in a row in a graph:")
    print(f"{'':42} {'p10':>8} {'p50':>8} {'p90':>8}")
    at = lambda times, part: times[int((len(times) - 1) * part)]
    for num_bytes, times in table.items():
        name = f"NCCL all-reduce, {num_bytes >> 10} KiB"
        print(f"{name:42} {at(times, 0.1):8.2f} {at(times, 0.5):8.2f} {at(times, 0.9):8.2f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"us": {str(num_bytes): at(times, 0.5) for num_bytes, times in table.items()}}, file, indent=1)
    if version is None:
        sys.exit("a rank failed or took too long; the table has what was measured before")


if __name__ == "__main__":
    main()
