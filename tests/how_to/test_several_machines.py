"""The manifest for Kubernetes has fields that KubeRay and Kubernetes have, and its command runs on a cluster of Ray."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from how_to.page_blocks import ROOT, blocks_of, programs_of
from how_to.page_models import prepared
from how_to.page_session import forking, session
from made_cluster import RayNodes

PAGE = ROOT / "docs" / "how-to" / "several-machines.md"

FIELDS: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "rayClusterSpec": {
            "rayVersion": str,
            "authOptions": {"mode": str},
            "headGroupSpec": {"rayStartParams": "parameters", "template": "pod"},
            "workerGroupSpecs": [
                {
                    "groupName": str,
                    "replicas": int,
                    "minReplicas": int,
                    "maxReplicas": int,
                    "rayStartParams": "parameters",
                    "template": "pod",
                }
            ],
        },
    },
}
"""Those of RayJob in ray.io/v1 that the page uses, with their types, from KubeRay's definition of its resources."""

QUANTITIES = {"cpu": str, "memory": str}
POD: dict[str, Any] = {
    "spec": {
        "containers": [
            {
                "name": str,
                "image": str,
                "resources": {"limits": QUANTITIES, "requests": QUANTITIES},
                "volumeMounts": [{"name": str, "mountPath": str}],
            }
        ],
        "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    }
}
"""Those of a pod's template."""


def manifest() -> dict[str, Any]:
    (block,) = (b for b in blocks_of(PAGE.read_text("utf-8")) if b.title == "merge.yaml")
    data = yaml.safe_load(block.text)
    assert isinstance(data, dict)
    return data


def check(value: Any, fields: Any, where: str) -> None:
    """Check that a value has the fields of a type, and no others."""
    if fields == "pod":
        fields = POD
    if fields == "parameters":  # a map of texts: a number would be refused
        assert all(isinstance(word, str) for word in value.values()), where
    elif isinstance(fields, dict):
        assert set(value) <= set(fields), (where, set(value) - set(fields))
        for name, each in value.items():
            check(each, fields[name], f"{where}.{name}")
    elif isinstance(fields, list):
        for number, each in enumerate(value):
            check(each, fields[0], f"{where}[{number}]")
    else:
        assert type(value) is fields, where


def test_the_manifest_has_known_fields_and_fits_together() -> None:
    data = manifest()
    check(data, FIELDS, "merge.yaml")
    assert (data["apiVersion"], data["kind"]) == ("ray.io/v1", "RayJob")
    cluster = data["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,), volumes = pod["containers"], {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"] == container["resources"]["requests"]


@pytest.mark.slow
def test_the_manifests_command_merges_and_ray_knows_the_parameters(
    tmp_path: Path, ray_nodes: RayNodes
) -> None:
    from ray.scripts.scripts import start

    data = manifest()
    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    cluster = data["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known
    (mount,) = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    folder = tmp_path / "volume"
    (recipe,) = (b.text for b in blocks_of(PAGE.read_text("utf-8")) if b.title == "recipe.yml")
    with prepared("several-machines", folder), forking() as forks, session(folder, forks):
        (folder / "recipe.yml").write_text(recipe)
        ended = subprocess.run(
            shlex.split(data["spec"]["entrypoint"].replace(f"{mount['mountPath']}/", f"{folder}/")),
            cwd=folder,
            env={
                **os.environ,
                "PATH": f"{programs_of(folder)}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT / "src"),
                "RAY_ADDRESS": ray_nodes.address,  # as Ray sets it for a job, with the next one
                "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {}, "metadata": {"job_submission_id": "merge"}}',
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ended.returncode == 0, ended.stderr
    assert (folder / "merged" / "model.safetensors").stat().st_size > 10_000
