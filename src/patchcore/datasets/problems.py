"""What will go wrong with a class later, from the facts of its files: where a run stops, and where numbers mislead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patchcore.configs import PreprocessingConfig, ResNetKNNConfig
from patchcore.datasets.exploration import TEST, TRAIN, ClassFacts, ImageFacts, Pixels, duplicates
from patchcore.datasets.images import place
from patchcore.datasets.inspection import DARK_LEVEL, GOOD, Fault

ERROR, WARNING = "error", "warning"
KNN_NEIGHBOURS = ResNetKNNConfig.num_neighbours  # each for an image that does not find itself
FEW_GOOD_TEST_IMAGES = 10
INVERTED_FRACTION = 0.9  # of an image: no defect covers so much of it, the background of an inverted mask does
UNUSUAL_CROP = 0.01  # share of the area lost beyond that of a square image
SHIFT_STDS, SHIFT_LEVELS = 3.0, 8.0  # standard deviations of training images and grey levels: a shift exceeds both


@dataclass(frozen=True)
class Problem:
    """Something that a run will stop at, or that makes its numbers mean something else.

    Attributes:
        severity: "error": a run fails on this class; "warning": it ends, but not with the numbers one thinks.
        kind: Short name, the same for every class.
        category: The class.
        found: What was found; of an error of one file, the message of the run.
        consequence: What comes of it.
        remedy: What helps.
        files: The files, in order.
    """

    severity: str
    kind: str
    category: str
    found: str
    consequence: str
    remedy: str
    files: tuple[Path, ...] = ()


def find_problems(facts: ClassFacts, preprocessing: PreprocessingConfig) -> list[Problem]:
    """Return the problems of a class, errors first.

    Args:
        facts: What is in its folders.
        preprocessing: Resize and crop of the runs that will be made.
    """
    found = [problem for find in FINDERS for problem in find(facts, preprocessing)]
    return sorted(found, key=lambda problem: problem.severity != ERROR)


def no_class(folder: Path) -> Problem:
    """Return the problem of a folder beside the classes that holds neither `train` nor `test`."""
    found = f"the folder {folder.name!r} holds neither {TRAIN} nor {TEST}"
    remedy = "mind the spelling, upper and lower case included, if it is meant to be a class"
    return Problem(WARNING, "no class", folder.name, found, "a run goes on without it", remedy, (folder,))


def _refusal(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    if facts.refusal is not None:
        consequence = "a run that includes this class does not start, and evaluates none of the others"
        yield Problem(
            ERROR,
            "incomplete class",
            facts.category,
            facts.refusal,
            consequence,
            "mend it, or name the other classes with -d",
        )


def _faults(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    kinds: dict[str, list[Fault]] = {}
    for fault in facts.faults:
        kinds.setdefault(fault.kind, []).append(fault)
    remedies = {
        "same name": "rename one of each two",
        "two masks": "remove one of each two",
        "missing mask": "add the masks, or remove the ground_truth folder to measure image scores alone",
        "mask without image": "add the images or remove the masks",
    }
    for kind, faults in kinds.items():
        files = tuple(fault.path for fault in faults)
        yield Problem(ERROR, kind, facts.category, faults[0].message, "this class fails", remedies[kind], files)


def _unusable_files(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    images = [(i.record.path, i.error) for i in facts.images if i.error is not None]
    if images:
        remedy = "replace or remove the files, masks included; an image that is only too long: --resize_mode letterbox"
        yield _of_files(ERROR, "unusable image", facts, images, "this class fails at the first of them", remedy)
    masks = [(m.path, m.error) for i in facts.images if (m := i.mask) is not None and m.error is not None]
    if masks:
        remedy = "replace the masks by ones of the size of their image"
        yield _of_files(ERROR, "unusable mask", facts, masks, "this class fails at the first of them", remedy)


def _of_files(
    severity: str, kind: str, facts: ClassFacts, found: Sequence[tuple[Path, str]], consequence: str, remedy: str
) -> Problem:
    """Return the problem of several files, described by the message of the first."""
    return Problem(severity, kind, facts.category, found[0][1], consequence, remedy, tuple(path for path, _ in found))


def _training_images(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    number = len(facts.of(TRAIN))
    if number == 1:
        consequence = "no thresholds and no decisions, no ensembles: both need two training images"
        yield _warning(facts, "one training image", "1 training image", consequence, "add images of good parts")
    if 0 < number <= KNN_NEIGHBOURS:
        yield _warning(
            facts,
            "too few for k-NN",
            f"{number} training images",
            f"resnet_knn stops: its k = {KNN_NEIGHBOURS} needs {KNN_NEIGHBOURS + 1} of them",
            "--clamp_k or a smaller -k, if resnet_knn is to be run",
        )


def _test_images(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    good, anomalous = len(facts.of(TEST, good=True)), len(facts.of(TEST, good=False))
    if not good + anomalous:
        return
    if not good or not anomalous:
        what, missing = ("good", f"test/{GOOD}") if not good else ("anomalous", "test/<defect type>")
        consequence = "image AUROC and F1 are blank: nothing to tell apart"
        yield _warning(facts, f"no {what} test images", f"no {what} test images", consequence, f"add some to {missing}")
    elif good < FEW_GOOD_TEST_IMAGES:
        consequence = f"one of them moves the image AUROC by up to {1 / good:.2f}: differences of methods are chance"
        yield _warning(
            facts, "few good test images", f"{good} good test image(s)", consequence, f"add some to test/{GOOD}"
        )


def _masks(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    anomalous = facts.of(TEST, good=False)
    if anomalous and not facts.has_truth:
        consequence = "pixel AUROC and PRO are blank"
        yield _warning(
            facts, "no masks", "no ground_truth folder", consequence, "add masks, if maps are to be measured"
        )
    usable = [i for i in anomalous if i.mask is not None and i.mask.error is None]
    yield from _of_images(
        facts,
        "empty mask",
        [i for i in usable if i.mask and i.mask.defect_px == 0],
        "{n} mask(s) of anomalous images mark nothing",
        "every pixel of these images counts as normal, and PRO leaves them out",
        "mark the defects, or move the images to " + f"test/{GOOD}",
    )
    yield from _of_images(
        facts,
        "mask not binary",
        [i for i in usable if i.mask and i.mask.num_values > 1],
        "{n} mask(s) have more than one value beside 0",
        "every value but 0 counts as defect (JPEG, WebP: every value above half of the brightest), soft edges included",
        "store masks as PNG with 0 and 255 alone, if these values meant anything else",
    )
    yield from _of_images(
        facts,
        "mask nearly full",
        [i for i in usable if i.mask and i.mask.defect_fraction > INVERTED_FRACTION],
        f"{{n}} mask(s) mark more than {INVERTED_FRACTION:.0%} of their image",
        "good pixels count as defect if the masks are inverted",
        "look at the contact sheet, and invert the masks if need be",
    )
    if facts.good_with_defect:
        found = f"{len(facts.good_with_defect)} mask(s) of good images mark a defect"
        consequence = "a run does not read them: the images count as good"
        remedy = "move the images to their defect type, or remove the masks"
        yield _warning(facts, "mask of a good image", found, consequence, remedy, facts.good_with_defect)


def _crop(facts: ClassFacts, preprocessing: PreprocessingConfig) -> Iterator[Problem]:
    mode = preprocessing.resize_mode
    losses = [(i, i.mask.crops[mode]) for i in facts.images if i.mask is not None and mode in i.mask.crops]
    emptied = [i for i, loss in losses if loss.is_emptied]
    remedy = "see the crop table for the resize modes; --imagesize equal to --resize crops nothing of a square image"
    yield from _of_images(
        facts,
        "defect cropped away",
        emptied,
        "resize and crop leave nothing of the defect in {n} anomalous image(s)",
        "they count as anomalous and show nothing of it: image AUROC falls, and PRO leaves them out",
        remedy,
    )
    partly = [(i, loss) for i, loss in losses if loss.num_regions and not loss.is_emptied]
    if partly:
        found = (
            f"resize and crop empty {sum(loss.num_regions for _, loss in partly)} region(s) of masks that keep others"
        )
        files = [i.record.path for i, _ in partly]
        yield _warning(facts, "regions cropped away", found, "PRO leaves them out", remedy, files)
    square = (preprocessing.resize_px, preprocessing.resize_px)
    allowed = place(*square, preprocessing).lost_fraction + UNUSUAL_CROP
    readable = [(i, p) for i in facts.images if (p := i.pixels) is not None]
    yield from _of_images(
        facts,
        "crop of long images",
        [i for i, p in readable if place(p.height, p.width, preprocessing).lost_fraction > allowed],
        "the centre crop loses more of {n} image(s) than of a square one",
        "what lies at their ends is never looked at",
        "--resize_mode letterbox keeps long images whole",
    )
    yield from _of_images(
        facts,
        "small images",
        [i for i, p in readable if 2 * min(p.height, p.width) < preprocessing.resize_px],
        f"{{n}} image(s) have less than half of --resize {preprocessing.resize_px} px along the shorter side",
        "they are enlarged: blurred, at the cost of large ones",
        "a smaller --resize and --imagesize",
    )


def _pictures(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    readable = [(i, p) for i in facts.images if (p := i.pixels) is not None]
    yield from _minority(
        facts,
        "mixed sizes",
        readable,
        lambda p: f"{p.width} x {p.height} px",
        "after the resize, sharpness and scale of the part differ: a size that is rare in training looks anomalous",
        "bring all images to one size and scale",
    )
    yield from _minority(
        facts,
        "mixed modes",
        readable,
        lambda p: p.form.mode,
        "gray beside colour, or colours lost to a palette, look anomalous where training has few of them",
        "store all images alike",
    )
    yield from _of_images(
        facts,
        "dark image",
        [i for i, p in readable if p.darkest < p.brightest < DARK_LEVEL],
        f"{{n}} image(s) read as nearly black (brightest pixel below {DARK_LEVEL} of 255)",
        "little is left to see, as where a camera gives 12 bits and the file holds 16",
        "scale the values to the full range of the file",
    )
    yield from _of_images(
        facts,
        "image of one colour",
        [i for i, p in readable if p.darkest == p.brightest],
        "{n} image(s) have the same value everywhere",
        "they show no part: in training they are learnt as normal",
        "remove them",
    )
    yield from _of_images(
        facts,
        "transparent image",
        [i for i, p in readable if p.form.is_transparent],
        "{n} image(s) have transparent pixels",
        "transparency is dropped: the colours stored beneath it are what a method sees",
        "store the images without it",
    )


def _minority(
    facts: ClassFacts,
    kind: str,
    readable: Sequence[tuple[ImageFacts, Pixels]],
    key: Callable[[Pixels], str],
    consequence: str,
    remedy: str,
) -> Iterator[Problem]:
    """Yield a warning of the images that differ in a property from the most frequent value."""
    counts = Counter(key(p) for _, p in readable).most_common()
    if len(counts) > 1:
        shown = ", ".join(f"{value} ({number})" for value, number in counts[:4]) + (", ..." if counts[4:] else "")
        files = [i.record.path for i, p in readable if key(p) != counts[0][0]]
        yield _warning(facts, kind, f"{len(counts)} different: {shown}", consequence, remedy, files)


def _copies(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    groups = duplicates(facts.images)
    leaked = [[i for i in g if i.split == TEST] for g in groups if {i.split for i in g} == {TRAIN, TEST}]
    good = [i for g in leaked for i in g if not i.record.is_anomalous]
    yield from _of_images(
        facts,
        "test image in training",
        good,
        "{n} good test image(s) are also training images",
        "they are recognised, not judged: too few false alarms, image AUROC too high",
        "remove them from one of the splits",
    )
    yield from _of_images(
        facts,
        "defect in training",
        [i for g in leaked for i in g if i.record.is_anomalous],
        "{n} anomalous test image(s) are also training images",
        "their defects are learnt as normal and not found",
        "remove them from training",
    )
    within = [[i for i in g if i.split == TEST] for g in groups]
    twice = [g for g in within if len(g) > 1]
    num_types = [len({i.record.defect_type for i in g}) for g in twice]
    yield from _of_images(
        facts,
        "one image, two types",
        [i for g, number in zip(twice, num_types, strict=True) if number > 1 for i in g],
        "{n} test images are in folders of different types with the same content",
        "one of the labels is wrong, and no method can be right about both",
        "keep each image in one folder",
    )
    yield from _of_images(
        facts,
        "repeated test image",
        [i for g, number in zip(twice, num_types, strict=True) if number == 1 for i in g[1:]],
        "{n} test image(s) repeat another one",
        "they count twice in every metric",
        "remove the copies",
    )
    repeated = [i for g in groups for i in [i for i in g if i.split == TRAIN][1:]]
    yield from _of_images(
        facts,
        "repeated training image",
        repeated,
        "{n} training image(s) repeat another one",
        "calibration scores a copy by a model that knows the image: thresholds too low, more false alarms",
        "remove the copies",
    )


def _shift(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    """Compare the mean colours of good images of both splits."""
    train, test = (
        np.array([i.pixels.mean_rgb for i in facts.of(split, good=True) if i.pixels is not None])
        for split in (TRAIN, TEST)
    )
    if len(train) < 2 or not len(test):
        return
    shifts = test.mean(axis=0) - train.mean(axis=0)  # [3]
    allowed = np.maximum(SHIFT_STDS * train.std(axis=0, ddof=1), SHIFT_LEVELS)
    if (np.abs(shifts) > allowed).any():
        shown = ", ".join(f"{name} {shift:+.0f}" for name, shift in zip(("red", "green", "blue"), shifts, strict=True))
        yield _warning(
            facts,
            "shift between splits",
            f"good test images differ from training images in their mean colour ({shown} of 255)",
            "what a method finds may be the light or the camera, and good test images may score as anomalous",
            "take both splits from the same recording, or add training images like the test images",
        )


def _unread(facts: ClassFacts, _: PreprocessingConfig) -> Iterator[Problem]:
    reasons: dict[str, list[Path]] = {}
    for path, reason in facts.passed_over:
        reasons.setdefault(reason, []).append(path)
    for reason, paths in reasons.items():
        found = f"{len(paths)} file(s) or folder(s) passed over: {reason}"
        yield _warning(facts, "not read", found, "a run goes on without them", "move or remove them", paths)


def _of_images(
    facts: ClassFacts, kind: str, images: Sequence[ImageFacts], found: str, consequence: str, remedy: str
) -> Iterator[Problem]:
    """Yield a warning of some images, if there are any; "{n}" in `found` stands for their number."""
    if images:
        files = [i.record.path for i in images]
        yield _warning(facts, kind, found.format(n=len(images)), consequence, remedy, files)


def _warning(
    facts: ClassFacts, kind: str, found: str, consequence: str, remedy: str, files: Sequence[Path] = ()
) -> Problem:
    return Problem(WARNING, kind, facts.category, found, consequence, remedy, tuple(files))


FINDERS: tuple[Callable[[ClassFacts, PreprocessingConfig], Iterator[Problem]], ...] = (
    _refusal,
    _faults,
    _unusable_files,
    _training_images,
    _test_images,
    _masks,
    _copies,
    _crop,
    _pictures,
    _shift,
    _unread,
)
