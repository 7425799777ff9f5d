"""Trainings over several processes, killed at any moment, and of a dataset as large as COCO.

Run as a script it is what the processes do: `job` under torchrun, `kills` and `large` by themselves.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

import mmkit
from helpers import DIMS, equal, learnable, settings, weights
from mmkit import FalseCaptions, MultimodalFeatureFuser, PairedFeatures, PairFuser, fit
from mmkit.__main__ import main
from mmkit.losses import JointLoss
from mmkit.store import FeatureTable, Shard

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="for Linux")]
IMAGES, CAPTIONS = 113_287, 566_435  # COCO's training split

# what is trained, how, and whether with false captions; 72 captions in batches that two processes divide evenly
FUSERS = {
    "mlp": (lambda: MultimodalFeatureFuser(*DIMS, 32, dropout=0.0), {}, False),
    "mlp, false captions": (lambda: MultimodalFeatureFuser(*DIMS, 32, dropout=0.0), {"contrastive_weight": 0.5}, True),
    "mlp, two batches a step": (lambda: MultimodalFeatureFuser(*DIMS, 32, dropout=0.0), {"accumulate": 2}, False),
    "gnn": (lambda: mmkit.MultimodalGNN(*DIMS, 32, heads=4, dropout=0.0), {}, True),
    "cross-attention": (lambda: mmkit.CrossAttentionFuser(*DIMS, 32, heads=4, dropout=0.0), {}, False),
    "region-word": (lambda: mmkit.RegionWordGNN(*DIMS, 32, feature_dropout=0.0), {}, True),
    # with batches of 17, 17, 17, 17 and 4
    "dropout": (lambda: MultimodalFeatureFuser(*DIMS, 32, feature_dropout=0.3), {"batch_size": 17, "epochs": 8}, True),
}


def pairs(images: int, seed: int) -> PairedFeatures:
    """Three captions an image, of one to three tokens."""
    whole = learnable(images, seed, captions=3)
    tokens = whole.tokens()[0]
    tokens[torch.arange(3) > torch.arange(len(tokens))[:, None] % 3] = 0
    return PairedFeatures.from_arrays(whole.images(), whole.captions(), whole.image_index, whole.grids(), tokens)


def false_of(train: PairedFeatures) -> FalseCaptions:
    """A false caption of every other image, and a second one of some."""
    chosen = torch.cat([torch.arange(0, 72, 6), torch.arange(0, 72, 12)])
    texts, tokens = train.captions(chosen).flip(1), train.tokens(chosen)[0].flip(2)
    features = PairedFeatures.from_arrays(train.images(), texts, train.image_index[chosen], train.grids(), tokens)
    return FalseCaptions(features, chosen)


def trained(name: str, fuser: PairFuser | None = None, state: Path | None = None, **changes: object) -> tuple:
    """The history's rows and the weights of one of `FUSERS`, after a few epochs."""
    make, chosen, accused = FUSERS[name]
    train, validation = pairs(24, 0), pairs(10, 1)
    torch.manual_seed(0)
    fuser, chosen = fuser or make(), {"epochs": 2, "batch_size": 20, "accumulate": 1} | chosen | changes
    given = {"accumulate": chosen.pop("accumulate"), "false": false_of(train) if accused else None, "state": state}
    return fit(fuser, train, validation, settings(**chosen), **given).rows, weights(fuser)


