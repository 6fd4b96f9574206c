"""Starts the ``alnico`` command: prepares signals and streams before anything slow is imported.

It imports little, so that Ctrl-C in the first moment ends the command as quietly as later.
"""

from __future__ import annotations

import gc
import os
import sys

from alnico.cli import signals

OBJECTS_BETWEEN_COLLECTIONS = 50_000


def command() -> None:
    """Run ``main`` of :mod:`alnico.cli.main`, and end the process at once.

    Python needs 0.25 s to unload numba's compiled code, a fifth of a small merge. Nothing waits for it: when ``main`` returns,
    files are closed and threads have ended; both streams are flushed here.
    """
    try:
        code = _run()
        signals.ignore()
    except KeyboardInterrupt:  # raised once at most, so that nothing below is interrupted
        code = signals.code_of_signal()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _finalize()
    os._exit(code)


def _finalize() -> None:
    """Remove temporary folders, as Python does at its end by ``weakref.finalize``, which ``os._exit`` leaves out."""
    weakref = sys.modules.get("weakref")
    end = getattr(getattr(weakref, "finalize", None), "_exitfunc", None)
    if end is not None:
        end()


def mergekit_yaml() -> None:
    """Run ``alnico merge`` under the name of mergekit's command, with mergekit's options."""
    sys.argv[1:1] = ["merge"]
    command()


def _run() -> int:
    signals.guard()
    # Imports and plans make hundreds of thousands of objects that stay. By default Python looks through them for cycles every 700
    # objects: a sixth of the processor time of planning and merging ten thousand tensors, a twelfth of a small merge.
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    # torch's threads wait for each other several hundred times in a pass. By default they wait busily, which on a machine
    # that others use too costs 6 times the processor time of the computation (an encoder of 22 M parameters, 2 threads).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if sys.getfilesystemencoding() == "ascii":
        _again_with_names()
    from alnico.cli import streams

    streams.install()
    from alnico.cli.main import main

    signals.ready()
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, int):
            return ended.code
        if ended.code is not None:
            print(ended.code, file=sys.stderr)
        return int(ended.code is not None)
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _again_with_names() -> None:
    """Start again in Python's UTF-8 mode if the locale (C, without that mode) cannot open a file that a recipe calls `modèle`.

    The encoding of the streams stays as it was.
    """
    encoding = getattr(sys.stdout or sys.stderr, "encoding", None) or "ascii"
    environment = {"PYTHONIOENCODING": encoding, **os.environ}
    try:  # noqa: SIM105  (contextlib takes its time)
        os.execve(sys.executable, [sys.orig_argv[0], "-X", "utf8", *sys.orig_argv[1:]], environment)
    except OSError:
        pass
