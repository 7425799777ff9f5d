"""Trainings over several processes, killed at any moment, and of a dataset as large as COCO.

Run as a script it is what the processes do: `job` under torchrun, `kills` and `large` by themselves.
"""

import json
import os
import random
import re
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
from test_training import equal, learnable, weights
from torch import Tensor

import mmkit
from mmkit import FalseCaptions, FeatureStore, MultimodalFeatureFuser, MultimodalGNN, PairedFeatures, RegionWordGNN, fit
from mmkit.__main__ import main
from mmkit.batches import Share
from mmkit.fusers import PairFuser
from mmkit.training import validation_losses

DIMS = 24, 16
IMAGES, CAPTIONS = 113_287, 566_435  # COCO's training split
STEPS = 4

# name → fuser, settings, with false captions? 75 captions: batches of 37, 37 and 1, or 18, 18, 18, 18 and 3
MAKERS = {
    "mlp": (lambda: MultimodalFeatureFuser(*DIMS, 32, dropout=0.0), {}, False),
    "mlp, false captions": (lambda: MultimodalFeatureFuser(*DIMS, 32, dropout=0.0), {"contrastive_weight": 0.5}, True),
    "mlp, two batches a step": (lambda: MultimodalFeatureFuser(*DIMS, 32, dropout=0.0), {"accumulate": 2}, False),
    "gnn": (lambda: MultimodalGNN(*DIMS, 32, heads=4, dropout=0.0), {}, False),
    "gnn with a bank": (lambda: MultimodalGNN(*DIMS, 32, heads=4, dropout=0.0, bank=15), {}, False),
    "cross-attention": (lambda: mmkit.CrossAttentionFuser(*DIMS, 32, heads=4, dropout=0.0), {}, False),
    "region-word": (lambda: RegionWordGNN(*DIMS, 32, feature_dropout=0.0), {}, True),
    "dropout": (lambda: MultimodalFeatureFuser(*DIMS, 32, dropout=0.3, feature_dropout=0.3), {"batch_size": 18}, True),
}


def pairs(images: int, seed: int) -> PairedFeatures:
    """Three captions an image, of one to three tokens."""
    features = learnable(images, seed, captions=3)
    tokens = features.tokens()[0]
    tokens[torch.arange(3) > torch.arange(len(tokens))[:, None] % 3] = 0
    grids = features.sources["grids"]
    return PairedFeatures.from_arrays(features.images(), features.captions(), features.owner, grids, tokens)


def false_of(train: PairedFeatures) -> FalseCaptions:
    """A false caption of every other image, and a second one of some."""
    chosen = torch.cat([torch.arange(0, 75, 6), torch.arange(0, 75, 12)])
    captions = train.captions(chosen).flip(1)
    tokens = train.tokens(chosen)[0].flip(2)
    features = PairedFeatures.from_arrays(train.images(), captions, train.owner[chosen], train.sources["grids"], tokens)
    return FalseCaptions(features, chosen)


def trained(name: str, fuser: PairFuser | None = None, **changes: object) -> tuple[list[dict], dict[str, Tensor]]:
    """The history's rows and the weights of one of `MAKERS`, after a few epochs."""
    make, settings, accused = MAKERS[name]
    train, validation = pairs(25, 0), pairs(10, 1)
    torch.manual_seed(0)
    fuser = fuser or make()
    settings = {"epochs": 2, "batch_size": 37, "learning_rate": 5e-3} | settings | changes
    history = fit(fuser, train, validation, false=false_of(train) if accused else None, **settings)
    return history.rows, weights(fuser)


def run(*arguments: object, processes: int = 0, dies: bool = False, **variables: str) -> str:
    """What this file prints as a script, alone or as one job of several processes."""
    done = launched([__file__, *map(str, arguments)], processes, variables)
    assert bool(done.returncode) == dies, done.stderr
    return done.stdout


def launched(command: list[str], processes: int, variables: dict[str, str]) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes else []), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


# --- what the processes do -----------------------------------------------------------------------


