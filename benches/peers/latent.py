"""Latent attention: decode over latents with absorbed projections, prefill over keys and values that are written out."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from lab import device, random

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def attend(q, keys, width, scale):
    """Queries `[B, H, L + R]` over the keys of their sequence, whose first L elements are the values; as batched products."""
    scores = torch.bmm(q, keys.transpose(1, 2)).float() * scale
    return torch.bmm(scores.softmax(-1).to(q.dtype), keys[..., :width])


def attend_sdpa(q, keys, width, scale):
    # All heads see the same keys, and all of them: they are queries of one head.
    return F.scaled_dot_product_attention(q[:, None], keys[:, None], keys[:, None, :, :width], scale=scale)[:, 0]


def with_backend(backend, function):
    def call(*inputs):
        with sdpa_kernel(backend):
            return function(*inputs)

    return call


def decode(peers, shape):
    B, L = map(int, shape.split("x"))
    config, H = peers.config, peers.q_heads
    D, R = config["kv_lora_rank"], config["qk_rope_head_dim"]
    scale = (config["qk_nope_head_dim"] + R) ** -0.5
    nbytes = 2 * (B * H * (2 * D + R) + B * L * (D + R))

    def make(function):
        def build():
            # Latents and rope keys in one tensor, as a cache that suits this has them.
            q, keys = random(B, H, D + R), random(B, L, D + R)
            return lambda: function(q, keys, D, scale)

        return build

    ways = [attend, *(with_backend(backend, attend_sdpa) for backend in BACKENDS)]
    peers.time("mla_decode", shape, nbytes, *map(make, ways))


def prefill(peers, shape):
    batch, _, prefix = shape.partition("+")
    (B, T), P = map(int, batch.split("x")), int(prefix or 0)
    if B > 1:
        return  # no function of PyTorch takes a ragged batch whose keys and values differ in width
    config, H = peers.config, peers.q_heads
    width, value = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
    nbytes = 2 * H * (T * (width + value) + (P + T) * (width + value))

    def make(backend):
        def build():
            q, k, v = random(1, H, T, width), random(1, H, P + T, width), random(1, H, P + T, value)

            def call():
                mask = dict(attn_mask=causal_lower_right(T, P + T)) if P else dict(is_causal=True)
                return F.scaled_dot_product_attention(q, k, v, **mask)

            return with_backend(backend, call)

        return build

    peers.time("mla_prefill", shape, nbytes, *map(make, BACKENDS))


def heads(peers, T):
    """A product of each head: queries to latents, and latents to values."""
    config, H, D = peers.config, peers.q_heads, peers.config["kv_lora_rank"]
    for name, depth, outputs in [("q", config["qk_nope_head_dim"], D), ("v", D, config["v_head_dim"])]:

        def make():
            x, weight = random(T, H, depth), random(H, depth, outputs)
            return lambda: torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()

        peers.time("head_linear", f"{name} T={T}", 2 * H * (T * (depth + outputs) + depth * outputs), make)


def cases(peers, args):
    for T in args.tokens:
        heads(peers, T)
    for shape in args.prefill:
        prefill(peers, shape)
    for shape in args.decode:
        decode(peers, shape)


def check():
    """Holds the two forms of absorbed attention to each other."""
    q, keys = torch.randn(2, 4, 24, device=device), torch.randn(2, 50, 24, device=device)
    torch.testing.assert_close(attend(q, keys, 16, 0.2), attend_sdpa(q, keys, 16, 0.2), rtol=1e-3, atol=1e-3)
