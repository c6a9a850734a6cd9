"""Run pieces of code, each in a process of its own that has imported everything already.

Reads from stdin, a line each, [FOLDER, {NAME: CODE, ...}], runs them, several at a time, and answers with a line. Each
leaves NAME.pid, NAME.out and NAME.status (no status if it was killed) in the folder.
"""
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Dict

import timm  # noqa: F401
import torch  # noqa: F401

import timm_mobileformer.cli.publishing  # noqa: F401

AT_A_TIME = 12


def run(folder: Path, name: str, code: str) -> None:
    (folder / f'{name}.pid').write_text(str(os.getpid()))
    out = os.open(folder / f'{name}.out', os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        exec(code, {'__name__': name})
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    (folder / f'{name}.status').write_text(str(status))
    os._exit(0)


def run_all(folder: Path, jobs: Dict[str, str]) -> None:
    running = 0
    for name, code in jobs.items():
        if running == AT_A_TIME:
            os.wait()
            running -= 1
        if os.fork() == 0:
            run(folder, name, code)
        running += 1
    for _ in range(running):
        os.wait()


if __name__ == '__main__':
    for line in sys.stdin:
        where, todo = json.loads(line)
        run_all(Path(where), todo)
        print('done', flush=True)
