"""A search on a cluster: two nodes of Ray, started on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import alnico
from made_tasks import Made

CLUSTER = """
import json, sys
import ray
from ray.cluster_utils import Cluster
from ray._private.state import actors
import alnico

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    nodes = set()
    watch = lambda trial: nodes.update(actor["Address"]["NodeID"] for actor in actors().values())
    found = alnico.search(sys.argv[1], workers=2, ray=True, threads=1, watch=watch)
    print("\\n" + json.dumps({"nodes": len(nodes), "values": [t.values for t in found.trials]}))
    ray.shutdown()
    cluster.shutdown()
"""


@pytest.mark.slow
def test_trials_are_scored_on_two_nodes_as_they_are_on_one(made: Made, tmp_path: Path) -> None:
    models = [{"model": m, "parameters": {"weight": {"search": [0.0, 1.2]}}} for m in made.references[:2]]
    search = {"tasks": str(made.valid), "trials": 5, "sampler": "random"}
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(made.base),
        "models": models,
        "search": search,
    }
    file = tmp_path / "search.yml"
    file.write_text(yaml.safe_dump(recipe))
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    shown = subprocess.run(
        [sys.executable, str(script), str(file)], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.strip().splitlines()[-1])
    assert found["nodes"] == 2
    assert [tuple(v) for v in found["values"]] == [t.values for t in alnico.search(file).trials]
