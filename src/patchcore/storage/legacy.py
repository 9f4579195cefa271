"""Model folders of the original PatchCore repository, as PatchCore models and ensembles of here.

Such a folder holds `patchcore_params.pkl`, a pickled dictionary of settings, and `nnscorer_search_index.faiss`, the
memory bank; an ensemble holds both for each member, with `Ensemble-<i>-<n>_` in front. The pickle is read by an
unpickler that knows no class and no function. The index is a flat one, that is, a header and float32 rows, so that it
is read without faiss, whose reader trusts what it is given.

The folder says nothing of the class, of the resize and of the weights (those of the backbone's name), and has no
thresholds. The original scores by squared distances; for one neighbour, ours are their square roots.
"""

from __future__ import annotations

import io
import logging
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchcore.config_json import config_to_dict
from patchcore.configs import BackboneConfig, EnsembleConfig, PatchCoreConfig, PreprocessingConfig, TrainingSource
from patchcore.errors import ConfigurationError
from patchcore.storage.model_folder import FORMAT_VERSION, MODEL_FILE, ModelHeader

LOGGER = logging.getLogger(__name__)

PARAMS_FILE = "patchcore_params.pkl"
INDEX_FILE = "nnscorer_search_index.faiss"
PREFIX = re.compile(rf"(?:Ensemble-(\d{{1,4}})-(\d{{1,4}})_)?{re.escape(PARAMS_FILE)}")

MAX_PICKLE_BYTES = 8192  # 30 times what the original writes; it bounds how deep containers nest in one another
PUBLISHED_PREPROCESSING = PreprocessingConfig(256, 224)  # the defaults of the original's commands

# What pickle.dump writes for dictionaries, lists, tuples, strings, numbers, booleans and None, in any protocol.
PLAIN_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET EMPTY_DICT DICT SETITEM SETITEMS "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 UNICODE BINUNICODE SHORT_BINUNICODE "
    "BINUNICODE8 INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT NEWTRUE NEWFALSE NONE"
)

FLAT_INDEX = b"IxF2"  # faiss's mark of an IndexFlatL2
FLAT_HEADER = struct.Struct("<4siqqqbiQ")  # mark, dimension, rows, two unused, trained, metric, number of values
L2_METRIC = 1


@dataclass(frozen=True)
class _Member:
    """The two files of one model.

    Attributes:
        name: `Ensemble-<i>-<n>` as our ensembles count, from 1; empty for a single model.
        params: File of settings.
        index: File of the memory bank.
    """

    name: str
    params: Path
    index: Path


def is_original_folder(folder: Path) -> bool:
    """Return whether the original repository wrote this folder."""
    if not folder.is_dir() or (folder / MODEL_FILE).exists():
        return False
    return any(PREFIX.fullmatch(path.name) for path in folder.glob(f"*{PARAMS_FILE}"))


def read_original_header(folder: Path, typed: Mapping[str, Any] | None = None) -> ModelHeader:
    """Read what a folder of the original says of its model; its class is empty.

    Args:
        folder: The model folder.
        typed: What was typed of the preprocessing, by the names of PreprocessingConfig. Without a resize it is that
            of the original's defaults, if the model's images have their size.

    Raises:
        ConfigurationError: A file is missing or damaged, a setting is none that is supported, or the resize is unknown.
    """
    members = _members(folder)
    settings = [_read_settings(member.params) for member in members]
    sides = {params["imagesize_px"] for params in settings}
    if len(sides) > 1:
        raise ConfigurationError(f"{str(folder)!r}: its members have images of {sorted(sides)} px, expected one size")
    try:
        configs = tuple(_member_config(params) for params in settings)
        if len(configs) == 1:
            method, config = "patchcore", config_to_dict(configs[0])
        else:
            # The original stores no seed of a member; the numbers tell members of one backbone apart.
            told_apart = tuple(replace(c, seed=i) if configs.count(c) > 1 else c for i, c in enumerate(configs))
            method, config = "ensemble", config_to_dict(EnsembleConfig(told_apart, "minmax"))
        preprocessing = _preprocessing(sides.pop(), typed or {})
    except ConfigurationError as error:
        raise ConfigurationError(f"{str(folder)!r}, a model of the original PatchCore: {error}") from error
    LOGGER.info(
        "%s: a model of the original PatchCore, images resized to %d px and cut to %d px, without thresholds",
        folder,
        preprocessing.resize_px,
        preprocessing.imagesize_px,
    )
    return ModelHeader(FORMAT_VERSION, method, config, preprocessing, TrainingSource())