def launched(command: list[str], processes: int = 0, **variables: str) -> subprocess.CompletedProcess:
    """A command of Python's, alone or as one job of several processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes else []), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


# --- what the processes do -------------------------------------------------------------------------


class Stopped(MultimodalFeatureFuser):
    """The process gets a signal as it begins a batch of training; the 23rd is in epoch 5, of 5 each."""

    begun, last, sign = 0, 23, signal.SIGKILL

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        self.begun += self.training
        if self.begun == self.last:
            os.kill(os.getpid(), self.sign)
        return super().nodes(images, texts)


def job(folder: Path) -> None:
    """What two processes compute alike or apart; then one of them dies. The next job of the kind takes it up."""
    process, again = PartialState(cpu=True), (folder / "first.pt").is_file()
    if again:
        results = {"resumed": trained("dropout", state=folder / "state")}
    else:
        results = {name: trained(name) for name in FUSERS}
        losses = JointLoss(MultimodalFeatureFuser(*DIMS, 32))
        torch.manual_seed(0)
        with losses.own_randomness():
            own = torch.rand(1)
        results |= {"own numbers": gather(own), "common numbers": gather(torch.rand(1))}
        results["both"] = gather(torch.cat([part.flatten().double() for part in results["dropout"][1].values()])[None])
        options, out = ["--coco-root", str(folder / "scenes")], str(folder / "cli")
        for arguments in 2 * [["train", "--epochs", "1", "--out", out]] + [["evaluate", out, "--split", "all"]]:
            assert not main([*arguments, *options])
            process.wait_for_everyone()  # the main one has saved it
    if process.is_main_process:
        torch.save(results, folder / ("second.pt" if again else "first.pt"))
    process.wait_for_everyone()
    if not again:
        torch.manual_seed(0)
        kind = MultimodalFeatureFuser if process.is_main_process else Stopped
        trained("dropout", kind(*DIMS, 32, feature_dropout=0.3), folder / "state")


def kills(folder: Path) -> None:
    """Ten kills at random moments of a training that is started again and again; then it may end."""
    chance, killed, kept, start = random.Random(5), 0, [], time.monotonic()
    trained("dropout", state=folder.with_name("undisturbed"), epochs=60)
    state, result, whole = folder / "state", folder / "result.pt", time.monotonic() - start
    while not result.is_file():
        child = os.fork()
        if not child:
            try:
                torch.save(trained("dropout", state=state, epochs=60), folder / "part")
                (folder / "part").replace(result)
            finally:
                os._exit(0)
        if killed < 10:
            time.sleep(whole * chance.uniform(0.02, 0.11))
            os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kept.append(max((path.name for path in state.glob("epoch-*")), default=""))
        if result.is_file() and killed < 10:  # it was done before
            result.unlink()
            shutil.rmtree(state)
    print(json.dumps([killed, kept]))


def large(folder: Path) -> None:
    """Some steps on features of COCO's size, and the most memory that the process ever had."""

    def table(name: str, count: int, dim: int, size: int) -> FeatureTable:
        shards = []
        for start in range(0, count, size):
            path, shape = folder / f"{name}-{start}.npy", (min(size, count - start), dim)
            np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)  # sparse: nothing is written
            shards.append(Shard(np.load(path, mmap_mode="r")))
        return FeatureTable(shards, np.arange(count) // size, np.arange(count) % size)

    tables = table("images", IMAGES, 2048, 1024), table("captions", CAPTIONS, 768, 8192)
    train, fuser = PairedFeatures(*tables, torch.arange(CAPTIONS) % IMAGES, np.arange(IMAGES)), Stopped()
    fuser.last, fuser.sign = 5, signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        fit(fuser, train, train.select(range(100)), settings(epochs=1, batch_size=256))
    print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, dict, str]:
    """The folder of the first job, what it computed and what it printed."""
    folder = tmp_path_factory.mktemp("job")
    mmkit.draw_scenes(folder / "scenes", 24)
    done = launched([__file__, "job", folder], 2, MMKIT_CACHE=str(folder / "cache"))
    assert done.returncode and (folder / "first.pt").is_file(), done.stderr
    return folder, torch.load(folder / "first.pt", weights_only=False), done.stdout


@pytest.mark.parametrize("name", [name for name in FUSERS if name != "dropout"])
def test_two_processes_end_as_one_does(both, name):
    (rows, end), (expected_rows, expected) = both[1][name], trained(name)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-6)
    for key, value in expected.items():  # but for keys' biases, to which softmax is blind: their gradient is rounding
        if not key.endswith(("in_proj_bias", "from_tokens.bias", "from_cells.bias")):
            torch.testing.assert_close(end[key], value, rtol=1e-5, atol=1e-5)


def test_both_processes_hold_the_same_weights_although_each_draws_its_own_dropout(both):
    assert torch.equal(*both[1]["both"]) and len(set(both[1]["own numbers"].tolist())) == 2
    assert both[1]["common numbers"].tolist() == [torch.rand(1, generator=torch.Generator().manual_seed(0)).item()] * 2


def test_a_job_that_lost_a_process_goes_on_and_ends_in_the_same_bits(both):
    folder, first, _ = both
    assert max(path.name for path in (folder / "state").glob("epoch-*")) == "epoch-0004"
    done = launched([__file__, "job", folder], 2)
    assert not done.returncode, done.stderr
    rows, end = torch.load(folder / "second.pt", weights_only=False)["resumed"]
    assert rows == first["dropout"][0] and len(rows) == 8 and equal(end, first["dropout"][1])


def test_two_processes_write_one_checkpoint_and_one_message_and_one_of_them_judges(both):
    folder, _, printed = both
    assert printed.count("saved as") == printed.count("validation loss") == printed.count("rsum ") == 1
    assert printed.count("is this training, finished") == 1 and not (folder / "cli.state").exists()
    assert len(mmkit.load_checkpoint(folder / "cli")[1]["history"]["rows"]) == 1


def test_a_job_says_once_what_is_wrong(tmp_path):
    done = launched(["-m", "mmkit", "check", tmp_path / "nowhere"], 2)
    (said,) = [line for line in done.stderr.splitlines() if "mmkit: " in line]
    assert done.returncode and done.stdout == "" and str(tmp_path / "nowhere") in said and "Remedy: " in said


def test_ten_kills_at_random_moments_leave_no_trace_in_the_weights(tmp_path):
    done = launched([__file__, "kills", tmp_path])
    assert not done.returncode, done.stderr
    killed, kept = json.loads(done.stdout)
    rows, end = torch.load(tmp_path / "result.pt", weights_only=False)
    expected_rows, expected = trained("dropout", epochs=60)
    assert killed == 10 and len(set(kept)) > 4
    assert rows == expected_rows and equal(end, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"state", "result.pt"}


def test_a_training_of_cocos_size_takes_less_than_two_gibibytes(tmp_path):
    done = launched([__file__, "large", tmp_path])
    assert not done.returncode, done.stderr
    assert int(done.stdout) < 2 * 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"job": job, "kills": kills, "large": large}[sys.argv[1]](Path(sys.argv[2]))
