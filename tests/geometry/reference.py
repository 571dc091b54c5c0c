#!/usr/bin/env python3
"""Writes a random checkpoint of a real geometry and the logits that transformers computes for it in float32.

    python3 reference.py models/geometries/qwen3-8b OUT [--vocab 8192] [--seed 1]
    python3 reference.py models/tiny-nemotron-h --check

Needs torch, transformers and safetensors, and takes the GPU if there is one. OUT gets:

- config.json, model.safetensors: the checkpoint, bf16, with few layers of each kind, under the names of published ones;
- reference.json: {"sequences": [{"tokens": [...], "first_row": N, "near_ties": [position, ...], "bf16_error": E}, ...]};
- logits.f32: for each sequence the logits [vocabulary] of positions first_row.., little-endian f32, one row after another.

The reference multiplies in float32 without TF32, with the bf16 values of the weights.

Where the scores of two experts nearly tie, rounding alone decides which one is chosen, and a right implementation may be far
from the reference. So a token's embedding says which experts it wants, well apart from the others, and the rest of the hidden
state only moves their scores. `near_ties` has the positions that come close to a tie nevertheless; `bf16_error` is the largest
relative error of the same model in bf16.

With --check, nothing is written: the reference logits that the checkpoint in the folder has are computed again.
"""

import argparse
import json
import math
import pathlib
import sys

try:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    sys.exit(f"reference.py needs torch, transformers and safetensors: {error}")

# Lengths of the sequences: one token, less and more than a page, whole and broken tiles of any kernel.
LENGTHS = [1, 21, 64, 129, 300, 777]
# Rows of logits kept of a sequence, counted from its end.
ROWS_MAX = 32
# The standard deviation of logits.
LOGIT_STD = 2.0
# The scale of query and key norms. Scores have its square as standard deviation: attention to hundreds of keys then picks
# few of them, and its output stays a good part of the logits (0.2 to 0.6 of them, by length).
QK_SCALE = 1.5
# The size of what a branch adds to the residual stream, as 1 / sqrt(number of branches) for four layers.
BRANCH_STD = 0.35
# By how much the weights of the chosen experts make their sum smaller than one expert's output.
EXPERT_GAIN = {"qwen3_moe": 3.0, "deepseek_v2": 3.5, "deepseek_v3": 1.2}
# The scores that an embedding asks for: of chosen experts, of others, and the spread of both.
WANTED, UNWANTED, SCORE_STD = 1.2, -1.8, 0.2
# How much a branch adds to what asks for experts, beside what it adds elsewhere.
ROUTE_STD = 0.3
# B and C are this much larger than the input of the scan, so that what comes out of states is as large as what skips them.
STATE_SCALE = 2.0
# A routing is near a tie if other experts are chosen when the hidden state's elements are off by this part of its size, in
# any of so many random directions. Rounding to bf16 in two layers puts them off by about a quarter of it.
TIE_NOISE, TIE_TRIALS = 0.02, 16
# Relative error of logits that other hardware computed in float32, perhaps with TF32.
SAME = 5e-3


def cut(fields, layers, vocab):
    """The configuration with few layers of each kind, and fewer experts where those of one layer take 11 GB."""
    family = fields["model_type"]
    if family == "nemotron_h":
        fields.pop("layers_block_type", None)
        fields["hybrid_override_pattern"] = "M-*" * (layers or 2)
        fields["num_hidden_layers"] = len(fields["hybrid_override_pattern"])
    else:
        fields["num_hidden_layers"] = layers or {"qwen3": 4, "qwen3_moe": 2}.get(family, 3)
    if family == "deepseek_v3":
        fields["n_routed_experts"] = min(fields["n_routed_experts"], 32)
    for field, value in {"max_window_layers": fields["num_hidden_layers"], "first_k_dense_replace": 1}.items():
        if field in fields:
            fields[field] = value
    fields.pop("layer_types", None)
    if vocab is not None and vocab < fields["vocab_size"]:
        fields["vocab_size"] = vocab
        for field in ("bos_token_id", "eos_token_id"):
            fields.pop(field, None)
    return fields


def build(config):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = dict(attn_implementation="eager", experts_implementation="eager")
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    return prepared(model)