def read_original_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the memory banks [M, D] float32 under the names that PatchCore and its ensembles give them.

    Raises:
        ConfigurationError: An index is missing, damaged, or not flat.
    """
    return {f"{m.name}/memory_bank" if m.name else "memory_bank": _read_flat_index(m.index) for m in _members(folder)}


def _members(folder: Path) -> list[_Member]:
    """Return the members of an ensemble in their order, or the one model.

    Raises:
        ConfigurationError: A member is missing, or there are files of several ensembles.
    """
    matches = {match: path for path in folder.glob(f"*{PARAMS_FILE}") if (match := PREFIX.fullmatch(path.name))}
    numbered = {int(match[1]): path for match, path in matches.items() if match[1]}
    totals = {int(match[2]) for match in matches if match[2]}
    if not numbered:
        return [_Member("", folder / PARAMS_FILE, folder / INDEX_FILE)]
    count = max(totals)
    if len(totals) > 1 or len(numbered) < len(matches) or sorted(numbered) != list(range(1, count + 1)):
        names = ", ".join(sorted(path.name for path in matches.values()))
        raise ConfigurationError(
            f"{str(folder)!r} holds {names}, expected {PARAMS_FILE} or all of Ensemble-1-{count}_ to "
            f"Ensemble-{count}-{count}_: copy the whole folder again"
        )
    return [
        _Member(f"Ensemble-{i}-{count}", path, path.with_name(path.name.replace(PARAMS_FILE, INDEX_FILE)))
        for i, path in sorted(numbered.items())
    ]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_text, value))


def _square(value: Any) -> bool:
    is_shape = isinstance(value, (list, tuple)) and len(value) == 3 and all(map(_count, value))
    return is_shape and value[0] == 3 and value[1] == value[2]


# Name in the pickle: whether a value can be used, and what is expected.
SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "backbone.name": (_text, "a name"),
    "layers_to_extract_from": (_texts, "names of layers"),
    "input_shape": (_square, "(3, S, S)"),
    "pretrain_embed_dimension": (_count, "a whole number"),
    "target_embed_dimension": (_count, "a whole number"),
    "patchsize": (_count, "a whole number"),
    "patchstride": (lambda value: _count(value) and value == 1, "1, as the original's commands write"),
    "anomaly_scorer_num_nn": (_count, "a whole number"),
}


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of one model, each of its type, and the side of its images as `imagesize_px`."""
    settings = _read_plain_pickle(path)
    if not isinstance(settings, dict) or settings.keys() != SETTINGS.keys():
        found = ", ".join(sorted(map(_shown, settings))) if isinstance(settings, dict) else type(settings).__name__
        raise ConfigurationError(f"{str(path)!r} holds {found[:200]}, expected {', '.join(SETTINGS)}")
    for name, (fits, expected) in SETTINGS.items():
        if not fits(settings[name]):
            raise ConfigurationError(f"{str(path)!r}: {name} is {_shown(settings[name])}, expected {expected}")
    return {**settings, "imagesize_px": settings["input_shape"][1]}


def _shown(value: Any) -> str:
    """Return a short text for any value; of containers the outermost alone, as they may hold themselves."""
    if isinstance(value, (list, tuple)):
        return f"({', '.join(_shown_alone(item) for item in value[:5])})"
    return _shown_alone(value)


def _shown_alone(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, (str, int, float)) else type(value).__name__


