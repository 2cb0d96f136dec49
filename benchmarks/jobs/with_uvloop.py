"""Runs another module as the main one, with uvloop, for workers that do not use it themselves.

python -m benchmarks.jobs.with_uvloop MODULE [ARGUMENT]...
"""

import asyncio
import runpy
import sys

import uvloop

if __name__ == "__main__":
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
