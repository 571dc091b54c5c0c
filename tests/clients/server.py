"""A `bcg-server` of the tiny checkpoint on the host device, for the tests of clients beside this file.

Needs BCG_SERVER_BIN, the path of a built `bcg-server`.
"""
import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = "tiny-qwen3"
MODEL_DIR = ROOT / "models" / MODEL
START_SECONDS_MAX = 120


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_ready(server, base):
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{base}/health", timeout=START_SECONDS_MAX) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"the server was not ready after {START_SECONDS_MAX} s")


def spawn(port, *flags):
    """Starts a server, which is not ready yet."""
    command = [os.environ["BCG_SERVER_BIN"], "--model", str(MODEL_DIR), "--device", "host", "--port", str(port)]
    command += ["--context-length", "1024", "--enable-breakable-cuda-graph", "--cuda-graph-max-tokens", "64", *flags]
    return subprocess.Popen(command, env={**os.environ, "RUST_LOG": "warn"})


def stop(server):
    """Ends a server as an operator does; one that does not end well is an error."""
    server.terminate()
    if server.wait(timeout=30) != 0:
        raise RuntimeError(f"the server ended with {server.returncode} after SIGTERM")


@contextlib.contextmanager
def running(*flags):
    """Starts a server on a free port, yields its address, and stops it."""
    port = free_port()
    server = spawn(port, *flags)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(server, base)
        yield base
        stop(server)
    finally:
        if server.poll() is None:
            server.kill()
