"""Stands in for SLURM: `sbatch`, `srun` and `scontrol` that run a job on this machine, whose processes are its nodes.

It knows the options that the page's script uses and refuses others. As in SLURM, a step has the environment of the script, the
script runs on the first node, and what still runs when the script ends is ended.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOB = 4242
NODES = ("node1", "node2", "node3")
PROGRAMS = ("sbatch", "srun", "scontrol")
STEP_SECONDS = 240
"""How long a node may take to start Ray before the next one starts: on one machine, two that start together take each other's ports."""


def install(folder: Path) -> Path:
    """Write the programs, and Ray's, into a folder for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        program = folder / name
        program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {__file__} {name} "$@"\n')
        program.chmod(0o755)
    ray = folder / "ray"
    ray.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "from ray.scripts.scripts import main; main()" "$@"\n'
    )
    ray.chmod(0o755)
    return folder


def sbatch(words: list[str]) -> int:
    """Run a script to its end, with its output in slurm-JOB.out, and end what it leaves running."""
    script = Path(words[0])
    text = script.read_text("utf-8")
    assert text.startswith("#!/bin/bash\n")
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, re.MULTILINE))
    known = {"job-name", "nodes", "ntasks-per-node", "cpus-per-task", "mem", "time"}
    assert set(asked) <= known, set(asked) - known
    assert int(asked["nodes"]) == len(NODES)
    environment = {
        **os.environ,
        "SLURM_JOB_ID": str(JOB),
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_JOB_NUM_NODES": asked["nodes"],
        "SLURM_CPUS_PER_TASK": "1",  # not as many as asked: three nodes share this machine
        "SLURMD_NODENAME": NODES[0],
    }
    print(f"Submitted batch job {JOB}", flush=True)
    lock = Path(tempfile.gettempdir(), "alnico-made-slurm.lock")  # jobs of one number have one port
    with lock.open("w") as held, open(f"slurm-{JOB}.out", "w", encoding="utf-8") as output:
        fcntl.flock(held, fcntl.LOCK_EX)
        job = subprocess.Popen(
            ["bash", script, *words[1:]],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            job.wait()
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(job.pid, number)
                    time.sleep(1)
                except ProcessLookupError:
                    break
    return 0


def srun(words: list[str]) -> int:
    """Run a command once on each of some nodes, and wait; SIGTERM is passed on."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--ntasks", type=int, required=True)
    parser.add_argument("--nodelist", default="")
    parser.add_argument("--exclude", default="")
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    asked = parser.parse_args(words[:first])
    nodes = [n for n in NODES if n in (asked.nodelist or ",".join(NODES)) and n not in asked.exclude]
    assert len(nodes) == asked.nodes == asked.ntasks, (nodes, asked)
    steps: list[subprocess.Popen[bytes]] = []

    def end(number: int, _: object) -> None:
        for step in steps:
            step.send_signal(number)

    signal.signal(signal.SIGTERM, end)
    for node in nodes:
        environment = {**os.environ, "SLURMD_NODENAME": node}
        log = Path(f"{node}.log")
        with log.open("wb") as output:
            steps.append(
                subprocess.Popen(words[first:], env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
        deadline = time.monotonic() + STEP_SECONDS
        while node != nodes[-1] and steps[-1].poll() is None and time.monotonic() < deadline:
            if b"Ray runtime started" in log.read_bytes():
                break
            time.sleep(0.1)
    return max(abs(step.wait()) for step in steps)


def scontrol(words: list[str]) -> int:
    assert words == ["show", "hostnames", "node[1-3]"], words
    print("\n".join(NODES))
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
