"""Generated command lines: values that no option can have, options that contradict each other, words that are none."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
from conftest import SMALL_METHOD, write_category
from fuzzing import HOSTILE, Cases, generated, nothing_outside, require_clear, require_refused, run
from hypothesis import given
from hypothesis import strategies as st

from patchcore import cli
from patchcore.cli.byte_size import ByteSize
from patchcore.errors import ConfigurationError, DataError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CASES = Cases(at_least=2000)

COMMANDS: dict[str, click.Command] = {
    name: command for name in dir(cli) if isinstance(command := getattr(cli, name), click.Command)
}
COMMON = ("--device", "cpu", "--threads", "1")
READING = ("--resize", "32", "--imagesize", "32", "--num_workers", "0", "-d", "plate")
BACKBONE = ("efficientnet_lite0", "--weights", "random")
LAYERS = ("blocks.1", "blocks.2")
# What a number may look like, and what cannot be one; with and without meaning for each option.
NUMBERS = (
    "-1", "0", "nan", "inf", "1e400", "1e300", "5e-324", "", "\uff11\uff12", "0x10", "1_000", str(10**30),
    str(-(10**30)), "1.5", "12abc",
)  # fmt: skip
NO_NUMBERS = {"nan", "inf", "1e400", "", "0x10", "12abc"}
STAND_IN = "the work begins"


class Begun(ConfigurationError):
    """The arguments were found right: what would come now takes long, and is tested elsewhere."""


def begin(*arguments: object, **options: object) -> NoReturn:
    raise Begun(STAND_IN)


def begin_class(*arguments: object, **options: object) -> NoReturn:
    raise DataError(STAND_IN)


@dataclass(frozen=True)
class Desk:
    """Small data, and a model of each kind.

    Attributes:
        data: A data set of the class `plate`.
        models: Model folders by method.
        out: Where commands write.
    """

    data: Path
    models: dict[str, Path]
    out: Path

    def line(self, command: str) -> dict[str, list[object]]:
        """Return a right command line, by the part of the command."""
        dataset = [*READING, "mpdd", self.data]
        stored = ["--num_workers", "0", "-d", "plate", "mpdd", self.data]
        image = self.data / "plate" / "test" / "good" / "000.png"
        lines: dict[str, dict[str, list[object]]] = {
            "run_patchcore": {
                "run_patchcore": [self.out, *COMMON], "patch_core": [*SMALL_METHOD[1:], "--anomaly_scorer_num_nn", "1"],
                "sampler": ["identity"], "dataset": dataset,
            },
            "run_fastflow": {
                "run_fastflow": [self.out, *COMMON], "dataset": dataset,
                "fastflow": ["--backbone", *BACKBONE, *(t for layer in LAYERS for t in ("--layers", layer))],
            },
            "load_and_evaluate_patchcore": {
                "load_and_evaluate_patchcore": [self.out / "evaluated", *COMMON],
                "patch_core_loader": ["-p", self.models["patchcore"]], "dataset": stored,
            },
            "load_and_evaluate_fastflow": {
                "load_and_evaluate_fastflow": [self.out / "evaluated", *COMMON],
                "fastflow_loader": ["-p", self.models["fastflow"]], "dataset": stored,
            },
            "load_and_evaluate_baselines": {
                "load_and_evaluate_baselines": [self.out / "evaluated", *COMMON],
                "baseline_loader": ["-p", self.models["autoencoder"]], "dataset": stored,
            },
            "predict": {"predict": [self.models["patchcore"], image, "--out", self.out, *COMMON]},
            "update_model": {"update_model": [self.models["patchcore"], image, "--out", self.out / "new", *COMMON]},
            "explore_dataset": {"explore_dataset": ["mpdd", self.data, "--out", self.out, "-d", "plate"]},
            "make_demo_dataset": {"make_demo_dataset": [self.out / "demo"]},
            "export_model": {"export_model": [self.models["patchcore"], "--out", self.out / "model.onnx"]},
            "run_sweep": {
                "run_sweep": ["mpdd_paper", "--data", self.data, "--out", self.out, "-d", "plate", "--dry_run"],
            },
            "serve_demo": {"serve_demo": [self.models["patchcore"], *COMMON]},
        }  # fmt: skip
        for method in ("resnet_knn", "autoencoder", "feature_autoencoder"):
            own = [] if method == "autoencoder" else ["-b", *BACKBONE, "-le", "blocks.2"]
            lines[f"run_baselines {method}"] = {
                "run_baselines": [self.out, *COMMON], method: [*own, *(["-k", "1"] if method == "resnet_knn" else [])],
                "dataset": dataset,
            }  # fmt: skip
        return lines[command]

    def run(self, command: str, added: dict[str, list[object]], left_out: tuple[str, ...] = ()) -> Any:
        """Run a right command line with something added to its parts."""
        shutil.rmtree(self.out, ignore_errors=True)
        name = command.split()[0]
        tokens: list[object] = []
        for part, own in self.line(command).items():
            if part not in left_out:
                tokens += [*([] if part == name else [part]), *own, *added.get(part, [])]
        return run(COMMANDS[name], *tokens)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("commands")
    write_category(root / "data", "plate", 4, 1)
    desk = Desk(root / "data", dict.fromkeys(("patchcore", "fastflow", "autoencoder"), Path()), root / "out")
    models = {}
    trainings = {
        "patchcore": ("run_patchcore", {"run_patchcore": ["--save_patchcore_model"]}),
        "fastflow": (
            "run_fastflow",
            {"run_fastflow": ["--save_model"], "fastflow": ["--epochs", "1", "--flow_steps", "1"]},
        ),
        "autoencoder": (
            "run_baselines autoencoder",
            {"run_baselines": ["--save_model"], "autoencoder": ["--epochs", "1"]},
        ),
    }
    for method, (command, added) in trainings.items():
        done = desk.run(command, added)
        assert done.code == 0, done.err
        models[method] = root / method
        shutil.move(desk.out / "project" / "group" / "models" / "mpdd_plate", models[method])
    return Desk(desk.data, models, desk.out)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let commands end where work would begin that takes long: epochs, a page, a thousand rendered images."""
    monkeypatch.setattr("patchcore.web._require_gradio", lambda: (None, None))
    processes = "patchcore.launching.local.LocalProcesses.run"  # in which none of this would hold
    for place in (processes, "patchcore.web.open_detector", "patchcore.datasets.demo._items"):
        monkeypatch.setattr(place, begin)
    monkeypatch.setattr("patchcore.model_export.export_model", begin)
    monkeypatch.setattr("patchcore.methods.training.Training.run", begin_class)
    yield


