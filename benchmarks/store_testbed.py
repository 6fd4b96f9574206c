"""Publishes the specialists of docs/quality.md, pulls them by other people, and equips them by name: the scores of a full merge?

    python benchmarks/store_testbed.py --work DIR

DIR is the work folder of `python benchmarks/quality`, which trains the specialists. Each is stored with every bit, with its task; then
all are pushed to a folder that a web server serves and to an S3-compatible server (moto), found by task, pulled from each into a store
of its own, and equipped by name. The result is compared with the merge of the full fine-tunes: every byte of every tensor, and the
scores on the test rows. Prints the lines of docs/store.md. Needs [dev]; takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import fmean

import numpy as np

import alnico
from quality.bench import Bench
from quality.parse import CORPORA
from quality.specialists import Training

WEIGHT = 0.3
BUCKET = "vectors"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def pulled(source: str, folder: Path, tasks: list[str]) -> alnico.Store:
    """Find a vector for each task in a remote, and pull it into a new store."""
    shutil.rmtree(folder, ignore_errors=True)
    store = alnico.Store(folder)
    remote = alnico.Store(source, folder=folder)
    began = time.perf_counter()
    remote.update()
    for task in tasks:
        (found,) = remote.search(task=task)
        store.pull(found.entry.name, source=source)
    seconds = time.perf_counter() - began
    size = sum(store[name].manifest.byte_size for name in (f"specialist-{task}" for task in tasks))
    print(
        f"- {source.partition(':')[0]}: {len(tasks)} vectors of {size / 1e6:.0f} MB found by task and pulled in {seconds:.1f} s"
    )
    return store


def differing(first: Path, second: Path) -> list[str]:
    """Tensors whose bytes differ between two models."""
    with alnico.open(first) as a, alnico.open(second) as b:
        assert set(a.tensors) == set(b.tensors)
        return [n for n in a.tensors if a.read(n).tobytes() != b.read(n).tobytes()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    from moto.server import ThreadedMotoServer

    with Bench(asked.work.resolve(), list(CORPORA), Training(seed=0)) as bench:
        bench.prepare()
        tasks, base, work = list(bench.tasks), bench.work / "base", bench.work / "store"
        shutil.rmtree(work, ignore_errors=True)
        publisher = alnico.Store(work / "publisher")
        began = time.perf_counter()
        for task in tasks:
            model = bench.work / bench.specialist(task)
            publisher.create(model, base, f"specialist-{task}", exact=True, tasks=[task])
        print(f"- created: {len(tasks)} vectors with every bit in {time.perf_counter() - began:.1f} s")
        served = work / "served"
        served.mkdir()
        os.environ.update(
            AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1"
        )
        s3 = ThreadedMotoServer(port=0, verbose=False)
        s3.start()
        host, port = s3.get_host_and_port()
        os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
        web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served)))
        threading.Thread(target=web.serve_forever, daemon=True).start()
        try:
            import s3fs

            s3fs.S3FileSystem().mkdir(BUCKET)
            for task in tasks:
                publisher.push(f"specialist-{task}", str(served))
                publisher.push(f"specialist-{task}", f"s3://{BUCKET}/public")
            stores = {
                "web": pulled(f"http://127.0.0.1:{web.server_port}", work / "from-web", tasks),
                "s3": pulled(f"s3://{BUCKET}/public", work / "from-s3", tasks),
            }
        finally:
            web.shutdown()
            s3.stop()
        full = work / "full"
        alnico.merge(
            {
                **bench.sum("task_arithmetic", [WEIGHT] * len(tasks)),
                "base_model": str(base),
                "models": [
                    {"model": str(bench.work / bench.specialist(t)), "parameters": {"weight": WEIGHT}}
                    for t in tasks
                ],
            },
            full,
        )
        scores = {}
        for name, store in stores.items():
            out = work / f"equipped-{name}"
            alnico.equip(base, {f"specialist-{task}": WEIGHT for task in tasks}, out, store=store.folder)
            print(
                f"- {name}: tensors that differ from the merge of the full fine-tunes: {differing(out, full) or 'none'}"
            )
            scores[name] = bench.score(
                {"merge_method": "passthrough", "models": [{"model": str(out)}]}, "test"
            )
        scores["full"] = bench.score(
            {"merge_method": "passthrough", "models": [{"model": str(full)}]}, "test"
        )
        for name, scored in scores.items():
            each = ", ".join(f"{t} {np.asarray(scored.scores[t].examples, float).mean():.3f}" for t in tasks)
            mean = fmean(float(np.asarray(scored.scores[t].examples, float).mean()) for t in tasks)
            print(f"- {name}: mean of eight {mean:.2%} ({each})")


if __name__ == "__main__":
    main()
