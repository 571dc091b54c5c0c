"""Mamba2's mixer: convolution, scan, update of states, gated norm; and the activation of the MLP beside it."""

import itertools

import torch
import torch.nn.functional as F

from lab import compiled, device, random

try:
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except ImportError:
    mamba_chunk_scan_combined = None
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None

# Tokens of a chunk of the scan.
CHUNK = 128


class Mixer:
    def __init__(self, config):
        self.H, self.P, self.G, self.N = (
            config[key] for key in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size")
        )
        self.K = config["conv_kernel"]
        self.inner, self.group_width = self.H * self.P, self.G * self.N
        self.channels = self.inner + 2 * self.group_width

    def inputs(self, rows):
        """x, dt, A, B, C, D and the bias of dt."""
        x, dt = random(rows, self.H, self.P), random(rows, self.H)
        B, C = random(rows, self.G, self.N), random(rows, self.G, self.N)
        A = -torch.rand(self.H, device=device) * 15 - 1
        return x, dt, A, B, C, torch.ones(self.H, device=device), torch.full((self.H,), -4.0, device=device)


def convolve(x, weight, bias):
    """The causal convolution of one sequence `[L, C]`."""
    kernel = weight.shape[1]
    out = F.conv1d(x.T[None], weight[:, None], bias, padding=kernel - 1, groups=len(weight))
    return F.silu(out[0, :, : len(x)]).T.contiguous()


def scan(x, dt, A, B, C, D, dt_bias):
    """The outputs of one sequence and its state behind it, from zeros; L is a multiple of the chunk."""
    (L, H, P), (G, N) = x.shape, B.shape[1:]
    chunks, heads = L // CHUNK, H // G
    dt = F.softplus(dt.float() + dt_bias).view(chunks, CHUNK, G, heads)
    decay = (dt * A.view(G, heads)).cumsum(1)  # the logarithm of what is left of a chunk's start
    x, B, C = x.view(chunks, CHUNK, G, heads, P), B.view(chunks, CHUNK, G, N), C.view(chunks, CHUNK, G, N)
    scaled = (x * dt[..., None]).to(x.dtype)

    # Within a chunk: every token sees those before it.
    scores = torch.einsum("clgn,csgn->cgls", C, B)
    since = (decay[:, :, None] - decay[:, None]).permute(0, 3, 4, 1, 2)  # c g h l s
    seen = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()
    weights = (scores[:, :, None] * since.masked_fill(~seen, -torch.inf).exp()).to(x.dtype)
    inside = torch.einsum("cghls,csghp->clghp", weights, scaled)

    # What each chunk adds to the state, and what of it later chunks see.
    left = (decay[:, -1:] - decay).exp()
    added = torch.einsum("csgn,csghp->cghpn", B, (scaled * left[..., None]).to(x.dtype)).float()
    total = F.pad(decay[:, -1].cumsum(0), (0, 0, 0, 0, 1, 0))  # the state ahead of chunk z has lost total[z]
    passed = (total[:, None] - total[None, 1:]).permute(2, 3, 0, 1)  # g h z c
    before = torch.ones(chunks + 1, chunks, dtype=torch.bool, device=x.device).tril(-1)
    states = torch.einsum("ghzc,cghpn->zghpn", passed.masked_fill(~before, -torch.inf).exp(), added)
    carried = torch.einsum("clgn,cghpn->clghp", C, states[:-1].to(x.dtype)) * decay.exp()[..., None]
    out = inside + carried + x * D.view(G, heads, 1)
    return out.to(x.dtype).reshape(L, H, P), states[-1].reshape(H, P, N)


def update(state, x, dt, A, B, C, D, dt_bias):
    """One token of each of B sequences; the state `[B, H, P, N]` changes."""
    heads = x.shape[1] // B.shape[1]
    dt = F.softplus(dt.float() + dt_bias)
    B, C = (part.float().repeat_interleave(heads, 1) for part in (B, C))
    new = state * (dt * A).exp()[..., None, None] + (dt[..., None] * x)[..., None] * B[:, :, None]
    state.copy_(new)
    return ((new * C[:, :, None]).sum(-1) + x * D[:, None]).to(x.dtype)


def gated_norm(y, gate, weight, groups, eps):
    gated = (y.float() * F.silu(gate.float())).view(len(y), groups, -1)
    return (F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(1) * weight.float()).to(y.dtype)


def relu2(x):
    return F.relu(x).square()


