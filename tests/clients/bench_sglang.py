"""SGLang's benchmark client, from its package, against the server: 500 requests for each of two of its backends.

The client's module is used as it is. Its package imports torch and more for models and images, which the client does not
use: those imports are answered with empty modules.
"""
import importlib.util
import json
import pathlib
import sys
import tempfile
import types

import server

NUM_REQUESTS = 500


def without_models():
    """Makes `sglang.benchmark.serving` importable without what runs models."""
    [package] = importlib.util.find_spec("sglang").submodule_search_locations
    for name in ("sglang", "sglang.srt", "sglang.srt.utils", "sglang.srt.disaggregation"):
        module = types.ModuleType(name)
        module.__path__ = [str(pathlib.Path(package, *name.split(".")[1:]))]
        sys.modules[name] = module
    stubs = {
        "sglang.srt.disaggregation.utils": "FAKE_BOOTSTRAP_HOST",
        "sglang.benchmark.datasets.image": "ImageDataset",
        "sglang.benchmark.datasets.mmmu": "MMMUDataset",
        "psutil": "Process",
        "zmq": "Context",
    }
    for name, attribute in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], attribute, None)


def bench(serving, base, backend, folder):
    file = pathlib.Path(folder) / f"{backend}.jsonl"
    sys.argv = ["serving", "--backend", backend, "--base-url", base, "--model", str(server.MODEL_DIR)]
    sys.argv += ["--served-model-name", server.MODEL, "--dataset-name", "random-ids", "--num-prompts", str(NUM_REQUESTS)]
    sys.argv += ["--random-input-len", "48", "--random-output-len", "12", "--max-concurrency", "64", "--flush-cache"]
    sys.argv += ["--output-file", str(file), "--output-details", "--disable-tqdm"]
    serving.cli_main()
    result = json.loads(file.read_text())
    errors = [error for error in result["errors"] if error]
    print(f"{backend}: {result['completed']} of {NUM_REQUESTS} completed, {len(errors)} errors", flush=True)
    if result["completed"] != NUM_REQUESTS or errors:
        sys.exit(f"{backend}: {errors[:3]}")


def main():
    without_models()
    from sglang.benchmark import serving

    with server.running("--max-running-requests", "32") as base, tempfile.TemporaryDirectory() as folder:
        for backend in ("sglang", "sglang-oai"):
            bench(serving, base, backend, folder)


if __name__ == "__main__":
    main()