WITH_PARTS = (
    *(name for name in COMMANDS if name not in ("run_baselines", "compare_results", "fewshot_curve")),
    *(f"run_baselines {method}" for method in ("resnet_knn", "autoencoder", "feature_autoencoder")),
)


def numeric_options() -> Iterator[tuple[str, str, click.Option]]:
    """Yield command line, part and option of everything that takes a number, as click has it declared."""
    seen = set()
    for line in WITH_PARTS:
        command = COMMANDS[line.split()[0]]
        methods = {"resnet_knn", "autoencoder", "feature_autoencoder"} - {line.split()[-1]}
        for part in (command, *getattr(command, "commands", {}).values()):
            for option in part.params:
                is_number = isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType, ByteSize))
                key = (command.name, part.name, option.name)
                if isinstance(option, click.Option) and is_number and part.name not in methods and key not in seen:
                    seen.add(key)
                    yield line, str(part.name), option


def values_for(option: click.Option) -> list[str]:
    """Return the values that are tried: those for any number, and those beyond the range that is declared."""
    limits = [getattr(option.type, name, None) for name in ("min", "max")]
    beyond = [str(limit + step) for limit, step in zip(limits, (-1, 1), strict=True) if limit is not None]
    return [*NUMBERS, *beyond]


OPTIONS = list(numeric_options())


