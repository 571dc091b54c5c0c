"""What docs/DEPLOYMENT.md and deploy/ tell operators: manifests that keep to Kubernetes' schemas, a container file without
a linter's complaint, and flags that the server and the gateway have.

Prints 'N passed, N failed'; exits with 1 if a test failed.
"""
import os
import pathlib
import re
import subprocess
import sys
import traceback

import kubernetes_validate
import yaml

from server import ROOT
from test_gateway import FLAGS

MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
DEPLOYMENT = ROOT / "docs" / "DEPLOYMENT.md"
# How long after its deadline the server ends even if something hangs.
HARD_EXIT_SECONDS = 5


def flags_of(*command):
    """Returns the flags that a program says it has."""
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z][a-z0-9-]+", help_text))


def flags_of_server():
    # The other names of a flag stand in no help.
    return flags_of(os.environ["BCG_SERVER_BIN"]) | {"--tensor-parallel-size", "--tp-size", "--model-path"}


def flags_of_gateway():
    return flags_of(sys.executable, "-m", "sglang_router.launch_router")


def resources():
    return [resource for file in MANIFESTS for resource in yaml.safe_load_all(file.read_text())]


def deployment(name):
    [found] = [r for r in resources() if r["kind"] == "Deployment" and r["metadata"]["name"] == name]
    return found["spec"]["template"]["spec"]


def arguments(pod):
    """Returns the flags of a pod's container with their values, which stand behind a `=`."""
    [container] = pod["containers"]
    return dict(argument.partition("=")[::2] for argument in container["args"] if argument.startswith("--"))


def test_manifests_keep_to_the_schemas():
    assert len(MANIFESTS) == 2, MANIFESTS
    for resource in resources():
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)


def test_a_wrong_manifest_is_seen():
    [wrong] = [r for r in resources() if r["kind"] == "PodDisruptionBudget"]
    wrong["spec"]["maxUnavailible"] = 1
    try:
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError:
        return
    raise AssertionError("a field that no schema has was taken")


def test_flags_in_manifests_exist():
    for name, known in (("bcg", flags_of_server()), ("bcg-gateway", flags_of_gateway())):
        unknown = set(arguments(deployment(name))) - known
        assert not unknown, (name, unknown)


def test_a_pod_may_end_as_long_as_the_server_takes():
    pod = deployment("bcg")
    given = arguments(pod)
    ends_after = max(int(given["--shutdown-deadline"]) + HARD_EXIT_SECONDS, int(given["--shutdown-grace"]))
    assert ends_after <= pod["terminationGracePeriodSeconds"] <= ends_after + 30, pod
    pod = deployment("bcg-gateway")
    assert int(arguments(pod)["--shutdown-grace-period-secs"]) < pod["terminationGracePeriodSeconds"], pod


def test_probes_name_the_port_that_the_server_has():
    pod = deployment("bcg")
    [container] = pod["containers"]
    [port] = container["ports"]
    assert str(port["containerPort"]) == arguments(pod)["--port"] == arguments(deployment("bcg-gateway"))[
        "--service-discovery-port"
    ]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}, probe
    selector = arguments(deployment("bcg-gateway"))
    assert "--selector" in selector and "app=bcg" in deployment("bcg-gateway")["containers"][0]["args"]


def test_the_gateway_is_told_everywhere_what_was_tested():
    tested = [flag for flag in FLAGS if flag.startswith("--")]
    told = arguments(deployment("bcg-gateway"))
    for flag, value in zip(FLAGS, [*FLAGS[1:], ""]):
        if flag in tested and not value.startswith("--"):
            assert told[flag] == value, flag
    text = DEPLOYMENT.read_text()
    assert not [flag for flag in tested if flag not in told or flag not in text], tested


def test_flags_in_the_document_exist():
    text = DEPLOYMENT.read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `--")]
    known = flags_of_server()
    named = {flag for row in rows for flag in re.findall(r"--[a-z][a-z0-9-]+", row)}
    assert len(named) > 15 and not named - known, named - known


def test_the_container_file_has_no_complaints():
    hadolint = pathlib.Path(sys.executable).parent / "hadolint"
    subprocess.run([hadolint, ROOT / "Dockerfile"], check=True)
    toolchain = re.search(r'channel = "(.+)"', (ROOT / "rust-toolchain.toml").read_text())[1]
    text = (ROOT / "Dockerfile").read_text()
    assert f"FROM rust:{toolchain}-" in text, "the image has another toolchain than rust-toolchain.toml"
    [user] = re.findall(r"^USER (.+)$", text, re.MULTILINE)
    ids = {str(deployment("bcg")["securityContext"][name]) for name in ("runAsUser", "runAsGroup", "fsGroup")}
    assert user == "10001:10001" and ids == {"10001"}, (user, ids)


def main():
    passed, failed = 0, []
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        try:
            test()
            passed += 1
            print(f"ok     {name}", flush=True)
        except Exception:
            failed.append(name)
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
    print(f"{passed} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
