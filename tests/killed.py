"""`python killed.py FOLDER KILLS`: a run in FOLDER/whole, and the same in FOLDER/parts, killed so many times.

Each life of the second is a process of its own, which ends with SIGKILL at a random moment: while it starts, trains,
logs, draws samples or saves. Forked, so that torch is imported once. Prints as JSON what each killing left behind: the
step of the newest checkpoint, and how many files or folders were half written.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401
import numpy as np
import torch
from small_runs import SMALL

from gpkernels.training import Callback, TrainConfig, Trainer, checkpoint, data

SETTINGS = {
    **SMALL,
    **{"penalty": "local", "penalty_interval": 3, "spectral_norm": True, "critic_norm": "batch", "critic_steps": 2},
    **{"steps": 70, "log_every": 2, "checkpoint_minutes": 0.0005},
}
STEP = 0.05  # seconds that a step takes, roughly: the finest of what is random about a killing


class Tell(Callback):
    """A byte through a pipe for every step."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step(self, trainer, terms):
        os.write(self.pipe, b".")


def live(out, images, pipe):
    """Forks a process that trains to the end, from the newest checkpoint where there is one. Returns its number."""
    child = os.fork()
    if child == 0:
        torch.manual_seed(time.time_ns())  # as of another process; forking seeds Python's, and nothing NumPy's
        np.random.seed(child + time.time_ns() % 2**31)
        state = checkpoint.load(out) if checkpoint.held(out) else None
        Trainer(TrainConfig(**SETTINGS), images, out, resume=state, callbacks=[Tell(pipe)]).run()
        os._exit(0)
    return child


def main(folder, kills):
    torch.set_num_threads(1)
    chance = random.Random(2)
    images = data.ImageSet("few", data.load(TrainConfig()).images[:40])
    Trainer(TrainConfig(**SETTINGS), images, folder / "none")  # what torch imports late, before it is forked
    ours, theirs = os.pipe()
    assert os.waitpid(live(folder / "whole", images, theirs), 0)[1] == 0
    left = []
    out = folder / "parts"
    while len(left) < kills:
        os.close(ours)
        os.close(theirs)
        ours, theirs = os.pipe()
        child = live(out, images, theirs)
        steps = chance.choice([0, 1, 2, 4, 6])
        if steps:
            for _ in range(steps):
                os.read(ours, 1)
            time.sleep(chance.uniform(0, STEP))
        else:
            time.sleep(chance.uniform(0, 4 * STEP))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "it ended before it was killed"
        newest = checkpoint.held(out)
        left.append([checkpoint.step_of(newest[0]) if newest else None, len(list(out.rglob("*.tmp")))])
    assert os.waitpid(live(out, images, theirs), 0)[1] == 0
    print(json.dumps(left))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
