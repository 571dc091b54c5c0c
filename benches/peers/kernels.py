"""Times PyTorch's equivalents of the ops at the shapes that `bcg bench kernels` times, in the same way, and writes JSON:
{"us": {"op/model/shape": microseconds}}. `bcg bench kernels --peers FILE` shows them beside its own.

    python3 kernels.py --model models/geometries/qwen3-8b --json peers.json

One launch of each on buffers that take turns makes a CUDA graph; it is replayed back to back, and the wall time is divided
by the launches. Of several ways to compute the same the fastest counts. Needs PyTorch and a GPU."""

import argparse
import itertools
import json
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

import experts
import latent
import mamba
from lab import random, timed

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]

class Peers:
    def __init__(self, name, config):
        self.name, self.us, self.config = name, {}, config
        self.hidden, self.inner, self.vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
        self.q_heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_dim = config.get("head_dim", config.get("attention_head_dim", self.hidden // self.q_heads))
        self.eps, self.theta = config["rms_norm_eps"], config.get("rope_theta")

    def time(self, op, shape, nbytes, *makes):
        """Times every way to compute an op, and keeps the fastest that works."""
        best = None
        for make in makes:
            try:
                us = timed(nbytes, make)
                best = us if best is None else min(best, us)
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                torch.cuda.synchronize()
                print(f"{op}/{self.name}/{shape}: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            torch.cuda.empty_cache()
        if best is not None:
            self.us[f"{op}/{self.name}/{shape}"] = best
            print(f"{op:24} {self.name:12} {shape:20} {best:10.2f} us", flush=True)

    def cases(self, args):
        """The cases of every model, and those of the layers that this one has."""
        for T in args.tokens:
            self.tokens(T)
        if "kv_lora_rank" in self.config:
            latent.cases(self, args)
        else:
            for T in args.tokens:
                self.attention_rows(T)
            for shape in args.prefill:
                self.prefill(shape)
            for shape in args.decode:
                self.decode(shape)
        if "mamba_num_heads" in self.config:
            mamba.cases(self, args)
        elif "num_experts_per_tok" in self.config:
            experts.cases(self, args)
        else:
            for T in args.tokens:
                self.mlp(T)

    def tokens(self, T):
        C, shape = self.hidden, f"T={T}"
        table = random(self.vocab, C)

        def gather_rows():
            ids = torch.randint(self.vocab, (T,), device="cuda")
            return lambda: F.embedding(ids, table)

        def rms_norm():
            x, weight = random(T, C), random(C)
            return lambda: F.rms_norm(x, (C,), weight, self.eps)

        def add_rms_norm():
            x, residual, weight = random(T, C), random(T, C), random(C)

            def call():
                total = x + residual
                return F.rms_norm(total, (C,), weight, self.eps), total

            return call

        self.time("gather_rows", shape, T * (4 + 4 * C), gather_rows)
        self.time("rms_norm", shape, (2 * T + 1) * C * 2, rms_norm)
        self.time("add_rms_norm", shape, (4 * T + 1) * C * 2, add_rms_norm)

    def attention_rows(self, T):
        width, queries = (self.q_heads + 2 * self.kv_heads) * self.head_dim, self.q_heads * self.head_dim
        if self.theta is not None:
            nbytes = T * (4 * width + 8)
            self.time("qk_norm_rope_kv_write", f"T={T}", nbytes, lambda: self.qk_norm_rope_kv_write(T))
        self.linear(f"qkv_proj T={T}", T, width, self.hidden, 2)
        self.linear(f"o_proj T={T}", T, self.hidden, queries, 2)

    def mlp(self, T):
        C, I = self.hidden, self.inner

        def silu_mul():
            x = random(T, 2 * I)
            return lambda: F.silu(x[:, :I]) * x[:, I:]

        self.time("silu_mul", f"T={T}", 3 * T * I * 2, silu_mul)
        self.linear(f"gate_up_proj T={T}", T, 2 * I, C, 2)
        self.linear(f"down_proj T={T}", T, C, I, 2)

    def qk_norm_rope_kv_write(self, T):
        Hq, Hkv, D = self.q_heads, self.kv_heads, self.head_dim
        qkv, q_weight, k_weight = random(T, Hq + 2 * Hkv, D), random(D), random(D)
        k_cache, v_cache = random(T, Hkv, D), random(T, Hkv, D)
        slots = torch.arange(T, device="cuda")
        angles = torch.arange(T, device="cuda")[:, None] * self.theta ** (-torch.arange(0, D, 2, device="cuda") / D)
        cos, sin = (f(torch.cat([angles, angles], -1))[:, None].to(torch.bfloat16) for f in (torch.cos, torch.sin))

        def call():
            q, k, v = qkv.split([Hq, Hkv, Hkv], 1)
            q, k = F.rms_norm(q, (D,), q_weight, self.eps), F.rms_norm(k, (D,), k_weight, self.eps)
            q, k = (x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin for x in (q, k))
            k_cache.index_copy_(0, slots, k)
            v_cache.index_copy_(0, slots, v)
            return q

        return call

    def linear(self, shape, T, outputs, depth, out_bytes):
        def make():
            x, weight = random(T, depth), random(outputs, depth)
            return lambda: F.linear(x, weight)

        self.time("linear", shape, (T + outputs) * depth * 2 + T * outputs * out_bytes, make)

    def logits(self, B):
        shape, nbytes = f"B={B}", B * (self.vocab + 1) * 4

        def argmax():
            x = torch.randn(B, self.vocab, device="cuda")
            return lambda: x.argmax(-1)

        def sample():
            x = torch.randn(B, self.vocab, device="cuda")

            def call():  # top-k and top-p by sorting, then a draw
                values, order = torch.sort(torch.softmax(x / 0.7, -1), descending=True)
                values[:, 50:] = 0
                values = torch.where(values.cumsum(-1) - values > 0.95 * values.sum(-1, keepdim=True), 0, values)
                return order.gather(-1, (values / torch.empty_like(values).exponential_()).argmax(-1, keepdim=True))

            return call

        self.linear(f"lm_head T={B}", B, self.vocab, self.hidden, 4)
        self.time("argmax", shape, nbytes, argmax)
        self.time("sample", shape, nbytes, sample)

    def attention_bytes(self, queries, keys):
        return 2 * (queries * self.q_heads + keys * self.kv_heads) * self.head_dim * 2

    def sdpa(self, op, shape, nbytes, inputs, masks):
        """Times SDPA with each backend and mask, keys and values with as many heads as they have."""

        def make(backend, mask):
            def build():
                q, k, v = inputs()

                def call():
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask())

                return call

            return build

        self.time(op, shape, nbytes, *(make(backend, mask) for backend in BACKENDS for mask in masks))

    def prefill(self, shape):
        batch, _, prefix = shape.partition("+")
        (B, T), P = map(int, batch.split("x")), int(prefix or 0)
        Hq, Hkv, D = self.q_heads, self.kv_heads, self.head_dim
        if B == 1:
            inputs = lambda: (random(1, Hq, T, D), random(1, Hkv, P + T, D), random(1, Hkv, P + T, D))
            mask = (lambda: dict(attn_mask=causal_lower_right(T, P + T))) if P else lambda: dict(is_causal=True)
            self.sdpa("attention_prefill", shape, self.attention_bytes(T, P + T), inputs, [mask])
        elif P == 0:
            self.ragged_prefill(shape, B, T)

    def ragged_prefill(self, shape, B, T):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return print("attention_prefill of several sequences: this PyTorch has no varlen_attn", file=sys.stderr)
        lens = [T + (2 * index - (B - 1)) * (T // B) for index in range(B)]
        starts = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device="cuda")
        total, D = sum(lens), self.head_dim

        def make():
            # The keys and values are repeated: this function has no grouped heads.
            q, k, v = (random(total, self.q_heads, D) for _ in range(3))
            return lambda: varlen_attn(q, k, v, starts, starts, max(lens), max(lens), window_size=(-1, 0))

        self.time("attention_prefill", shape, self.attention_bytes(total, total), make)

    def decode(self, shape):
        B, L = map(int, shape.split("x"))
        inputs = lambda: (
            random(B, self.q_heads, 1, self.head_dim),
            random(B, self.kv_heads, L, self.head_dim),
            random(B, self.kv_heads, L, self.head_dim),
        )
        self.sdpa("attention_decode", shape, self.attention_bytes(B, B * L), inputs, [dict])


def ceilings():
    peers = {}

    def copy():
        a, b = torch.empty(1 << 30, dtype=torch.uint8, device="cuda"), torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
        return lambda: b.copy_(a)

    def product():
        x, weight = random(8192, 8192), random(8192, 8192)
        return lambda: F.linear(x, weight)

    peers["copy/ceiling/1 GiB"] = timed(2 << 30, copy, in_graph=False)
    peers["linear/ceiling/8192x8192x8192"] = timed(3 * 2 * 8192 * 8192, product)
    return peers


def main():
    numbers = lambda text: [int(number) for number in text.split(",") if number]
    words = lambda text: [word for word in text.split(",") if word]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="DIR")
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 256, 2048, 8192])
    parser.add_argument("--logits", type=numbers, default=[1, 64, 256])
    parser.add_argument("--prefill", type=words, default=["1x512", "1x2048", "1x8192", "16x512", "1x512+8192"])
    parser.add_argument("--decode", type=words, default=["1x1024", "64x1024", "256x1024", "1x4096", "64x4096", "256x4096"])
    parser.add_argument("--json", required=True, metavar="FILE")
    args = parser.parse_args()
    torch.manual_seed(1)
    for module in (experts, mamba, latent):
        module.check()
    warnings.filterwarnings("ignore")  # SDPA explains each backend that it cannot use
    us = ceilings()
    for folder in args.model:
        with open(os.path.join(folder, "config.json")) as file:
            peers = Peers(os.path.basename(os.path.normpath(folder)), json.load(file))
        peers.cases(args)
        for B in args.logits:
            peers.logits(B)
        us.update(peers.us)
    environment = {"torch": torch.__version__, "device": torch.cuda.get_device_name()}
    with open(args.json, "w") as file:
        json.dump({"environment": environment, "us": us}, file, indent=1)


if __name__ == "__main__":
    main()
