#!/usr/bin/env python3
"""Writes a random checkpoint of a real geometry and the logits that transformers computes for it in float32.

    python3 reference.py models/geometries/qwen3-8b OUT [--layers 4] [--seed 1]

Needs torch, transformers and safetensors, and takes the GPU if there is one. OUT gets:

- config.json, model.safetensors: the checkpoint, bf16, with fewer layers than the geometry has;
- reference.json: {"sequences": [{"tokens": [...], "first_row": N}, ...]};
- logits.f32: for each sequence the logits [vocabulary] of positions first_row.., little-endian f32, one row after another.

The reference multiplies in float32 without TF32, with the bf16 values of the weights.
"""

import argparse
import json
import math
import pathlib
import sys

try:
    import torch
    from safetensors.torch import save_file
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


def random_weights(model, seed):
    """Fills every parameter with bf16 values such that activations stay near 1 and logits are spread."""
    generator = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, device=model.device)
        if parameter.dim() == 1:
            value = (1 + 0.1 * noise) * (QK_SCALE if "q_norm" in name or "k_norm" in name else 1.0)
        elif "embed_tokens" in name:
            value = noise
        else:
            stds = {"lm_head": LOGIT_STD, "o_proj": BRANCH_STD, "down_proj": BRANCH_STD}
            std = next((std for part, std in stds.items() if part in name), 1.0)
            value = noise * (std / math.sqrt(parameter.shape[1]))
        parameter.data.copy_(value.bfloat16())


def sequences(vocab_size, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def logits(model, tokens, rows):
    """The last `rows` rows of logits, in f32."""
    ids = torch.tensor([tokens], device=model.device)
    with torch.no_grad():
        return model(ids, logits_to_keep=rows, use_cache=False).logits[0].float()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("geometry", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")

    fields = json.loads((args.geometry / "config.json").read_text())
    fields["num_hidden_layers"] = fields["max_window_layers"] = args.layers
    fields.pop("layer_types", None)
    (args.out / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    config = AutoConfig.from_pretrained(args.out)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    random_weights(model, args.seed)
    tensors = {name: tensor.bfloat16().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, args.out / "model.safetensors", metadata={"format": "pt"})

    texts = sequences(config.vocab_size, args.seed)
    references = [logits(model, tokens, min(ROWS_MAX, len(tokens))) for tokens in texts]
    with open(args.out / "logits.f32", "wb") as file:
        for reference in references:
            file.write(reference.cpu().numpy().astype("<f4").tobytes())
    listed = [{"tokens": t, "first_row": len(t) - len(r)} for t, r in zip(texts, references)]
    (args.out / "reference.json").write_text(json.dumps({"sequences": listed}) + "\n")

    # For comparison: how far the same model lies from it in bf16. The rotary frequencies stay float32, as when it is loaded.
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model = model.bfloat16()
    for name, buffer in model.named_buffers():
        buffer.data = frequencies[name]
    for tokens, reference in zip(texts, references):
        rows = logits(model, tokens, len(reference))
        errors = (rows - reference).norm(dim=1) / reference.norm(dim=1)
        spread = f"logits {reference.min().item():.2f} to {reference.max().item():.2f}"
        print(f"{len(tokens)} tokens: {spread}; transformers in bf16: relative error {errors.max().item():.2e}")


if __name__ == "__main__":
    main()
