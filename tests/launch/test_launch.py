"""What starts a trainer on clusters: scripts that shellcheck passes, objects that Kubernetes knows, real flags."""

import pathlib
import re
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml

from magistral_jax.config import FIELD_TYPES

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")


def complaints(*words: str, script: str | None = None) -> str:
    return subprocess.run([SHELLCHECK, *words], input=script, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def service_and_job():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return service, job


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound(script: pathlib.Path):
    assert complaints(str(script)) == ""
    assert complaints("-", script='#!/bin/bash\ncd "$1"; rm $2\n')  # the checker does complain


def test_kubernetes_knows_the_objects(service_and_job):
    for document in service_and_job:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_pods_find_the_first_one_and_are_as_many_as_the_trainer_waits_for(service_and_job):
    service, job = service_and_job
    name, spec = job["metadata"]["name"], job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    (script,) = container["args"]
    assert complaints("--shell=sh", "-", script=script) == ""
    settings = dict(re.findall(r"--distributed\.(\w+)=(\S+)", script))
    host, _, _ = settings["coordinator"].partition(":")
    assert host == f"{name}-0.{spec['template']['spec']['subdomain']}"
    assert service["metadata"]["name"] == spec["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert spec["completionMode"] == "Indexed"
    assert int(settings["num_processes"]) == spec["completions"] == spec["parallelism"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_all_flags_are_settings():
    flags = {
        (path.name, flag)
        for path in LAUNCH.iterdir()
        for flag in re.findall(r"--(\w+\.\w+)=", path.read_text())
        if path.is_file()
    }
    assert len(flags) >= 4
    unknown = {(path, flag) for path, flag in flags if flag not in FIELD_TYPES}
    assert unknown <= {("slurm.sh", "section.key")}  # of its usage line
