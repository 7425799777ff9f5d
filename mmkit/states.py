"""The state of a training that is not finished, in one file: written whole or not at all, read back bit by bit."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import MmkitError

Tensors = dict[str, Tensor]


def save_state(path: Path, modules: dict[str, Tensors], optimizer: dict, facts: dict) -> None:
    """Write state dictionaries of modules by name, an optimizer's, and `facts` that JSON can hold.

    The file is safetensors: it can be read without running code. It replaces an earlier one in a single step, so that
    a process that is killed leaves the one or the other.
    """
    tensors = {f"{name}/{key}": value for name, state in modules.items() for key, value in state.items()}
    for index, state in optimizer["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
    metadata = {"facts": json.dumps(facts), "groups": json.dumps(optimizer["param_groups"])}
    beside = path.with_name(f"{path.name}.new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, beside, metadata)
        beside.replace(path)
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        beside.unlink(missing_ok=True)
        raise MmkitError(
            f"The state of the training cannot be written to {path} ({error}); the last one is kept. "
            "Remedy: free space on its disk, and run the same again: it goes on from there."
        ) from None


def load_state(path: Path) -> tuple[dict[str, Tensors], dict, dict]:
    """What `save_state` wrote: modules, optimizer and facts. A damaged file is an error that names it."""
    modules: dict[str, Tensors] = {}
    states: dict[int, Tensors] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            facts, groups = json.loads(metadata["facts"]), json.loads(metadata["groups"])
            for name in file.keys():  # noqa: SIM118  # no mapping
                owner, key = name.split("/", 1)
                if owner == "optimizer":
                    index, key = key.split("/", 1)
                    states.setdefault(int(index), {})[key] = file.get_tensor(name)
                else:
                    modules.setdefault(owner, {})[key] = file.get_tensor(name)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MmkitError(f"{path} holds no state of a training ({error}). Remedy: delete it to start again.") from None
    return modules, {"state": dict(sorted(states.items())), "param_groups": groups}, facts