@pytest.mark.parametrize(("line", "part", "option"), OPTIONS, ids=[f"{p}-{o.name}" for _, p, o in OPTIONS])
def test_every_number_is_taken_or_refused_by_name(
    desk: Desk, no_work: None, line: str, part: str, option: click.Option
) -> None:
    typed = max(option.opts, key=len)
    for value in values_for(option):
        with CASES():
            done = desk.run(line, {part: [f"{typed}={value}"]})
            if done.code == 0 or STAND_IN in done.err:
                assert value not in NO_NUMBERS, (typed, value)
            else:
                assert "Traceback" not in done.err and "Error" not in done.err, (value, done.err)
                require_clear(done, (1, 2))
                named = any(name in done.err for name in (*option.opts, str(option.name)))
                assert named or done.code == 1, (value, done.err)  # 1: images that are there do not suffice for it


Added = dict[str, list[object]]

# What contradicts itself, or is without effect beside the rest: command line and what is added to its parts.
CONFLICTS: list[tuple[str, Added]] = [
    ("run_patchcore", {"run_patchcore": ["--threshold_rule", "f1"]}),
    ("run_patchcore", {"run_patchcore": ["--validation_data", "data"]}),
    ("run_patchcore", {"run_patchcore": ["--calibration", "none", "--threshold_rule", "quantile:0.9"]}),
    ("run_patchcore", {"run_patchcore": ["--calibration", "split"]}),
    ("run_patchcore", {"run_patchcore": ["--threshold_rule", "quantile"]}),
    ("run_patchcore", {"run_patchcore": ["--threshold_rule", "quantile:1"]}),
    ("run_patchcore", {"run_patchcore": ["--threshold_rule", "quantile:nan"]}),
    ("run_patchcore", {"run_patchcore": ["--threshold_rule", "mean3std:3"]}),
    ("run_patchcore", {"run_patchcore": ["--seed", "1", "--seed", "1"]}),
    ("run_patchcore", {"run_patchcore": ["--device", "cuda:9"]}),
    ("run_patchcore", {"run_patchcore": ["--device", "cuda:"]}),
    ("run_patchcore", {"run_patchcore": ["--device", "tpu"]}),
    ("run_patchcore", {"patch_core": ["--score_normalization", "minmax"]}),
    ("run_patchcore", {"patch_core": ["--embedding", "concat", "--target_embed_dimension", "512"]}),
    ("run_patchcore", {"patch_core": ["--patchscore", "mean", "--score_reweighting", "3"]}),
    ("run_patchcore", {"patch_core": ["-pa", "3"]}),
    ("run_patchcore", {"patch_core": ["-pa", "5", "-pa", "5"]}),
    ("run_patchcore", {"patch_core": ["--patchsize", "4"]}),
    ("run_patchcore", {"patch_core": ["--preprocessing", "conv"]}),
    ("run_patchcore", {"patch_core": ["--aggregation", "mlp"]}),
    ("run_patchcore", {"patch_core": ["--patchoverlap", "0.5"]}),
    ("run_patchcore", {"patch_core": ["-b", "efficientnet_lite0"]}),
    ("run_patchcore", {"patch_core": ["-b", "efficientnet_lite0", "-b", "efficientnet_lite0"]}),
    ("run_patchcore", {"patch_core": ["--weights", "random", "--weights", "random"]}),
    ("run_patchcore", {"patch_core": ["-le", "blocks.1", "-le", "blocks.1"]}),
    ("run_patchcore", {"patch_core": ["-le", "blocks.99"]}),
    ("run_patchcore", {"dataset": ["--augment"]}),
    ("run_patchcore", {"dataset": ["--imagesize", "64"]}),
    ("run_patchcore", {"dataset": ["-d", "plate", "-d", "plate"]}),
    ("run_patchcore", {"sampler": ["-p", "0"]}),
    ("run_fastflow", {"run_fastflow": ["--eval_only"]}),
    ("run_fastflow", {"run_fastflow": ["--checkpoint", "model.pth"]}),
    ("run_fastflow", {"run_fastflow": ["--log_group", "a", "--log_group", "b"]}),
    ("run_fastflow", {"dataset": ["--category", "rod"]}),
    ("run_fastflow", {"dataset": ["--dataset_name", "mvtec"]}),
    ("run_fastflow", {"dataset": ["--max_side", "512"]}),
    ("run_fastflow", {"dataset": ["--preserve_high_res", "--resize_mode", "square"]}),
    ("run_fastflow", {"dataset": ["--preserve_high_res"]}),
    ("run_fastflow", {"fastflow": ["--patch_size", "32"]}),
    ("run_fastflow", {"fastflow": ["--patch_stride", "16"]}),
    ("run_fastflow", {"fastflow": ["--low_memory"]}),
    ("run_fastflow", {"fastflow": ["--enable_patch_inference", "--patch_size", "32", "--patch_stride", "33"]}),
    ("run_fastflow", {"fastflow": ["--input_size", "64"]}),
    ("run_fastflow", {"fastflow": ["--smoothing_px", "3"]}),
    ("run_fastflow", {"fastflow": ["--patience", "3"]}),
    ("run_fastflow", {"fastflow": ["--multi_scale", "1", "--multi_scale", "1"]}),
    ("load_and_evaluate_fastflow", {"fastflow_loader": ["--flow_steps", "3"]}),
    ("load_and_evaluate_fastflow", {"fastflow_loader": ["--enable_patch_inference"]}),
    ("load_and_evaluate_fastflow", {"fastflow_loader": ["--backbone", "resnet18"]}),
    ("load_and_evaluate_fastflow", {"dataset": ["--imagesize", "64"]}),
    ("load_and_evaluate_fastflow", {"dataset": ["--train_val_split", "0.5"]}),
    ("load_and_evaluate_fastflow", {"dataset": ["--limit_train", "3"]}),
    ("load_and_evaluate_patchcore", {"dataset": ["--resize", "64"]}),
    ("load_and_evaluate_patchcore", {"dataset": ["--resize_mode", "square"]}),
    ("load_and_evaluate_patchcore", {"dataset": ["-d", "rod"]}),
    ("load_and_evaluate_patchcore", {"patch_core_loader": ["--index", "ivfpq"]}),
    ("run_baselines feature_autoencoder", {"feature_autoencoder": ["--kl_weight", "1"]}),
    ("run_baselines feature_autoencoder", {
        "feature_autoencoder": ["--latent_channels", "8", "--explained_variance", "0.9"],
    }),
    ("run_baselines feature_autoencoder", {"feature_autoencoder": ["--patience", "3"]}),
    ("run_baselines resnet_knn", {"resnet_knn": ["-le", "blocks.1"]}),
    ("predict", {"predict": ["--roi", "nowhere.png"]}),
    ("predict", {"predict": ["--resize", "64"]}),
    ("predict", {"predict": ["nowhere.png"]}),
    ("predict", {"predict": ["--heat_maps", "jpg"]}),
    ("update_model", {"update_model": ["--threshold_rule", "f1"]}),
    ("explore_dataset", {"explore_dataset": ["--imagesize", "512"]}),
    ("make_demo_dataset", {"make_demo_dataset": ["-d", "metal_plate", "-d", "metal_plate"]}),
    ("make_demo_dataset", {"make_demo_dataset": ["-d", "rod"]}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "added"), CONFLICTS, ids=[f"{i}" for i in range(len(CONFLICTS))])
