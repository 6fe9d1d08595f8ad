"""Several processes of a run on this machine, and learners whose results can be compared to the last digits."""

import os
import socket

import numpy as np
import torch
from torch import nn

from gpkernels import double_backward
from gpkernels.training import Learner, TrainConfig, models
from gpkernels.training.data import ImageSet
from gpkernels.training.processes import join

TINY = {"ngf": 2, "ndf": 2, "nz": 4, "batch_size": 8, "device": "cpu", "log_every": 1, "flip": True, "shift": 1}


class Doubles(ImageSet):
    """Images in float64, so that nets of float64 take them."""

    def batch(self, *args):
        return super().batch(*args).double()


def image_set(cls=ImageSet):
    """20 images of 1x32x32 in two classes, which no batch of 8 divides."""
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 32, 32), dtype=np.uint8)
    return cls("noise", images, labels=np.arange(20) % 2, class_names=("even", "odd"))


def without_norms(net):
    """`net` with every BatchNorm gone, so that parts of a batch are computed as the whole is."""
    for name, child in net.named_children():
        setattr(net, name, nn.Identity() if isinstance(child, nn.BatchNorm2d) else without_norms(child))
    return net


class without_norms_in_generators:
    def __enter__(self):
        self.build = models.build

        def build(*args):
            generator, critic = self.build(*args)
            return without_norms(generator), critic

        models.build = build

    def __exit__(self, *error):
        models.build = self.build


def trained(steps, **settings):
    """A learner in float64 after some steps."""
    learner = Learner(TrainConfig(**{**TINY, **settings}), image_set(Doubles))
    learner.terms = [learner.train_step() for _ in range(steps)]
    return learner


def weights(learner):
    """All that a step changes of the nets and of their optimizers, but the count of batches, which nothing reads."""
    found = {
        f"{net}.{name}": value
        for net in ("generator", "critic", "ema")
        for name, value in getattr(learner, net).state_dict().items()
        if value.is_floating_point()
    }
    for net, optimizer in learner.optimizers.items():
        for number, state in optimizer.state_dict()["state"].items():
            found |= {f"{net}.{number}.{name}": value for name, value in state.items()}
    return found


def launch(function, *args, count=2):
    """function(processes, *args) in so many processes, as a launcher starts them."""
    torch.multiprocessing.spawn(_process, (count, free_port(), function, args), nprocs=count)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _process(rank, count, port, function, args):
    os.environ |= environment(rank, count, port)
    torch.set_num_threads(1)
    double_backward.mode.SMALL = 0
    with join("cpu") as processes:
        function(processes, *args)


def environment(rank, count, port, machines=1):
    """What a launcher tells a process, the processes on so many machines."""
    local = count // machines
    names = {"RANK": rank, "LOCAL_RANK": rank % local, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": local}
    return {name: str(value) for name, value in {**names, "MASTER_PORT": port}.items()} | {"MASTER_ADDR": "127.0.0.1"}
