"""How peers are timed: as `bcg bench kernels` times its ops."""

import time

import torch

TOUCHED_BYTES = 256 << 20
LAUNCHES_MAX = 64
SAMPLE_US = 2000.0
REPEATS_MAX = 256
ROUNDS = 20
# Seconds that torch.compile may take altogether.
COMPILE_SECONDS = 60.0

device = "cuda" if torch.cuda.is_available() else "cpu"
bf16 = dict(dtype=torch.bfloat16, device=device)


def random(*shape):
    return torch.randn(shape, **bf16)


def timed(nbytes, make, in_graph=True):
    """Microseconds of one call of the functions that `make()` returns, each with buffers of its own."""
    calls = [make() for _ in range(max(2, min(LAUNCHES_MAX, -(-TOUCHED_BYTES // max(nbytes, 1)))))]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    run = lambda: [call() for call in calls]
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
        run = graph.replay
    seconds(run, 1)
    repeats = int(max(1, min(REPEATS_MAX, -(-SAMPLE_US // (seconds(run, 1) * 1e6)))))
    times = sorted(seconds(run, repeats) * 1e6 / (repeats * len(calls)) for _ in range(ROUNDS))
    return times[(len(times) + 1) // 2 - 1]


def seconds(run, repeats):
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


class Compiler:
    """Compiles functions for as long as its budget lasts."""

    spent = 0.0

    def __call__(self, function):
        """Returns the compiled function; the plain one once the budget is spent or where compiling fails."""
        compiled = torch.compile(function, dynamic=False)
        chosen = []

        def call(*inputs):
            if chosen:
                return chosen[0](*inputs)
            chosen.append(function)
            if Compiler.spent < COMPILE_SECONDS:
                begun = time.perf_counter()
                try:
                    compiled(*inputs)
                    chosen[0] = compiled
                except Exception as error:  # Inductor's errors have no common class
                    print(f"torch.compile: {str(error).splitlines()[0][:120]}")
                Compiler.spent += time.perf_counter() - begun
            return chosen[0](*inputs)

        return call


compiled = Compiler()