def prepared(model):
    """Ready for inference. The step of a state-space layer has the limits of its configuration, none at all if that says
    nothing, as the published models have: transformers 5.17 never lets it below `time_step_min`, but in decodes it does."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = tuple(float(limit) for limit in model.config.time_step_limit)
    return model.eval()


def random_weights(model, seed):
    """Fills every parameter with bf16 values such that activations stay near 1 and logits are spread."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    family, config = model.config.model_type, model.config
    tensors = [*model.named_parameters(), *(pair for pair in model.named_buffers() if "correction_bias" in pair[0])]
    for name, tensor in tensors:
        noise = torch.randn(tensor.shape, generator=generator, device=model.device)
        uniform = torch.rand(tensor.shape, generator=generator, device=model.device)
        if name.endswith("A_log"):
            value = (1 + 15 * uniform).log()
        elif name.endswith("dt_bias"):
            step = 1e-3 * 100**uniform
            value = step + (-torch.expm1(-step)).log()
        elif name.endswith("bias"):
            value = (0.02 if "correction" in name else 0.1) * noise
        elif tensor.dim() == 1:
            value = (1 + 0.1 * noise) * (QK_SCALE if "q_norm" in name or "k_norm" in name else 1.0)
        elif "embed" in name:
            value = noise
        elif "conv1d" in name:
            value = noise / math.sqrt(tensor.shape[-1])
            value[config.mamba_num_heads * config.mamba_head_dim :] *= STATE_SCALE
        else:
            stds = {"lm_head": LOGIT_STD, "o_proj": BRANCH_STD, "out_proj": BRANCH_STD, "down_proj": BRANCH_STD}
            if family == "nemotron_h":  # there is no norm of queries and keys
                stds.update(q_proj=QK_SCALE, k_proj=QK_SCALE)
            std = next((std for part, std in stds.items() if part in name), 1.0)
            gain = EXPERT_GAIN[family] if "experts.down_proj" in name and "shared" not in name else 1.0
            value = noise * (gain * std / math.sqrt(tensor.shape[-1]))
        tensor.data.copy_(value)
    if family in EXPERT_GAIN:
        route_by_embedding(model, generator)
    for _, tensor in tensors:
        tensor.data.copy_(tensor.bfloat16())


