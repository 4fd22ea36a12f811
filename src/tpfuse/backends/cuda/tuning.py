"""The thresholds that `tpfuse tune` has measured: a JSON file of the user's, by GPU model and number of ranks.

A communicator reads it once, when it is made: what it has then is its own, whatever becomes of the file. Ranks compare
what they have read, since other thresholds would be other exchanges. A file that can't be read is a warning, and the
defaults serve; one that holds more than the kernels have slots for counts as such a file.

    {"format": 2, "gpus": {"NVIDIA H200 with 132 multiprocessors": {"4": {"one_shot_kib": 128, "split_rows": 128}}}}
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from tpfuse.agreement import Board, agree
from tpfuse.backends.cuda.all_reduce import DEFAULTS, Thresholds, limits
from tpfuse.errors import InvalidArgument, RankMismatch, TpfuseError

FORMAT = 2
LEAST = Thresholds(one_shot_kib=1, split_rows=0)

Tuned = Mapping[str, Mapping[int, Thresholds]]  # by GPU model, as workspace.Place has it, and number of ranks


def tuning_file() -> Path:
    """$TPFUSE_TUNING, else tpfuse/tuning.json in $XDG_CONFIG_HOME, else in ~/.config. Raises InvalidArgument where
    there is none of them."""
    if chosen := os.environ.get("TPFUSE_TUNING"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "tpfuse" / "tuning.json"
    except RuntimeError as error:
        raise InvalidArgument(f"no home folder to keep tuned thresholds in ({error}): set TPFUSE_TUNING.") from error


def load(model: str, world: int) -> Thresholds:
    """What the user's file has for such a group, or the defaults. Warns if there is a file that can't be read."""
    try:
        tuned = read(tuning_file())
    except InvalidArgument as error:
        warnings.warn(f"tpfuse: {error} The defaults serve instead.", stacklevel=2)
        tuned = {}
    return tuned.get(model, {}).get(world, DEFAULTS[world])


def read(path: Path) -> Tuned:
    """What is in a file, nothing if there is none. Raises InvalidArgument if it is not such a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: can't be read: {error}.") from error
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, supported: {FORMAT}; format 1 had rows instead of KiB")
        return {
            model: {int(world): _checked(int(world), entry) for world, entry in worlds.items()}
            for model, worlds in document["gpus"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidArgument(
            f"{path}: not a file of `tpfuse tune` ({type(error).__name__}: {error}). Delete it and tune again."
        ) from error


def save(path: Path, model: str, world: int, thresholds: Thresholds) -> None:
    """Put an entry into a file, beside what it has. A reader sees all of it or nothing.

    Raises InvalidArgument for a file of another kind, TpfuseError where it can't be written.
    """
    tuned = {name: dict(worlds) for name, worlds in read(path).items()}
    tuned.setdefault(model, {})[world] = thresholds
    gpus = {
        name: {str(count): asdict(entry) for count, entry in sorted(worlds.items())}
        for name, worlds in sorted(tuned.items())
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tuning-", dir=path.parent) as folder:
            new = Path(folder) / path.name
            new.write_text(json.dumps({"format": FORMAT, "gpus": gpus}, indent=2) + "\n", encoding="utf-8")
            os.replace(new, path)
    except OSError as error:
        raise TpfuseError(f"{path}: can't be written: {error}. Give another one with --output.") from error


def agreed(board: Board, thresholds: Thresholds, timeout: float) -> Thresholds:
    """This rank's, if they are every rank's. Collective. Raises RankMismatch, PeerTimeout."""
    try:
        agree(board, asdict(thresholds), timeout, "cuda/thresholds")
    except RankMismatch as error:
        raise RankMismatch(
            f"{error} `tpfuse tune` keeps them in {tuning_file()}: give all ranks the same file, or none."
        ) from error
    return thresholds


def _checked(world: int, entry: Mapping[str, object]) -> Thresholds:
    if world not in DEFAULTS:
        raise ValueError(f"{world} ranks; supported: {min(DEFAULTS)} to {max(DEFAULTS)}")
    thresholds, least, most = Thresholds(**entry), asdict(LEAST), asdict(limits(world))  # type: ignore[arg-type]
    for name, value in asdict(thresholds).items():
        if type(value) is not int or not least[name] <= value <= most[name]:
            raise ValueError(f"{name}={value!r} for {world} ranks; supported: {least[name]} to {most[name]}")
    return thresholds
