"""Processes that have started already and work together on what they are told, so that no start-up is timed.

Run as a script under torchrun it is what each of them does.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState

import mmkit

SECONDS = 600  # that a task may take


class Team:
    """So many processes of one torchrun, one thread each. `do` returns when all have done the task."""

    def __init__(self, processes: int, folder: Path, task: str, *arguments: object) -> None:
        self.folder, self.done = folder, 0
        folder.mkdir(parents=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launcher, __file__, str(folder), task, json.dumps([str(one) for one in arguments])]
        variables = os.environ | {"OMP_NUM_THREADS": "1"}
        self.job = subprocess.Popen(
            command, env=variables, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT, cwd=folder
        )
        self._wait("ready")

    def do(self) -> float:
        """Do the task once more; what the main process computed."""
        (self.folder / f"go-{self.done}").touch()
        self._wait(f"done-{self.done}")
        self.done += 1
        return float((self.folder / "result").read_text())

    def _wait(self, name: str) -> None:
        end = time.monotonic() + SECONDS
        while not (self.folder / name).exists():
            if self.job.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise RuntimeError(f"no {name}: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.002)

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *_: object) -> None:
        self.job.terminate()
        self.job.wait()


def training(pairs: str, batch_size: str) -> Callable[[int], float]:
    """An epoch of the MLP fuser at the sizes of the profile "coco", on features of noise in memory: its mean loss."""
    count, profile = int(pairs), mmkit.profile("coco", epochs=1, batch_size=int(batch_size))
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(count, dim, generator=generator) for dim in (2048, 768))
    train = mmkit.PairedFeatures.from_arrays(images, texts, range(count))
    validation = mmkit.PairedFeatures.from_arrays(images[:64], texts[:64], range(64))

    def task(_: int) -> float:
        fuser = mmkit.build_fuser("mlp", profile, 2048, 768)
        return mmkit.fit(fuser, train, validation, profile).rows[0]["loss"]

    return task


def extraction(scenes: str, count: str, cache: str) -> Callable[[int], float]:
    """The features of so many pictures and their captions, into a new cache: their sum."""
    dataset = mmkit.load_captions(scenes).select(range(int(count)))
    encoders = mmkit.load_encoders(device="cpu")

    def task(number: int) -> float:
        features = mmkit.extract_features(dataset, encoders, Path(cache, str(number)))
        return float(features.images().double().sum() + features.captions().double().sum())

    return task


def _work(folder: Path, task: str, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    work, number = {one.__name__: one for one in (training, extraction)}[task](*arguments), 0
    work(-1)  # warm
    state.wait_for_everyone()
    if state.is_main_process:
        (folder / "ready").touch()
    while True:
        while not (folder / f"go-{number}").exists():
            time.sleep(0.002)
        result = work(number)
        state.wait_for_everyone()
        if state.is_main_process:
            (folder / "result").write_text(repr(result))
            (folder / f"done-{number}").touch()
        number += 1


if __name__ == "__main__":
    _work(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