def wanted_experts(embedding, config, num_experts, generator):
    """Writes the scores that each token wants of the experts into the first elements of its embedding."""
    num_groups = getattr(config, "n_group", None) or 1
    each = num_experts // num_groups
    draw = lambda *shape: torch.rand(*shape, generator=generator, device=embedding.device)
    chosen_groups = getattr(config, "topk_group", None) or 1
    groups = draw(len(embedding), num_groups).topk(chosen_groups, -1)[1]
    # As many in each chosen group.
    experts = draw(len(embedding), chosen_groups, each).topk(config.num_experts_per_tok // chosen_groups, -1)[1]
    chosen = (groups[..., None] * each + experts).flatten(1)
    noise = torch.randn(len(embedding), num_experts, generator=generator, device=embedding.device)
    wanted = torch.full_like(noise, UNWANTED).scatter_(1, chosen, WANTED) + SCORE_STD * noise
    embedding[:, :num_experts] = wanted


def route_by_embedding(model, generator):
    """Makes routers read what embeddings want, and branches leave that almost alone."""
    config, layers = model.config, model.model.layers
    num_experts, num_groups = len(layers[-1].mlp.gate.weight), getattr(config, "n_group", None) or 1
    wanted_experts(model.model.embed_tokens.weight.data, config, num_experts, generator)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("o_proj", "down_proj")):
            parameter.data[..., :num_experts, :] *= ROUTE_STD
    for index, layer in enumerate(layers):
        if not hasattr(layer.mlp, "gate"):
            continue
        router = layer.mlp.gate.weight.data
        router *= SCORE_STD
        # Each layer gives a token other experts; groups stay together.
        shift = index * (num_experts // num_groups) if num_groups > 1 else 5 * index
        wants = torch.eye(num_experts, device=router.device).roll(shift, 0)
        router[:, :num_experts] = wants


def logits(model, tokens, rows):
    """The last `rows` rows of logits, in f32."""
    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        return model(ids, logits_to_keep=rows, use_cache=False).logits[0].float()


def near_ties(model, tokens):
    """The positions at which a router would choose other experts for a slightly different hidden state."""
    near = torch.zeros(len(tokens), dtype=torch.bool, device=model.device)

    def experts(router, x):
        return type(router).forward(router, x)[2].sort(-1)[0]

    def observe(router, inputs, _):
        hidden = inputs[0].reshape(len(tokens), -1)
        size = hidden.square().mean(-1, keepdim=True).sqrt()
        chosen = experts(router, hidden)
        generator = torch.Generator(device=model.device).manual_seed(7)
        for _ in range(TIE_TRIALS):
            noise = torch.randn(hidden.shape, generator=generator, device=model.device)
            near.logical_or_((experts(router, hidden + TIE_NOISE * size * noise) != chosen).any(-1))

    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    hooks = [router.register_forward_hook(observe) for router in routers]
    if routers:
        logits(model, tokens, 1)
    for hook in hooks:
        hook.remove()
    return near.nonzero()[:, 0].tolist()


def texts(model, seed):
    """Sequences of random tokens, and the positions in each that are near a tie."""
    generator = torch.Generator().manual_seed(seed + 1)
    found = []
    for length in LENGTHS:
        tokens = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        found.append((tokens, near_ties(model, tokens)))
    left_out = sum(len(near) for _, near in found)
    print(f"{left_out} of {sum(LENGTHS)} tokens are near a tie of experts")
    return found


def relative_error(rows, reference):
    return ((rows - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()


def check(folder):
    """Computes the logits in reference_logits.json again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model = prepared(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    worst = 0.0
    for case in json.loads((folder / "reference_logits.json").read_text())["cases"]:
        rows = logits(model, case["ids"], len(case["ids"]))
        worst = max(worst, relative_error(rows[-1].cpu(), torch.tensor(case["last_logits"])))
        if rows.argmax(-1).tolist() != case["argmax"]:
            sys.exit(f"{folder}: other best tokens than in reference_logits.json")
    print(f"{folder}: relative error {worst:.1e}")
    if worst > SAME:
        sys.exit(f"{folder}: other logits than in reference_logits.json")


def write_reference(model, folder, seed):
    """Writes the texts and their logits, and returns those."""
    sequences = texts(model, seed)
    references = [logits(model, tokens, min(ROWS_MAX, len(tokens))) for tokens, _ in sequences]
    with open(folder / "logits.f32", "wb") as file:
        for reference in references:
            file.write(reference.cpu().numpy().astype("<f4").tobytes())

    # For comparison: how far the same model lies from it in bf16. The rotary frequencies stay float32, as when it is loaded.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.bfloat16()
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name]
    listed = []
    for (tokens, near), reference in zip(sequences, references):
        error = relative_error(logits(model, tokens, len(reference)), reference)
        spread = f"logits {reference.min().item():.2f} to {reference.max().item():.2f}"
        print(f"{len(tokens)} tokens: {spread}; transformers in bf16: relative error {error:.2e}")
        first_row = len(tokens) - len(reference)
        listed.append({"tokens": tokens, "first_row": first_row, "near_ties": near, "bf16_error": error})
    (folder / "reference.json").write_text(json.dumps({"sequences": listed}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path, nargs="?")
    parser.add_argument("--layers", type=int, help="layers of each kind of Nemotron-H, layers of the others")
    parser.add_argument("--vocab", type=int, help="at most so many tokens")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if args.check:
        return check(args.geometry)
    if args.out is None:
        parser.error("OUT is missing")

    args.out.mkdir(parents=True, exist_ok=True)
    fields = cut(json.loads((args.geometry / "config.json").read_text()), args.layers, args.vocab)
    config_json = json.dumps(fields, indent=2) + "\n"
    (args.out / "config.json").write_text(config_json)
    model = build(AutoConfig.from_pretrained(args.out))
    random_weights(model, args.seed)
    write_reference(model, args.out, args.seed)
    model.save_pretrained(args.out, max_shard_size="100GB")
    (args.out / "config.json").write_text(config_json)  # as published, not as transformers writes it
    (args.out / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
