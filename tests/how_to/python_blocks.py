"""Runs Python blocks of a page in one namespace: reads a JSON string a line, answers with a status and what was printed."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import traceback


def run(code: str, names: dict[str, object]) -> tuple[int, str]:
    """Run a block; as in a notebook, the value of a last expression is printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            tree = ast.parse(code)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "page", "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "page", "eval"), names)
                if value is not None:
                    print(repr(value))
        except Exception as error:
            shown = traceback.format_exception_only(error)
            print("".join(shown), end="")
            return 1, printed.getvalue()
    return 0, printed.getvalue()


if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    namespace: dict[str, object] = {"__name__": "__main__"}
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), namespace)), file=answers, flush=True)