def test_contradictions(desk: Desk, no_work: None, line: str, added: Added) -> None:
    with CASES():
        done = desk.run(line, added)
        require_refused(done)
        assert STAND_IN not in done.err and not (desk.out / "project").exists()


@pytest.mark.parametrize("line", WITH_PARTS)
def test_parts_that_are_missing_or_there_twice(desk: Desk, no_work: None, line: str) -> None:
    parts = list(desk.line(line))
    for part in parts[1:]:
        with CASES():
            require_refused(desk.run(line, {}, left_out=(part,)))
        with CASES():
            require_refused(desk.run(line, {parts[-1]: [part]}))
    with CASES():
        require_refused(desk.run(line, {parts[0]: ["--no_such_option"]}))
    with CASES():
        require_refused(run(COMMANDS[line.split()[0]]))


ARGUMENTS = st.sampled_from(
    [*HOSTILE, "", " ", "nul\0", "x" * 300, "/", "//", "../..", "/dev/null/a", "/proc/self/mem"]
)


@given(st.sampled_from(WITH_PARTS), st.lists(ARGUMENTS, min_size=1, max_size=3), st.integers(0, 10))
@generated(80)
def test_words_anywhere(desk: Desk, line: str, words: list[str], where: int) -> None:
    """Words that are no options and no steps, in place of arguments, between steps and at the end."""
    parts = list(desk.line(line))
    name = line.split()[0]
    tokens = list(itertools.chain.from_iterable(
        [*([] if part == name else [part]), *own] for part, own in desk.line(line).items()
    ))  # fmt: skip
    place = where % (len(tokens) + 1)
    with CASES(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchcore.methods.training.Training.run", begin_class)
        patch.setattr("patchcore.web._require_gradio", begin)
        patch.setattr("patchcore.datasets.demo._items", begin)
        patch.setattr("patchcore.model_export.export_model", begin)
        patch.chdir(desk.data.parent)
        done = run(COMMANDS[name], *tokens[:place], *words, *tokens[place:])
        require_clear(done, (0, 1, 2))
    assert parts


TEXTS = ("", "\n", "nul\0", "x" * 5000, "\udcff", "=1+1", "../../etc/passwd", "%s{0}")


def text_options() -> Iterator[tuple[str, str, click.Option]]:
    """Yield command line, part and option of everything that takes a text or one of several words."""
    seen = set()
    for line in WITH_PARTS:
        command = COMMANDS[line.split()[0]]
        methods = {"resnet_knn", "autoencoder", "feature_autoencoder"} - {line.split()[-1]}
        for part in (command, *getattr(command, "commands", {}).values()):
            for option in part.params:
                is_text = isinstance(option.type, (click.types.StringParamType, click.Choice))
                key = (command.name, part.name, option.name)
                if isinstance(option, click.Option) and is_text and part.name not in methods and key not in seen:
                    seen.add(key)
                    yield line, str(part.name), option


WORDS = list(text_options())


@pytest.mark.parametrize(("line", "part", "option"), WORDS, ids=[f"{p}-{o.name}" for _, p, o in WORDS])
def test_texts_of_every_option(
    desk: Desk, no_work: None, line: str, part: str, option: click.Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text makes a command fail otherwise than in one line, or write outside of its folder."""
    monkeypatch.chdir(desk.data.parent)
    for text in TEXTS:
        if option.name == "out":  # any name is one of a folder; no shell can pass one with a null
            text = text.replace("\0", "")
            text = str(desk.out / text.lstrip("./")) if text.strip() else text
        with CASES(), nothing_outside(desk.data.parent, desk.out):
            done = desk.run(line, {part: [f"{max(option.opts, key=len)}={text}"]})
            assert "Error" not in done.err, (text, done.err)
            require_clear(done, (0, 1, 2))


def test_so_many_cases_ran(request: pytest.FixtureRequest) -> None:
    CASES.require(request)
