"""Which runs are of one method: one column of the tables.

Runs are of one method if what made them agrees in all but seed, outputs and place of the data. Classes may be spread
over run folders; what agrees is then

1. the configuration of some class of one with that of some class of the other, or, where presets make the
   configuration depend on the class,
2. the method, everything but the method's configuration, and the name of the run folder without its class and seed.

Two folders that differ in the configuration of a class they share are never of one method.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from patchcore.comparison.runs import ClassRun, Run, Setting
from patchcore.errors import ConfigurationError
from patchcore.storage.files import escaped
from patchcore.storage.run_folder import differences

DEFAULT_GROUP = "group"  # of --log_group: says nothing
MAX_DIFFERENCES = 2  # in a label


@dataclass
class Method:
    """Runs that make one column.

    Attributes:
        label: Short name, unique in the comparison.
        runs: The run folders' configurations.
        classes: Per row name the finished runs of that class, by seed.
    """

    label: str
    runs: list[Run]
    classes: dict[str, list[ClassRun]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Setting]:
        """How each class was made."""
        return {row_name: setting for run in self.runs for row_name, setting in run.settings.items()}

    @property
    def limit_train(self) -> int | str | None:
        """Number of training images asked for, None for all, or NOT_KNOWN."""
        return next(iter(self.settings.values())).limit_train

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for run in self.runs for seed in run.seeds.values() if seed is not None})


def group_runs(runs: Sequence[Run]) -> list[Method]:
    """Collect runs into methods, in order of appearance, each with a unique label."""
    methods: list[Method] = []
    for run in runs:
        home = next((m for m in methods if _belongs(run, m)), None)
        if home is None:
            methods.append(Method(_group_label(run), [run]))
        else:
            home.runs.append(run)
    _make_labels_unique(methods)
    return methods


def enter_classes(methods: Sequence[Method], finished: Sequence[ClassRun]) -> None:
    """Give every method its finished classes.

    Raises:
        ConfigurationError: Two folders hold the same class, method and seed.
    """
    for method in methods:
        folders = {id(run) for run in method.runs}
        taken: dict[tuple[str, int | None], Path] = {}
        for found in finished:
            if id(found.run) not in folders:
                continue
            key = (found.row_name, found.seed)
            if key in taken:
                seed = "a seed that is not known" if found.seed is None else f"seed {found.seed}"
                raise ConfigurationError(
                    f"{str(taken[key])!r} and {str(found.run.folder)!r} are both {method.label} on {found.row_name} "
                    f"with {seed}: name one of them"
                )
            taken[key] = found.run.folder
            method.classes.setdefault(found.row_name, []).append(found)
        for class_runs in method.classes.values():
            class_runs.sort(key=lambda c: -1 if c.seed is None else c.seed)


def fewshot_family(method: Method) -> str:
    """Return what methods share that differ in --limit_train alone."""
    kept = {row_name: _key(replace(s, limit_train=None)) for row_name, s in method.settings.items()}
    return json.dumps(sorted(set(kept.values())))


def fewshot_label(method: Method) -> str:
    """Return a label without the number of training images that scripts and users put into group names.

    `_N<number>` is looked for first; a number without N is one of images only at the end of the name, as the 50 of
    WR50 is not.
    """
    limit = method.limit_train
    name, bracket, what_differs = method.label.partition(" (")
    if limit is not None:
        without = re.sub(rf"(^|_)N{limit}(?=[_ ]|$)", "", name, count=1)
        name = (without if without != name else re.sub(rf"(^|_){limit}(?= #|$)", "", name)).strip("_") or name
    named = [part for part in what_differs.removesuffix(")").split(", ") if not part.startswith("limit_train ")]
    return f"{name}{bracket}{', '.join(named)})" if any(named) else name


def _belongs(run: Run, method: Method) -> bool:
    known = method.settings
    shared = run.settings.keys() & known.keys()
    if any(_key(run.settings[name]) != _key(known[name]) for name in shared):
        return False
    configured = all(s.method_config is not None for s in [*run.settings.values(), *known.values()])
    if configured and {_key(s) for s in run.settings.values()} & {_key(s) for s in known.values()}:
        return True
    own, theirs = (next(iter(s.values())) for s in (run.settings, known))
    return (
        _key(replace(own, method_config=None)) == _key(replace(theirs, method_config=None))
        and _group_label(run) == method.label
    )


def _key(setting: Setting) -> str:
    return json.dumps(asdict(setting), sort_keys=True)


def _group_label(run: Run) -> str:
    """Return the name of a run folder without seed and class, or the method's where that says nothing."""
    name = re.sub(r"_S\d+(_\d+)?(?=_|$)", "", escaped(run.folder.resolve().name))
    if len(run.settings) == 1:
        category = next(iter(run.settings)).partition("_")[2]
        name = re.sub(rf"(^|_){re.escape(category)}(?=_|$)", "", name).strip("_")
    if not name or re.fullmatch(rf"{DEFAULT_GROUP}(_\d+)?", name):
        return next(iter(run.settings.values())).method
    return name


def _make_labels_unique(methods: Sequence[Method]) -> None:
    """Add to labels that several methods have what tells these apart."""
    counts = Counter(m.label for m in methods)
    for label in [label for label, count in counts.items() if count > 1]:
        alike = [m for m in methods if m.label == label]
        names = _telling_names(alike)
        for method in alike:
            setting = asdict(next(iter(method.settings.values())))
            if names:
                method.label = f"{label} ({', '.join(f'{_leaf(n)} {_value(setting, n)}' for n in names)})"
    taken: Counter[str] = Counter()
    for method in methods:  # what is still alike differs in too much for a label
        taken[method.label] += 1
        if taken[method.label] > 1:
            method.label = f"{method.label} #{taken[method.label]}"


def _telling_names(alike: Sequence[Method]) -> list[str]:
    """Return some of the settings in which methods differ, but none that is a whole table in one of them."""
    settings = [asdict(next(iter(m.settings.values()))) for m in alike]
    found = dict.fromkeys(name for other in settings[1:] for name, _, _ in differences(settings[0], other))
    short = [name for name in found if not any(_holds_table(_value(s, name)) for s in settings)]
    return short[:MAX_DIFFERENCES]


def _holds_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(_holds_table(v) for v in value))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _value(setting: Any, name: str) -> Any:
    for part in name.split("."):
        setting = setting.get(part) if isinstance(setting, dict) else None
    return "all" if setting is None and _leaf(name) == "limit_train" else setting
