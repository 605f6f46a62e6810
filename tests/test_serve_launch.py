"""The server's image, its Kubernetes files, and its command line."""

import copy
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jsonschema
import pytest
import yaml
from command_cases import workplace  # noqa: F401

from beagle_jax import serve
from beagle_jax.commands.serve import load
from beagle_jax.config import load_config
from beagle_jax.decoding.tree import ROOT_ONLY
from beagle_jax.errors import UsageError, UserError, run_main

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = yaml.safe_load((ROOT / "tests" / "deployment.schema.yaml").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture
def manifests() -> dict[str, dict]:
    """The documents of the file, by their kind."""
    text = (ROOT / "launch" / "serve_deployment.yaml").read_text()
    return {made["kind"]: made for made in yaml.safe_load_all(text)}


def test_manifests_follow_the_schema(manifests):
    assert manifests.keys() == {"Service", "Deployment"}
    for made in manifests.values():
        VALIDATOR.validate(made)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec.update(terminationGraceSeconds=4),
        lambda spec: spec["containers"][0]["readinessProbe"].update(httpget={}),
        lambda spec: spec["containers"][0]["ports"][0].update(containerPort="8000"),
        lambda spec: spec["containers"][0]["env"][0].update(value=1),
    ],
)
def test_the_schema_sees_mistakes(manifests, break_it):
    made = copy.deepcopy(manifests["Deployment"])
    break_it(made["spec"]["template"]["spec"])
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(made)


def test_the_pod_serves_what_exists_safely_and_ends_in_time(manifests):
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    module, option, config, *overrides = container["args"]
    assert (module, option) == ("beagle_jax.serve", "--config")
    settings = load_config(ROOT / config, overrides).serve
    [port] = container["ports"]
    assert (settings.host, settings.port) == ("0.0.0.0", port["containerPort"])
    # Another address than 127.0.0.1 needs a key, which is no part of the file.
    [key] = [variable for variable in container["env"] if variable["name"] == "BEAGLE_JAX_API_KEY"]
    assert key["valueFrom"].keys() == {"secretKeyRef"}
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert probes == [{"path": "/health", "port": port["name"]}] * 3
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > settings.grace_seconds + pause + 5
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_service_leads_to_the_pod(manifests):
    service, deployment = manifests["Service"]["spec"], manifests["Deployment"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert service["selector"] == deployment["selector"]["matchLabels"] == labels
    [port] = service["ports"]
    [container] = deployment["template"]["spec"]["containers"]
    assert port["targetPort"] == container["ports"][0]["name"]


def test_the_image_has_a_stage_with_the_server_and_is_a_training_image_by_default():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    stages = [line.split() for line in lines if line.startswith("FROM ")]
    assert [stage[-1] for stage in stages] == ["base", "serve", "train"]
    assert [stage[1] for stage in stages[1:]] == ["base", "base"]
    place = lines.index("FROM base AS serve")
    stage = "\n".join(lines[place : lines.index("FROM base AS train")])
    assert '".[serve]"' in stage and '["beagle_jax.serve"' in stage
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    tested = {requirement.replace(" ", "") for requirement in extras["test"]}
    assert {requirement.replace(" ", "") for requirement in extras["serve"]} <= tested


CONFIG = ["--config", str(ROOT / "configs" / "quickstart.yaml")]


def test_serve_checks_the_command_line_before_it_loads_anything(monkeypatch, capsys):
    monkeypatch.delenv("BEAGLE_JAX_API_KEY", raising=False)
    with pytest.raises(UsageError, match=r"read /metrics"):
        serve.main([*CONFIG, "--json", "-"])
    with pytest.raises(UsageError, match=r"serve\.prot"):
        serve.main([*CONFIG, "serve.prot=1"])
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    with pytest.raises(UserError, match="there is no API key"):
        serve.main([*CONFIG, "serve.host=0.0.0.0"])
    assert run_main(serve.main, [*CONFIG, "draft.path=/no/draft"]) == 1
    assert "/no/draft" in capsys.readouterr().err


def test_a_plain_target_is_served_without_a_tree(workplace):
    """The command itself does it below, with the slow tests."""
    made = load(load_config(workplace.config, ["draft.path=plain", "serve.context=64"]))
    assert (made.tree, made.codec.context) == (ROOT_ONLY, 64)


@pytest.mark.parametrize("draft", ["lookup", pytest.param("plain", marks=pytest.mark.slow)])
def test_the_command_serves_a_target_of_a_folder(workplace, draft):
    """From the weights to the answer, with the programs compiled before it listens."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    overrides = [f"draft.path={draft}", "serve.port=0", "serve.rows=2", "decode.temperature=0.5"]
    overrides += ["serve.context=64"]  # few lengths of prompts, each of which compiles
    process = subprocess.Popen(
        [sys.executable, "-m", "beagle_jax.serve", "--config", workplace.config, *overrides],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        },
    )
    try:
        words = process.stdout.readline().split()
        assert words[:3] == ["serving", "target", "at"], words
        client = openai.OpenAI(base_url=f"{words[3]}/v1", api_key="none", max_retries=0)
        made = client.chat.completions.create(
            model="target", messages=[{"role": "user", "content": "Who are you?"}], seed=1
        )
        assert 0 < made.usage.completion_tokens <= 20
        process.send_signal(signal.SIGTERM)
        line = json.loads(process.stdout.readline())
        assert (line["status"], line["completion_tokens"]) == (200, made.usage.completion_tokens)
        assert process.wait(30) == 0 and process.stdout.read() == ""
    finally:
        process.kill()
        process.wait()


def test_without_its_packages_serve_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("beagle_jax.serving")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("fastapi", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"pip install 'beagle-jax\[serve\]'"):
        serve.main(CONFIG)
