"""How a training goes on from its checkpoint, or starts from the network of another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dnl
from checkpoint import RUN_FIELDS, read_checkpoint, read_if_readable, read_last
from files import list_names
from run import Run, write_log
from runtime import InputError, import_factory, print_line, quote

SCHEDULE = {"epochs", "lr", "power"}  # a training can go on with others


def restore(run: Run) -> None:
    """Go on from the run's checkpoint; without one start from --init, if given. Or InputError."""
    found = find_checkpoint(run)
    if found is None:
        run.settings_log = [{"settings": run.settings, "step": 0}]
        if run.args.init is not None:
            init_network(run)
        return
    path, state = found
    changed = changed_settings(state["settings"], run.settings)
    text = "; ".join(f"{name} {was} -> {now}" for name, (was, now) in changed.items())
    if not changed.keys() <= SCHEDULE:
        raise InputError(
            f"{quote(path)}: its settings differ ({text}): give the flags of that run to go on, or "
            f"--init {quote(path)} and another --out to start from its network"
        )
    if changed and state["step"] >= run.total:
        raise InputError(
            f"{quote(path)}: has trained {state['step'] // run.per_epoch} epochs, and --epochs is "
            f"{run.args.epochs}: give more"
        )
    try:
        load_state(run, state)
    except Exception as e:  # a field of another kind can fail in any of these
        what = f"{type(e).__name__} {e}".replace("\n", " ")
        raise InputError(f"{quote(path)}: cannot go on from it ({what}): train again") from None
    if changed:
        run.settings_log.append({"settings": run.settings, "step": run.step})
    if run.rank == 0:
        print_line(f"resumed {quote(path)} at step {run.step} of {run.total}")
        if changed:
            schedule = f"the schedule from step {run.step} on is that of {run.args.epochs} epochs"
            print_line(f"{text}: {schedule}")
        tidy_folder(run)


def tidy_folder(run: Run) -> None:
    """Find the best mIoU so far in best.pt, and write log.jsonl as the checkpoint has it."""
    best = read_if_readable(run.args.out / "best.pt")  # it may be of another run
    settings: Any = best.get("settings")
    whole = isinstance(settings, dict) and isinstance(best.get("best"), float)
    if whole and changed_settings(settings, run.settings).keys() <= SCHEDULE:
        run.best = best["best"]
    try:
        write_log(run)
    except OSError as e:
        print_line(f"warning: log.jsonl not written ({e})", error=True)


def find_checkpoint(run: Run) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of the run's folder; if there is none, the file of --resume.

    Of the folder's own files --resume can name last.pt alone: an older one would replace it.
    """
    out, resume = run.args.out, run.args.resume
    path = Path(resume).resolve()
    own = resume != "auto" and path.parent == out.resolve()
    if own and path.name != "last.pt":
        raise InputError(
            f"--resume {quote(resume)}: is in --out, whose last.pt it would replace: give another "
            "--out, or leave --resume out to go on from last.pt"
        )
    found = read_last(out)
    if resume == "auto":
        return found
    if found is None:
        return Path(resume), read_checkpoint(resume, RUN_FIELDS)
    if not own and not changed_settings(found[1]["settings"], run.settings).keys() <= SCHEDULE:
        raise InputError(
            f"--out {quote(out)}: holds a run of other settings, which this one would replace: "
            "choose another"
        )
    return found


def changed_settings(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (value before, value now) of the settings that are not the same."""
    pairs = {name: (was.get(name), now.get(name)) for name in sorted({*was, *now})}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def load_state(run: Run, state: dict[str, Any]) -> None:
    """Put a checkpoint's fields into the run. Any exception means that they do not fit."""
    if state["step"] not in range(run.total + 1):
        raise ValueError(f"step {state['step']}")
    dnl.load_strict(run.net, state["model"], "model")
    if run.ema is not None:
        dnl.load_strict(run.ema, state["ema"], "ema")
    optimizer = run.optimizer.state_dict() | {"state": state["optimizer"]["state"]}
    run.optimizer.load_state_dict(optimizer)
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.history = state["step"], state["history"]
    first = {"settings": state["settings"], "step": 0}
    run.settings_log = list(state.get("settings_log", [first]))
    for line in (*run.history, *run.settings_log):
        if type(line["step"]) is not int:
            raise TypeError("a line of the log")
    if run.rank == 0:
        run.sums += state["sums"]


# ---- a start from another network


@torch.no_grad()
def init_network(run: Run) -> None:
    """Fill the network from the checkpoint of --init, by name and shape; the rest stays as drawn.

    Of the classifiers, the rows of classes that both have are taken.
    """
    path = run.args.init
    checkpoint = read_checkpoint(path)
    old, names = checkpoint["model"], checkpoint["classes"]
    rows = [(i, names.index(c)) for i, c in enumerate(run.data.classes) if c in names]
    classifiers = classifier_names(run)
    own = run.net.state_dict()
    anew = []
    for name, tensor in own.items():
        source = old.get(name)
        if source is None or source.shape[1:] != tensor.shape[1:] or source.dim() != tensor.dim():
            anew.append(name)
        elif name in classifiers and len(source) == len(names):
            for i, j in rows:
                tensor[i] = source[j]
        elif source.shape == tensor.shape:
            tensor.copy_(source)
        else:
            anew.append(name)
    if len(anew) == len(own):
        raise InputError(f"--init {quote(path)}: nothing of it fits this network: give its flags")
    if run.ema is not None:
        run.ema.load_state_dict(own)
    if run.rank == 0:
        print_line(init_line(run, checkpoint, anew))


def init_line(run: Run, checkpoint: dict[str, Any], anew: list[str]) -> str:
    """What of the network comes from --init, and what does not."""
    count = len(run.net.state_dict())
    line = f"started from {quote(run.args.init)}: {count - len(anew)} of {count} tensors"
    others = [c for c in run.data.classes if c not in checkpoint["classes"]]
    for what, missing in (("not in it", anew), ("new classes", others)):
        if missing:
            line += f"; {what}, so drawn anew: {list_names(missing)}"
    for name in ("backbone", "channels"):
        theirs, ours = checkpoint["config"][name], getattr(run.net.config, name)
        if theirs != ours:
            line += f"; it has --{name} {theirs}, this run {ours}"
    return line


def classifier_names(run: Run) -> set[str]:
    """The tensors that have a row for each class, told from a network of one class more."""
    config = run.net.config
    factory = import_factory(config.context)
    shapes = []
    with torch.device("meta"):
        for n in (config.num_classes, config.num_classes + 1):
            net = dnl.build(replace(config, num_classes=n), factory)
            shapes.append({name: t.shape for name, t in net.state_dict().items()})
    n = config.num_classes
    return {
        name
        for name, shape in shapes[0].items()
        if shape[:1] == (n,) and shapes[1][name] == (n + 1, *shape[1:])
    }