class Dying(MultimodalFeatureFuser):
    """The process is killed as it begins its 23rd batch, of 5 an epoch."""

    begun = 0

    def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        self.begun += self.training
        if self.begun == 23:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().nodes(images, texts)


def job(folder: Path) -> None:
    """What two processes compute alike or apart; then one of them dies. The next job of the kind takes it up."""
    state, again = folder / "run.state", (folder / "first.pt").is_file()
    process = PartialState(cpu=True)
    if again:
        found = {"resumed": trained("dropout", epochs=8, state=state)}
    else:
        found = {name: trained(name) for name in MAKERS} | {"undisturbed": trained("dropout", epochs=8)}
        share = Share(process.process_index, process.num_processes)
        torch.manual_seed(0)
        with share.own_randomness():
            own = torch.rand(1)
        found["own numbers"], found["common numbers"] = gather(own), gather(torch.rand(1))
        flat = torch.cat([value.flatten().double() for value in found["dropout"][1].values()])
        found["both"] = gather(flat[None])
        torch.manual_seed(0)
        losses = validation_losses(MultimodalFeatureFuser(*DIMS, 32), pairs(10, 1), 12, 0, share)
        found["validation"] = gather(torch.tensor([losses]))
        options = ["--coco-root", folder / "scenes", "--epochs", "1", "--out", folder / "cli"]
        assert main(["train", *map(str, options)]) == 0
        process.wait_for_everyone()  # the main one has saved it
        assert main(["train", *map(str, options)]) == 0
        judged = [folder / "cli", "--coco-root", folder / "scenes", "--split", "all"]
        assert main(["evaluate", *map(str, judged)]) == 0
    if process.is_main_process:
        torch.save(found, folder / ("second.pt" if again else "first.pt"))
    process.wait_for_everyone()
    if not again:
        torch.manual_seed(0)
        kind = MultimodalFeatureFuser if process.is_main_process else Dying
        fuser = kind(*DIMS, 32, dropout=0.3, feature_dropout=0.3)
        trained("dropout", fuser, epochs=8, state=state)


def kills(folder: Path) -> None:
    """Ten kills at random moments of a training that is started again and again; then it may end."""
    chance, killed, kept = random.Random(5), 0, []
    state, result = folder / "run.state", folder / "result.pt"
    while not result.is_file():
        child = os.fork()
        if not child:
            try:
                found = trained("dropout", epochs=60, state=state)
                torch.save(found, folder / "part")
                (folder / "part").replace(result)
            finally:
                os._exit(0)
        if killed < 10:
            time.sleep(chance.uniform(0.02, 0.4))
            os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if result.is_file() and killed < 10:  # it was done before
            result.unlink()
            state.unlink()
        kept.append(state.is_file() and len(mmkit.states.load_state(state)[2]["history"]["rows"]))
    print(json.dumps([killed, kept]))


def large(folder: Path) -> None:
    """Some steps on a store of COCO's size, and the most memory that the process ever had."""

    class Enough(Exception):
        pass

    class Few(MultimodalFeatureFuser):
        begun = 0

        def nodes(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
            if self.begun == STEPS:
                raise Enough
            self.begun += 1
            return super().nodes(images, texts)

    store = FeatureStore(folder)
    train, validation = store.select(), store.select(range(100))
    fuser = Few()
    with pytest.raises(Enough):
        fit(fuser, train, validation, epochs=1, batch_size=256)
    assert (len(train.image_rows), len(train.owner), fuser.begun) == (IMAGES, CAPTIONS, STEPS)
    print(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


# --- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("job")
    mmkit.draw_scenes(folder / "scenes", 24)
    printed = run("job", folder, processes=2, dies=True, MMKIT_CACHE=str(folder / "cache"))
    return folder, printed


@pytest.fixture(scope="module")
def first(both) -> dict:
    return torch.load(both[0] / "first.pt", weights_only=False)


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "dropout"])
def test_two_processes_end_as_one_does(first, name):
    rows, found = first[name]
    expected_rows, expected = trained(name)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-6)
    for key, value in expected.items():
        if key.endswith(("in_proj_bias", "from_tokens.bias", "from_cells.bias")):
            continue  # holds the keys' bias, to which softmax is blind: Adam makes steps of its rounding errors
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