def _member_config(settings: Mapping[str, Any]) -> PatchCoreConfig:
    return PatchCoreConfig(
        BackboneConfig(settings["backbone.name"], tuple(settings["layers_to_extract_from"])),
        pretrain_embed_dimension=settings["pretrain_embed_dimension"],
        target_embed_dimension=settings["target_embed_dimension"],
        patchsize=settings["patchsize"],
        num_nn=settings["anomaly_scorer_num_nn"],
    )


def _preprocessing(imagesize_px: int, typed: Mapping[str, Any]) -> PreprocessingConfig:
    """Return resize and crop; that the typed crop is the model's, is checked with everything else that is typed."""
    resize_px = typed.get("resize_px")
    if resize_px is None:
        if imagesize_px != PUBLISHED_PREPROCESSING.imagesize_px:
            raise ConfigurationError(
                f"its images have {imagesize_px} px, but from which resize they were cut is not stored: type --resize, "
                "such as 366 of the published models for 320 px"
            )
        resize_px = PUBLISHED_PREPROCESSING.resize_px
    return PreprocessingConfig(resize_px, imagesize_px, typed.get("resize_mode") or "shorter")


class _PlainUnpickler(pickle.Unpickler):
    """Knows no class and no function, so that nothing can be called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside")


def _read_plain_pickle(path: Path) -> Any:
    """Read a small pickle of builtin containers, strings and numbers.

    The instructions are looked at before any of them is followed: those that call or look something up are refused,
    and so are positions and lengths beyond the file, for which an unpickler would reserve memory. Without a class in
    reach, nothing could be called even then.

    Raises:
        ConfigurationError: The file is missing, too large, damaged, or holds anything else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PICKLE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    try:
        if len(content) > MAX_PICKLE_BYTES:
            raise pickle.UnpicklingError(f"it has more than {MAX_PICKLE_BYTES} bytes")
        _require_plain(content)
        return _PlainUnpickler(io.BytesIO(content)).load()
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        LookupError,
        EOFError,
        AttributeError,
        OverflowError,
    ) as error:
        raise ConfigurationError(
            f"{str(path)!r} is no pickle of plain values ({' '.join(str(error).split())[:80]}), it was not opened: "
            "expected the settings that the original PatchCore stores"
        ) from error


def _require_plain(content: bytes) -> None:
    """Raise UnpicklingError or ValueError unless a pickle has instructions for plain values alone."""
    plain = frozenset(PLAIN_OPCODES.split())
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name not in plain:
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name}")
        position = argument if opcode.name == "FRAME" or opcode.name.endswith(("PUT", "GET")) else 0
        if not isinstance(position, int) or not 0 <= position <= len(content):
            raise pickle.UnpicklingError(f"its {opcode.name} points to {position}")


def _read_flat_index(path: Path) -> torch.Tensor:
    """Read the rows of a flat L2 index that faiss wrote, float32 [M, D].

    Raises:
        ConfigurationError: The file is missing, another kind of index, or not as long as it says.
    """
    try:
        with path.open("rb") as file:
            header, size = file.read(FLAT_HEADER.size), path.stat().st_size
            if header[:4] != FLAT_INDEX or len(header) < FLAT_HEADER.size:
                raise ConfigurationError(
                    f"{str(path)!r} begins with {header[:4]!r}, expected {FLAT_INDEX!r}, the flat L2 index of the "
                    "original's commands"
                )
            _, dimension, rows, _, _, _, metric, num_values = FLAT_HEADER.unpack(header)
            if not (dimension > 0 and rows > 0 and dimension * rows == num_values and metric == L2_METRIC):
                raise ConfigurationError(
                    f"{str(path)!r} is damaged: {rows} rows of {dimension} values, {num_values} values, metric {metric}"
                )
            if size != FLAT_HEADER.size + 4 * num_values:
                raise ConfigurationError(
                    f"{str(path)!r} has {size} bytes, {rows} rows of {dimension} values take "
                    f"{FLAT_HEADER.size + 4 * num_values}: it was cut off, copy it again"
                )
            values = np.fromfile(file, dtype="<f4")
    except OSError as error:
        raise ConfigurationError(f"{str(path)!r} cannot be read ({error.strerror})") from error
    return torch.from_numpy(values.reshape(rows, dimension))  # [M, D]
