"""What a sweep file says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import patchcore.presets.sweeps
from patchcore.config_json import config_from_dict
from patchcore.configs import near_matches, require_choice
from patchcore.errors import ConfigurationError

SCRIPTS = ("run_patchcore", "run_fastflow", "run_baselines")
SUFFIX = ".yaml"
PRESETS = Path(patchcore.presets.sweeps.__file__).parent


@dataclass(frozen=True)
class Variant:
    """One command of a sweep.

    Attributes:
        script: One of SCRIPTS.
        arguments: Its steps, `dataset` last, without NAME, DATA_PATH and -d; in pieces as long as is convenient.
    """

    script: str
    arguments: tuple[str, ...]

    def __post_init__(self) -> None:
        require_choice("script", self.script, SCRIPTS)


@dataclass(frozen=True)
class ComparisonChoice:
    """Options of compare_results, which means the same by them."""

    intersect: bool = False
    published: bool = False
    image_metrics_only: bool = False
    html: bool = False


@dataclass(frozen=True)
class Sweep:
    """Variants, classes and seeds.

    Attributes:
        dataset: NAME of the data set.
        variants: Commands by name, which is that of their run folders.
        seeds: Each with every variant.
        classes: Each with every variant; every class found if there are none.
        options: What each command gets besides.
        comparison: How the runs are compared.
        name: Of the folder of the runs; that of the file.
    """

    dataset: str
    variants: dict[str, Variant]
    seeds: tuple[int, ...] = (0,)
    classes: tuple[str, ...] = ()
    options: str = ""
    comparison: ComparisonChoice = field(default_factory=ComparisonChoice)
    name: str = "sweep"

    def __post_init__(self) -> None:
        if not self.variants:
            raise ConfigurationError("the sweep has no variant: name at least one")
        for name in self.variants:
            if not isinstance(name, str) or not re.fullmatch(r"[\w.\-]+", name) or name.startswith((".", "-")):
                raise ConfigurationError(
                    f"variant {name!r}: expected letters, digits, '.', '_' and '-', as in PatchCore"
                )
        if not self.seeds:
            raise ConfigurationError("the sweep has no seed: name at least one")

    def chosen(self, only: Sequence[str]) -> dict[str, Variant]:
        """Return the variants of these names, or all if there are none."""
        for name in only:
            if name not in self.variants:
                raise ConfigurationError(
                    f"--only {name!r} is no variant of the sweep: {near_matches(name, self.variants)}"
                )
        return {name: variant for name, variant in self.variants.items() if not only or name in only}

    def command_line(
        self, name: str, data: str, out: str, classes: Sequence[str], seeds: Sequence[int], flags: Sequence[str]
    ) -> list[str]:
        """Return the arguments of a variant's script as a user would type them.

        Args:
            name: The variant.
            data: DATA_PATH.
            out: RESULTS_PATH.
            classes: Instead of the sweep's, if any.
            seeds: Instead of the sweep's, if any.
            flags: What wins over the sweep.
        """
        seeds = seeds or self.seeds
        return [
            out,
            *("--log_project", self.name, "--log_group", f"{name}_S{seeds[0]}", "--skip_existing"),
            *(word for seed in seeds for word in ("--seed", str(seed))),
            *split_words((self.options,)),
            *split_words(self.variants[name].arguments),
            *(word for category in classes or self.classes for word in ("-d", category)),
            *(self.dataset, data),
            *flags,
        ]


def split_words(lines: Sequence[str]) -> list[str]:
    """Split lines into words as a shell does."""
    try:
        return [word for line in lines for word in shlex.split(line)]
    except ValueError as error:
        raise ConfigurationError(f"{' '.join(lines)!r} cannot be read ({error}): mind the quotes") from error


def read_sweep(name_or_path: str) -> Sweep:
    """Read a sweep file, or the preset of that name.

    Raises:
        ConfigurationError: There is none, or something in it is wrong.
    """
    path = Path(name_or_path)
    if not path.is_file():
        presets = sorted(p.stem for p in PRESETS.glob(f"*{SUFFIX}"))
        if name_or_path not in presets:
            raise ConfigurationError(
                f"sweep {name_or_path!r} is neither a file nor a preset: {near_matches(name_or_path, presets)}"
            )
        path = PRESETS / f"{name_or_path}{SUFFIX}"
    return config_from_dict(Sweep, {**_content(path), "name": path.stem}, path.name)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for number, key in enumerate(keys) if key in keys[:number]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _content(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"sweep {str(path)!r} cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, Mapping):
        raise ConfigurationError(
            f"{path.name}: found {type(content).__name__}, expected the keys dataset, variants, seeds and so on"
        )
    if "name" in content:
        raise ConfigurationError(f"{path.name}: 'name' is that of the file: leave it out")
    return content
