"""Mixture of experts: routing, the experts' products with the rows that chose them, and their sum."""

import torch
import torch.nn.functional as F

from lab import bf16, device, random

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# Rows, columns and depth of a tile of the Triton kernel, its warps and stages; the fastest counts.
TILES = [(16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (64, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)]


class Choice:
    """The experts of each token, drawn as `bcg bench kernels` draws them."""

    def __init__(self, tokens, chosen, num_experts):
        self.tokens, self.chosen, self.num_experts = tokens, chosen, num_experts
        listed, state = [], 1
        for _ in range(tokens):
            own = []
            while len(own) < chosen:
                state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
                expert = (state >> 33) % num_experts
                if expert not in own:
                    own.append(expert)
            listed.append(own)
        self.experts = torch.tensor(listed, device=device)
        order = self.experts.flatten().sort(stable=True)[1]
        self.token_of_row = order // chosen
        self.places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device)).view(-1, chosen)
        counts = torch.bincount(self.experts.flatten(), minlength=num_experts)
        self.ends = counts.cumsum(0).int()
        self.offsets = [0, *self.ends.tolist()]
        self.num_touched = int((counts > 0).sum())

    def tiles(self, rows):
        """The expert and the first row of each tile of so many rows."""
        tiles = [
            (expert, row)
            for expert, (first, end) in enumerate(zip(self.offsets, self.offsets[1:]))
            for row in range(first, end, rows)
        ]
        return torch.tensor(tiles, dtype=torch.int32, device=device).T.contiguous()


def by_loop(choice, x, weight):
    parts = zip(choice.offsets, choice.offsets[1:], weight)
    return torch.cat([F.linear(x[first:end], matrix) for first, end, matrix in parts if end > first])


def by_grouped_mm(choice, x, weight):
    return torch._grouped_mm(x, weight.transpose(-2, -1), offs=choice.ends)


if triton is not None:

    @triton.jit
    def grouped_kernel(
        x, weight, out, tile_expert, tile_row, ends,
        N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ):
        tile = tl.program_id(1)
        expert = tl.load(tile_expert + tile).to(tl.int64)
        rows = tl.load(tile_row + tile).to(tl.int64) + tl.arange(0, ROWS)
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        is_row, is_column = rows < tl.load(ends + expert), columns < N
        depths = tl.arange(0, DEPTH)
        a = x + rows[:, None] * K + depths[None, :]
        b = weight + expert * N * K + columns[None, :].to(tl.int64) * K + depths[:, None]
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for first in range(0, K, DEPTH):
            is_depth = depths < K - first
            left = tl.load(a + first, mask=is_row[:, None] & is_depth[None, :], other=0.0)
            right = tl.load(b + first, mask=is_depth[:, None] & is_column[None, :], other=0.0)
            sums = tl.dot(left, right, sums)
        place = out + rows[:, None] * N + columns[None, :]
        tl.store(place, sums.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def by_triton(tile):
    rows, columns, depth, warps, stages = tile

    def product(choice, x, weight):
        N, K = weight.shape[1:]
        experts, first_rows = choice.tiles(rows)  # a router's kernel would write them
        out = torch.empty(len(x), N, dtype=x.dtype, device=x.device)

        def call():
            grid = (triton.cdiv(N, columns), len(experts))
            arguments = (x, weight, out, experts, first_rows, choice.ends, N, K, rows, columns, depth)
            grouped_kernel[grid](*arguments, num_warps=warps, num_stages=stages)
            return out

        return call

    return product


# Ways to multiply: each makes a call of a choice, rows in the order of experts, and the experts' matrices.
PRODUCTS = [lambda *inputs, way=way: (lambda: way(*inputs)) for way in (by_loop, by_grouped_mm)]
if triton is not None and device == "cuda":
    PRODUCTS += [by_triton(tile) for tile in TILES]


def route(logits, bias, config):
    """Experts and weights of each row: softmax, or sigmoid with a bias and groups."""
    chosen = config["num_experts_per_tok"]
    if config.get("scoring_func") == "sigmoid":
        scores = logits.float().sigmoid()
        groups = (scores + bias).view(len(logits), config["n_group"], -1)
        best = groups.topk(2, -1)[0].sum(-1).topk(config["topk_group"], -1)[1]
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        experts = groups.masked_fill(~kept[..., None], -torch.inf).flatten(1).topk(chosen, -1)[1]
        weights = scores.gather(1, experts)
    else:
        weights, experts = logits.float().softmax(-1).topk(chosen, -1)
    if config.get("norm_topk_prob"):
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights * config.get("routed_scaling_factor", 1.0)


def permute(experts, num_experts):
    """The pairs in the order of experts, the place of each, and where the experts begin."""
    ordered, order = experts.flatten().sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, places, torch.searchsorted(ordered, torch.arange(num_experts + 1, device=order.device))


def cases(peers, args):
    config, C = peers.config, peers.hidden
    E, K = config.get("num_experts") or config["n_routed_experts"], config["num_experts_per_tok"]
    I = config["moe_intermediate_size"]
    for T in args.tokens:
        shape, choice, rows = f"T={T}", Choice(T, K, E), T * K

        def moe_route():
            logits, bias = torch.randn(T, E, device=device), torch.zeros(E, device=device)
            return lambda: route(logits, bias, config)

        def moe_permute():
            return lambda: permute(choice.experts, E)

        def moe_combine():
            y, weights = random(rows, C), torch.rand(T, K, device=device)
            return lambda: (y[choice.places] * weights[..., None]).sum(1).bfloat16()

        def gate_up(way):
            def make():
                x, weight = random(T, C), random(E, 2 * I, C)
                ordered = torch.empty(rows, C, **bf16)
                product = way(choice, ordered, weight)

                def call():
                    torch.index_select(x, 0, choice.token_of_row, out=ordered)
                    both = product()
                    return F.silu(both[:, :I]) * both[:, I:]

                return call

            return make

        def down(way):
            return lambda: way(choice, random(rows, I), random(E, C, I))

        peers.time("moe_route", shape, T * (E + 2 * K) * 4, moe_route)
        peers.time("moe_permute", shape, 3 * rows * 4, moe_permute)
        peers.time("moe_combine", shape, (rows + T) * C * 2 + rows * 8, moe_combine)
        touched = choice.num_touched * I * C
        peers.time("grouped_gate_up", shape, 2 * (2 * touched + T * C + rows * I), *map(gate_up, PRODUCTS))
        peers.time("grouped_linear", shape, 2 * (touched + rows * (I + C)), *map(down, PRODUCTS))


def check():
    """Leaves out the ways to multiply that fail or differ from the loop, and holds the permutation to the choice."""
    choice = Choice(37, 3, 16)
    x, weight = random(37 * 3, 128), random(16, 192, 128)
    right = by_loop(choice, x, weight).float()
    for index in reversed(range(len(PRODUCTS))):
        try:
            torch.testing.assert_close(PRODUCTS[index](choice, x, weight)().float(), right, rtol=2e-2, atol=2e-1)
        except (AssertionError, RuntimeError, NotImplementedError, TypeError) as error:
            print(f"grouped_linear: way {index} is left out: {str(error).strip().splitlines()[0][:120]}")
            del PRODUCTS[index]
    order, places, starts = permute(choice.experts, 16)
    assert torch.equal(order // 3, choice.token_of_row) and torch.equal(places.view(-1, 3), choice.places)
    assert starts.tolist() == choice.offsets