def lens_of(shape):
    B, T = map(int, shape.split("x"))
    return [T + (2 * index - (B - 1)) * (T // B) for index in range(B)]


def prefill(peers, mixer, shape):
    lens = lens_of(shape)
    rows, starts = sum(lens), [0, *itertools.accumulate(lens)]
    index = torch.cat([torch.full((length,), number, dtype=torch.int32) for number, length in enumerate(lens)]).to(device)

    def conv_torch():
        x, weight, bias = random(rows, mixer.channels), random(mixer.channels, mixer.K), random(mixer.channels)
        return lambda: [convolve(x[first:end], weight, bias) for first, end in itertools.pairwise(starts)]

    def conv_package():
        x, weight, bias = random(1, rows, mixer.channels), random(mixer.channels, mixer.K), random(mixer.channels)
        return lambda: causal_conv1d_fn(x.transpose(1, 2), weight, bias, seq_idx=index[None], activation="silu")

    def scan_with(function):
        def make():
            x, dt, A, B, C, D, dt_bias = mixer.inputs(-(-max(lens) // CHUNK) * CHUNK)
            ends = [-(-length // CHUNK) * CHUNK for length in lens]  # padded, as one has to
            return lambda: [function(x[:n], dt[:n], A, B[:n], C[:n], D, dt_bias) for n in ends]

        return make

    def scan_package():
        x, dt, A, B, C, D, dt_bias = mixer.inputs(rows)
        options = dict(chunk_size=CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True, seq_idx=index[None])
        return lambda: mamba_chunk_scan_combined(x[None], dt[None], A, B[None], C[None], **options)

    conv = [conv_torch] + ([conv_package] if causal_conv1d_fn else [])
    peers.time("causal_conv1d", shape, (2 * rows + len(lens) * (mixer.K - 1)) * mixer.channels * 2, *conv)
    row_bytes = 2 * (2 * mixer.inner + 2 * mixer.group_width + mixer.H)
    nbytes = rows * row_bytes + len(lens) * mixer.inner * mixer.N * 4
    scans = [scan_with(scan)]
    if len(lens) == 1:  # else each length would be compiled
        scans.append(scan_with(compiled(scan)))
    peers.time("ssd_scan", shape, nbytes, *scans, *([scan_package] if mamba_chunk_scan_combined else []))


def decode(peers, mixer, batch):
    def update_with(function):
        def make():
            inputs, state = mixer.inputs(batch), torch.randn(batch, mixer.H, mixer.P, mixer.N, device=device)
            return lambda: function(state, *inputs)

        return make

    def update_package():
        x, dt, A, B, C, D, dt_bias = mixer.inputs(batch)
        state = torch.randn(batch, mixer.H, mixer.P, mixer.N, device=device)
        A = A[:, None, None].expand(-1, mixer.P, mixer.N)
        dt, D, dt_bias = (tensor[..., None].expand(*tensor.shape, mixer.P) for tensor in (dt, D, dt_bias))
        return lambda: selective_state_update(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)

    row_bytes = 2 * (2 * mixer.inner + 2 * mixer.group_width + mixer.H)
    nbytes = batch * (row_bytes + 2 * mixer.inner * mixer.N * 4)
    package = [update_package] if mamba_chunk_scan_combined else []
    peers.time("ssm_update", f"B={batch}", nbytes, update_with(update), update_with(compiled(update)), *package)


def cases(peers, args):
    mixer = Mixer(peers.config)
    C, I, inner, eps = peers.hidden, peers.inner, mixer.inner, peers.eps
    for T in args.tokens:
        shape = f"T={T}"
        peers.linear(f"in_proj {shape}", T, inner + mixer.channels + mixer.H, C, 2)
        peers.linear(f"out_proj {shape}", T, C, inner, 2)
        peers.linear(f"up_proj {shape}", T, I, C, 2)
        peers.linear(f"down_proj {shape}", T, C, I, 2)

        def activation(function):
            def make():
                x = random(T, I)
                return lambda: function(x)

            return make

        def norm(function):
            def make():
                y, gate, weight = random(T, inner), random(T, inner), random(inner)
                return lambda: function(y, gate, weight, mixer.G, eps)

            return make

        peers.time("relu2", shape, 4 * T * I, activation(relu2), activation(compiled(relu2)))
        nbytes = (3 * T + 1) * inner * 2
        peers.time("gated_rms_norm", shape, nbytes, norm(gated_norm), norm(compiled(gated_norm)))
    for shape in args.prefill:
        if "+" not in shape:
            prefill(peers, mixer, shape)
    for batch in sorted({int(shape.split("x")[0]) for shape in args.decode}):
        decode(peers, mixer, batch)


def check():
    """Holds the scan to the update, token by token."""
    sizes = dict(mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=32, conv_kernel=4)
    x, dt, A, B, C, D, dt_bias = (tensor.float() for tensor in Mixer(sizes).inputs(3 * CHUNK))
    out, state = scan(x, dt, A, B, C, D, dt_bias)
    expected = torch.zeros(1, 4, 16, 32, device=device)
    for token in range(len(x)):
        one = slice(token, token + 1)
        row = update(expected, x[one], dt[one], A, B[one], C[one], D, dt_bias)
        torch.testing.assert_close(out[one], row, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(state, expected[0], rtol=1e-3, atol=1e-3)
