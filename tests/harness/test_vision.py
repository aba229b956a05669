"""python -m benchmarks.vision: records of tiny runs, corruptions, and the page. Nothing here asserts a time or an accuracy."""

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import tyro
from PIL import Image

from benchmarks import images, vision, vision_page
from tests.conftest import ROOT
from utils import documents
from utils.errors import UserError

pytest.importorskip("transformers")
SIZES = {"layers": 2, "width": 16, "hidden": 32, "heads": 2, "experts": 4, "steps": 3, "batch": 8, "k": (1, 2, 4, 8)}


def write_images(folder: Path, classes: int = 3, each: int = 6) -> Path:
    """A folder of noisy pictures of several sizes, one brightness for each class."""
    draw = numpy.random.default_rng(0)
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(each):
            pixels = draw.integers(60 * label, 60 * label + 60, (9 + number, 12, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return folder


@pytest.fixture
def flags(tmp_path, monkeypatch) -> vision.VisionFlags:
    """Flags of a tiny run on a folder of images, in a working folder that has an empty page."""
    monkeypatch.chdir(tmp_path)
    vision_page.RECORDS.mkdir(parents=True)
    (vision_page.RECORDS / "page.md").write_text("# Vision\n\n<!-- vision:begin -->\n<!-- vision:end -->\n")
    return vision.VisionFlags(images=write_images(tmp_path / "pictures"), out=tmp_path / "runs" / "one", **SIZES)


def run(flags: vision.VisionFlags, name: str, **changes) -> dict:
    """The record of a run."""
    path = flags.out.parent / name
    vision.run(replace(flags, out=path, **changes))
    return documents.read(path / vision.RECORD, vision_page.Vision, "")


def test_digits(tmp_path):
    """One run from the packaged images to its record."""
    pytest.importorskip("sklearn", reason="the digits are in scikit-learn, which is not installed")
    record = run(vision.VisionFlags(out=tmp_path / "one", method="elastic", **SIZES), "digits")
    assert record["data"]["sha256"] == "8b3b6ae90863430bdef06a3f7d1ec2f6a905a53d3375655b18cf63780ad98772"
    assert (record["data"]["classes"], record["data"]["train"], record["data"]["test"]) == (10, 1198, 599)
    assert record["experts"]["num_experts"] == 4 and record["training"]["schedule"]["mode"] == "elastic"
    assert [row["k"] for row in record["rows"]] == [1, 2, 4]


def test_a_run_is_repeatable_and_kept(flags, capsys):
    """The same flags give the same numbers; k, weights and order of the images are part of them. Another run is not overwritten."""
    one, other = (run(flags, name, method="elastic", router="learned", output_scale="dense") for name in ("one", "other"))
    assert one["rows"] == other["rows"] and one["data"] == other["data"]
    assert all(
        {name: len(values) for name, values in row["corrupted"].items()} == {name: 3 for name in images.CORRUPTIONS} for row in one["rows"]
    )
    documents.write(flags.out / vision.RECORD, one | {"seconds": 7.0})
    assert run(flags, "one", method="elastic", router="learned", output_scale="dense")["seconds"] == 7.0
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="is of another run, with other seed"):
        vision.run(replace(flags, method="elastic", router="learned", output_scale="dense", seed=2))
    assert len(list(flags.out.iterdir())) == 1


def test_methods_are_trained_with_their_own_settings(flags):
    """Router, options and schedule are the method's, and a dense model with dropout has it."""
    record = run(flags, "momentum", method="momentumsmoe", options=("mu=0.5",))
    assert record["experts"]["router"] == "learned" and record["experts"]["options"] == {"mu": "0.5"}
    assert (record["training"]["schedule"]["mode"], record["training"]["schedule"]["k_max"]) == ("constant", 2)
    method, config, schedule = vision.by_name(replace(flags, method="dense_dropout"))
    data = images.Images.read(flags.images, flags.image_size)
    model = vision.build(replace(flags, method="dense_dropout"), method, config, data)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} >= {0.1} and schedule is None
    _, config, schedule = vision.by_name(replace(flags, method="smoe_dropout", router="hyper_router"))
    assert config.router == "hyper_router" and config.freeze_router is None and [schedule(0), schedule(3)] == [2, 4]


@pytest.mark.parametrize("name", images.CORRUPTIONS)
def test_corruptions_are_deterministic_and_grow(name):
    pixels_NCHW = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    distances = []
    for severity in images.CORRUPTIONS[name][1]:
        found_NCHW = images.corrupted(pixels_NCHW, name, severity, seed=5)
        assert found_NCHW.shape == pixels_NCHW.shape and found_NCHW.min() >= 0 and found_NCHW.max() <= 1
        assert torch.equal(found_NCHW, images.corrupted(pixels_NCHW, name, severity, seed=5))
        distances.append((found_NCHW - pixels_NCHW).abs().mean().item())
        drawn = name in ("noise", "occlusion")
        assert torch.equal(found_NCHW, images.corrupted(pixels_NCHW, name, severity, seed=6)) != drawn
    assert 0 < distances[0] < distances[1] < distances[2]


