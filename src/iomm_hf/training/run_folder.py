"""The folder of a run: held by one run at a time, opened where it stopped, with a record of what it ran on."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout

from ..data.sources import SourceConfig, hub_commits
from ..files import TEMPORARY, write_json, write_whole
from .checkpoints import list_checkpoints, remove_leftovers
from .config import TrainingConfig, changed_settings


logger = logging.getLogger(__name__)


@contextmanager
def hold_folder(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    r"""
    Inside, no other run may enter the folder, which is made where there is none, and every rank sees the same one. The lock
    goes with the process that holds it, however that ends. Every rank must enter.

    Args:
        folder (`Path`): A run's `output_dir`.
        accelerator (`Accelerator`): Its ranks.

    Raises:
        `RuntimeError`: another run is at work in it, or ranks on other machines see another folder.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from accelerate import Accelerator
    >>> from iomm_hf.training.run_folder import hold_folder
    >>> with hold_folder(Path(tempfile.mkdtemp()), Accelerator(cpu=True)):
    ...     print("mine")
    mine
    ```
    """
    lock = FileLock(folder / ".lock")
    token, problem = f"{TEMPORARY}{uuid4().hex}", None
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
            (folder / token).touch()
        except Timeout:
            problem = (
                f"Another run is at work in {folder.resolve()}. Wait for it or stop it (a killed launcher can leave its"
                " processes behind: look for them), or choose another output_dir."
            )
    try:
        token, problem = broadcast_object_list([token, problem])
        if problem is not None:
            raise RuntimeError(problem)
        blind = [rank for rank, sees in enumerate(gather_object([(folder / token).exists()])) if not sees]
        if accelerator.is_main_process:
            (folder / token).unlink()
        if blind:
            raise RuntimeError(
                f"output_dir must be shared by all machines: what the first rank wrote in {folder}, ranks {blind} do not see"
                " there. Give the whole path of a folder that every machine mounts."
            )
        yield
    finally:
        lock.release()


def open_run(config: TrainingConfig, output_dir: Path, accelerator: Accelerator) -> Path | None:
    """Tidies the run's folder; returns the checkpoint to resume from, which the first rank finds for all.

    Raises:
        `ValueError`: the folder holds a run with other settings, one that may not be resumed, or a finished one without checkpoints.
    """
    name: str | None = None
    if accelerator.is_main_process:
        remove_leftovers(output_dir)
        name = max((path.name for path in list_checkpoints(output_dir)), default=None)
    [name, finished] = broadcast_object_list([name, (output_dir / "final").exists()])
    if name is None and finished:
        raise ValueError(f"{output_dir} holds a finished run without its checkpoints; choose another output_dir.")
    if name is None:
        return None
    newest = output_dir / name
    if not config.resume:
        raise ValueError(f"{output_dir} holds {newest.name}; resume it (--resume true) or choose another output_dir.")
    saved = json.loads((newest / "state" / "trainer.json").read_text())["config"]
    changes = changed_settings(saved, json.loads(json.dumps(config.to_dict())))
    if changes:
        raise ValueError(
            f"{newest} was written with other settings, so it cannot be resumed exactly:\n  "
            + "\n  ".join(changes)
            + f"\nUse the same settings, or {config.start_anew(newest)}."
        )
    return newest


def data_commits(sources: list[SourceConfig], record: Path | None, accelerator: Accelerator) -> dict[str, str]:
    """The commits at which the run reads data on the Hub: those that its record names, otherwise where it stands now."""
    commits: dict[str, str] | None = None
    if accelerator.is_main_process:
        if record is not None and record.exists():
            commits = json.loads(record.read_text()).get("data")
        if commits is None:
            commits = hub_commits(sources)
    [commits] = broadcast_object_list([commits])
    return commits


def note_start(
    record: Path,
    config: TrainingConfig,
    frozen: dict[str, str | None],
    data: dict[str, str],
    now: dict[str, Any],
    base_hash: str | None,
):
    """Writes the run's record: settings, software, what frozen parts and data on the Hub stood for, and of a LoRA its base."""
    start = {**now, "config": config.to_dict(), "frozen": frozen, "data": data, "resumed": []}
    write_json(record, start if base_hash is None else start | {"base_hash": base_hash})


def note_resumption(
    record: Path, step: int, config: TrainingConfig, before: dict[str, Any] | None, now: dict[str, Any]
):
    """Adds a part to the run's record, whose settings are those in force from here on, and warns if it does not run on what
    wrote the checkpoint."""
    content = json.loads(record.read_text()) if record.exists() else {}
    settings, earlier = json.loads(json.dumps(config.to_dict())), content.get("config", {})
    settings_before = {name: earlier.get(name) for name in settings if earlier.get(name) != settings[name]}
    content.setdefault("resumed", []).append({"step": step, "settings_before": settings_before, **now})
    write_json(record, content | {"config": settings})
    if before is None:  # an earlier version kept no account of it
        return
    old, new = (
        {**part["versions"], "commit": part["commit"], "modified": part.get("modified", False)}
        for part in (before, now)
    )
    changes = [f"{name} {old.get(name)} -> {new.get(name)}" for name in old | new if old.get(name) != new.get(name)]
    if changes:
        logger.warning(
            "Resuming on other software than wrote the checkpoint: %s. The run may not end bit for bit where an unbroken"
            " one ends.",
            ", ".join(changes),
        )


def keep_log_until(path: Path, step: int):
    """Drops the log's lines behind `step`, which a resumed run writes again, and a last line that a full disk cut short."""
    if not path.exists():
        return
    lines, kept = path.read_text().splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number < len(lines):
                raise
            break
        if row["step"] <= step:
            kept.append(line)
    write_whole(path, "".join(line + "\n" for line in kept).encode())


def logged_losses(path: Path) -> list[float]:
    """Of the log's rows so far, on every rank."""
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [row["loss"] for row in rows if "loss" in row]
