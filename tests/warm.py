"""
Starts scripts of the project in processes that have torch imported already. For conftest.run.

Starting python costs the import of torch, 1.5 s of work, and the tests start scripts hundreds of
times. This process imports what the scripts import, runs nothing itself, and forks for each start.
The fork has its own command line, folder, environment, output and exit code, and runs the script as
__main__. What happens before torch is imported is tested with a real start (`fresh=True` there).

For each start, one line of JSON is read: {"script", "arguments", "cwd", "env": one for each
process, "out", "err": file names}. Two are written: the process ids, and, when all of them have
ended, their exit codes.
"""

import gc
import json
import os
import runpy
import sys

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401

# torch's optimizers and DDP import the compiler when one is made, another 1.3 s
import torch._dynamo  # noqa: F401

import pretraining_advanced  # noqa: F401
import pretraining_simple  # noqa: F401
import wt_load  # noqa: F401


def forked(request: dict, n: int) -> int:
    """
    The id of process n of this request; 0 in that process itself.

    There, everything is by then as if python had started it.
    """
    if pid := os.fork():
        return pid
    for number, name in enumerate((os.devnull, request["out"][n], request["err"][n])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND if number else os.O_RDONLY), number)
    os.environ.clear()
    os.environ.update(request["env"][n])
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = os.path.dirname(request["script"])
    return 0


def serve() -> dict | None:
    """Answers requests; in each process that is forked it returns the request."""
    for line in sys.stdin:
        request, pids = json.loads(line), []
        for n in range(len(request["env"])):
            if not (pid := forked(request, n)):
                return request
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        codes = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)
    return None


gc.freeze()  # what is there is shared by all of them: the collector need not look at it again
if started := serve():
    runpy.run_path(started["script"], run_name="__main__")