def test_occlusion_is_a_square_and_a_blur_keeps_the_mean():
    pixels_NCHW = torch.zeros(500, 1, 8, 8)
    covered_NCHW = images.corrupted(pixels_NCHW, "occlusion", 0.375, seed=0) == images.GREY
    assert covered_NCHW.sum((1, 2, 3)).unique().tolist() == [9] and covered_NCHW.any(0).all()
    assert covered_NCHW.any(2).sum(-1).unique().tolist() == covered_NCHW.any(3).sum(-1).unique().tolist() == [3]
    level_NCHW = torch.full((2, 3, 8, 8), 0.3)
    torch.testing.assert_close(images.corrupted(level_NCHW, "blur", 0.15, seed=0), level_NCHW)


def test_images_of_a_folder_are_read_resized_and_split(flags):
    data = images.Images.read(flags.images, 8)
    assert data.pixels_NCHW.shape == (18, 3, 8, 8) and data.name == "pictures" and data.classes == 3
    assert data.labels_N.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    means = data.pixels_NCHW.view(3, -1).mean(1)
    torch.testing.assert_close(means, torch.tensor([30.0, 90.0, 150.0]) / 255, atol=0.01, rtol=0)
    train, test = data.split(1 / 3, seed=0)
    both_NCHW = torch.cat([train.pixels_NCHW, test.pixels_NCHW])
    assert len(test.labels_N) == 6 and len(both_NCHW.flatten(1).unique(dim=0)) == 18


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "nope"}, "unknown method 'nope'"),
        ({"method": "thor"}, "has an objective or dense layers of its own"),
        ({"method": "dropblock"}, "has an objective or dense layers of its own"),
        ({"method": "dense", "output_scale": "dense"}, "has no experts: leave"),
        ({"patch_size": 3}, "--image_size 8 must be a multiple of --patch_size 3"),
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"k": (0, 2)}, "--k 0 2 must be numbers from 1 to --experts 4"),
        ({"held_out": 0.0}, "--held_out 0.0 of 18 images is 0"),
        ({"images": Path("nowhere")}, "has no images of two classes"),
    ],
)
def test_wrong_flags_are_refused(flags, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        vision.run(replace(flags, **changes))
    assert not flags.out.exists()


def test_a_file_that_is_no_image_is_named(flags):
    (flags.images / "class0" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"notes\.txt cannot be read as an image"):
        vision.run(flags)


def test_the_page_is_rendered_from_the_runs(flags, capsys):
    for seed in (1, 2):
        run(flags, f"dense-{seed}", method="dense", seed=seed)
        record = run(flags, f"elastic-{seed}", method="elastic", output_scale="dense", seed=seed)
    runs = flags.out.parent
    capsys.readouterr()
    vision_page.main([str(runs)])
    text = capsys.readouterr().out
    assert text == (runs / "page.md").read_text() and (runs / "accuracy.png").stat().st_size > 10_000
    assert "over seeds 1, 2" in text and f"trained on {record['data']['train']} images: 3 steps of 8" in text
    dense, sparse = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    records = [documents.read(runs / f"elastic-{seed}" / vision.RECORD, dict, "") for seed in (1, 2)]
    values = [row["clean"] for record in records for row in record["rows"] if row["k"] == 2]
    assert sparse[0] == "| Elastic k, times E" and sparse[2].startswith(f"{sum(values) / 2:.1f} ± ")
    assert dense[0] == "| Dense" and dense[2] == dense[4] == "–" and "±" in dense[3]
    vision_page.main([str(runs), "--collect"])
    collected = sorted(path.name for path in vision_page.RECORDS.glob("*.json"))
    assert collected == [f"pictures-{row}-seed{seed}.json" for row in ("dense", "elastic-times-e") for seed in (1, 2)]
    assert "Elastic k, times E" in (vision_page.RECORDS / "page.md").read_text() and (vision_page.FIGURES / "pictures.png").exists()
    documents.write(runs / "dense-1" / vision.RECORD, documents.read(runs / "dense-1" / vision.RECORD, dict, "") | {"seconds": 9.0})
    with pytest.raises(UserError, match="holds another run: remove it first"):
        vision_page.main([str(runs), "--collect"])
    run(flags, "longer", method="smoe", steps=4)
    with pytest.raises(UserError, match="has other training than"):
        vision_page.main([str(runs)])


def test_rows_of_the_script_are_methods_that_can_be_trained():
    script = (ROOT / "script" / "vision" / "digits.sh").read_text()
    function = re.search(r"^row_flags\(\) \{.*?^\}", script, re.MULTILINE | re.DOTALL)[0]
    names = " ".join(re.findall(r'^all\+?="(.*)"$', script, re.MULTILINE)).split()
    commands = f"{function}\nfor name in {' '.join(names)}; do row_flags $name; done"
    lines = subprocess.run(["bash", "-euc", commands], capture_output=True, text=True, check=True).stdout.splitlines()
    found = [tyro.cli(vision.VisionFlags, args=line.split()) for line in lines]
    assert len({*map(str, found)}) == len(names) == 16
    for one in found:
        method, config, _ = vision.by_name(one)
        assert (config is not None) == method.sparse