def test_both_processes_hold_the_same_weights_although_each_draws_its_own_dropout(first):
    one, other = first["both"]
    assert torch.equal(one, other)
    assert len(set(first["own numbers"].tolist())) == 2 and len(set(first["common numbers"].tolist())) == 1
    assert first["common numbers"][0] == torch.rand(1, generator=torch.Generator().manual_seed(0))


def test_validation_losses_are_the_same_in_both_processes_and_in_one(first):
    torch.manual_seed(0)
    expected = validation_losses(MultimodalFeatureFuser(*DIMS, 32), pairs(10, 1), 12, 0)
    one, other = first["validation"].tolist()
    assert one == other and one == pytest.approx(expected, rel=1e-5)


def test_a_job_that_lost_a_process_goes_on_and_ends_in_the_same_bits(both, first):
    history = mmkit.states.load_state(both[0] / "run.state")[2]["history"]
    assert len(history["rows"]) == 4
    run("job", both[0], processes=2)
    second = torch.load(both[0] / "second.pt", weights_only=False)
    assert second["resumed"][0] == first["undisturbed"][0] and len(second["resumed"][0]) == 8
    assert equal(second["resumed"][1], first["undisturbed"][1])


def test_two_processes_write_one_checkpoint_and_one_message_and_one_of_them_judges(both):
    folder, printed = both
    assert printed.count("saved as") == printed.count("validation loss") == printed.count("rsum ") == 1
    assert printed.count("is this training, finished") == 1
    assert not (folder / "cli.state").exists()
    assert len(mmkit.load_checkpoint(folder / "cli")[1]["history"]["rows"]) == 1


def test_a_job_says_once_what_is_wrong(tmp_path):
    done = launched(["-m", "mmkit", "check", str(tmp_path / "nowhere")], 2, {})
    said = [line for line in done.stderr.splitlines() if "mmkit: " in line]
    assert done.returncode and done.stdout == ""
    assert len(said) == 1 and str(tmp_path / "nowhere") in said[0] and "Remedy: " in said[0]


# --- shares --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("total", [0, 1, 2, 6, 7, 23])
def test_shares_make_up_the_whole_and_their_weights_its_mean(total, count):
    shares = [Share(index, count) for index in range(count)]
    items = list(range(total))
    own = [items[share.of(total)] for share in shares]
    if total < count:
        assert own == [items] * count
    else:
        assert [item for part in own for item in part] == items and all(own)
    if total:
        means = [share.weight(total) * np.mean(part) for share, part in zip(shares, own, strict=True)]
        assert np.mean(means) == pytest.approx(np.mean(items))


# --- kills ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_ten_kills_at_random_moments_leave_no_trace_in_the_weights(tmp_path):
    killed, kept = json.loads(run("kills", tmp_path))
    rows, found = torch.load(tmp_path / "result.pt", weights_only=False)
    expected_rows, expected = trained("dropout", epochs=60)
    assert killed == 10 and len(set(kept)) > 4
    assert rows == expected_rows and equal(found, expected)
    assert {path.name for path in tmp_path.iterdir()} <= {"run.state", "run.state.new", "result.pt"}


# --- size ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_a_training_of_cocos_size_takes_less_than_two_gibibytes(tmp_path):
    shapes = {"images": (IMAGES, 2048), "captions": (CAPTIONS, 768)}
    for name, shape in shapes.items():  # sparse: nothing is written
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
    np.save(tmp_path / "image_ids.npy", np.arange(IMAGES))
    np.save(tmp_path / "caption_image.npy", np.arange(CAPTIONS) % IMAGES)
    (tmp_path / "manifest.json").write_text(
        json.dumps({"sha256": dict.fromkeys(("images", "captions", "image_ids", "caption_image"), "")})
    )
    assert int(run("large", tmp_path)) < 2 * 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"job": job, "kills": kills, "large": large}[sys.argv[1]](Path(sys.argv[2]))
