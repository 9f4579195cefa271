"""What notebooks show of a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_runs import write_run

from patchcore.errors import ConfigurationError
from patchcore.run_views import defect_table, hardest_pictures, result_table, scored_classes, timing_table
from patchcore.storage.run_folder import write_image_scores

# path, defect type, label, score, normalised score, decision, defect pixels
ROWS = [
    ["plate/test/good/a.png", "good", 0, 1.5, 0.4, 0, 0],
    ["plate/test/good/b.png", "good", 0, 9.5, 0.9, 1, 0],
    ["plate/test/good/c.png", "good", 0, 2.5, 0.4, 0, 0],
    ["plate/test/spot/a.png", "spot", 1, 10.5, 0.9, 1, 12],
    ["plate/test/spot/b.png", "spot", 1, 0.5, 0.1, 0, 12],
    ["plate/test/dent/b.png", "dent", 1, 3.0, 0.6, 1, 12],
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_image_scores(tmp_path / "anomaly_scores" / "mpdd_plate.csv", ROWS)
    pictures = tmp_path / "segmentation_images" / "mpdd_plate"
    pictures.mkdir(parents=True)
    for path, defect_type, *_ in ROWS:
        (pictures / f"{defect_type}_{Path(str(path)).stem}.png").write_bytes(b"")
    return tmp_path


def test_the_hardest_images_are_good_ones_that_score_high_and_anomalous_ones_that_score_low(run: Path) -> None:
    assert scored_classes(run) == ["mpdd_plate"]
    assert [p.name for p in hardest_pictures(run, "mpdd_plate", 2)] == [
        "good_b.png", "good_c.png", "spot_b.png", "dent_b.png",
    ]  # fmt: skip
    assert len(hardest_pictures(run, "mpdd_plate", 100)) == len(ROWS)


def test_pictures_that_were_not_saved_are_asked_for(run: Path) -> None:
    (run / "segmentation_images/mpdd_plate/good_b.png").unlink()
    with pytest.raises(ConfigurationError, match=r"good_b.png is not there: run with --save_segmentation_images"):
        hardest_pictures(run, "mpdd_plate", 1)
    with pytest.raises(ConfigurationError, match=r"mpdd_rod.csv cannot be read .*: name the folder of a run"):
        hardest_pictures(run, "mpdd_rod", 1)


def test_a_method_without_maps_has_no_pictures_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path, "knn", method="resnet_knn", maps=False)
    assert hardest_pictures(run, "mpdd_plate", 1) == []
    assert "no pictures of mpdd_plate" in caplog.text and "no anomaly maps" in caplog.text
    with pytest.raises(ConfigurationError, match="run with --save_segmentation_images"):
        hardest_pictures(write_run(tmp_path, "PC"), "mpdd_plate", 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [("path,label\na,0\n", "is damaged"), ("path,defect_type,label,score\na,good,0,much\n", "is damaged"),
     ("path\n" + "a" * 200_000, "cannot be read")],
)  # fmt: skip
def test_damaged_scores_are_named(content: str, message: str, run: Path) -> None:
    (run / "anomaly_scores" / "mpdd_plate.csv").write_text(content)
    with pytest.raises(ConfigurationError, match=rf"mpdd_plate\.csv {message}"):
        hardest_pictures(run, "mpdd_plate", 1)


def test_tables_have_three_decimals_and_keep_names_counts_and_blank_cells(run: Path) -> None:
    header = "Row Names,defect_type,num_images,instance_auroc,full_pixel_auroc,full_pro,recall\n"
    (run / "results_by_defect.csv").write_text(header + "mpdd_1.5,2.25,14,0.98765,1.0,,0.5\n")
    assert defect_table(run).splitlines()[-1].split() == ["mpdd_1.5", "2.25", "14", "0.988", "1.000", "0.500"]
    with pytest.raises(ConfigurationError, match=r"results.csv cannot be read"):
        result_table(run)
    with pytest.raises(ConfigurationError, match=r"timings.csv cannot be read"):
        timing_table(run)
