"""Pictures for the optimizer laboratory: how folders are read, what cannot be, and the small vision transformer."""

import gzip
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nestling import optim
from nestling.bench import pictures
from nestling.bench.optimizers import problems, vision
from nestling.bench.vit import OUTER, VisionTransformer, patch_of
from nestling.config import SettingError


def paint(path, color, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def folders(root, count=6, colors=((200, 10, 10), (10, 10, 200))):
    for name, color in zip(("red", "blue"), colors, strict=True):
        for n in range(count):
            paint(root / name / f"{n}.png", color)
    return root


def test_digits_are_those_of_scikit_learn():
    found = pictures.digits()
    assert found.images.shape == (1797, 1, 8, 8)
    assert found.classes == tuple("0123456789")
    split = found.split(3)
    assert len(split.train) == 1438
    assert len(split.test) == 359
    assert abs(float(split.train.mean())) < 1e-5
    assert float(split.train.std()) == pytest.approx(1, abs=1e-5)
    both = torch.cat([split.train, split.test]).flatten(1)
    assert both.unique(dim=0).shape == found.images.flatten(1).unique(dim=0).shape  # every picture is in one of them
    counted = torch.cat([split.train_labels, split.test_labels]).bincount()
    assert torch.equal(counted, found.labels.bincount())
    assert not torch.equal(found.split(4).test_labels, split.test_labels)
    assert torch.equal(found.split(3).test, split.test)


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SettingError, match=r"pip install 'nestling\[bench\]'"):
        pictures.digits()


def test_a_folder_of_images_for_every_class(tmp_path):
    found = pictures.read(folders(tmp_path), pixels=8)
    assert found.images.shape == (12, 3, 8, 8)
    assert found.classes == ("blue", "red")
    assert found.labels.tolist() == [0] * 6 + [1] * 6
    assert found.images[0, :, 3, 3].tolist() == [10, 10, 200]
    assert found.test is None
    split = found.split(0)
    assert (len(split.train), len(split.test)) == (10, 2)


def test_gray_pictures_have_one_channel_and_a_split_of_their_own_is_kept(tmp_path):
    gray = ((50, 50, 50), (90, 90, 90))
    folders(tmp_path / "train", 6, gray)
    folders(tmp_path / "val", 2, gray)
    found = pictures.read(tmp_path, pixels=4)
    assert found.images.shape == (16, 1, 4, 4)
    assert found.test == 12
    for seed in (0, 1):
        assert found.split(seed).test_labels.tolist() == [0, 0, 1, 1]


def idx(path, values):
    head = bytes((0, 0, 8, values.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in values.shape)
    data = head + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("end", ["", ".gz"])
def test_mnist_like_files(tmp_path, end):
    values = np.arange(12 * 6 * 6).reshape(12, 6, 6) % 256
    idx(tmp_path / f"train-images-idx3-ubyte{end}", values[:9])
    idx(tmp_path / f"train-labels-idx1-ubyte{end}", np.arange(9) % 3)
    idx(tmp_path / f"t10k-images-idx3-ubyte{end}", values[9:])
    idx(tmp_path / f"t10k-labels-idx1-ubyte{end}", np.arange(3))
    found = pictures.read(tmp_path)
    assert found.images.shape == (12, 1, 8, 8)  # zeros all round
    assert found.images[11, 0, 1:7, 1:7].tolist() == values[11].tolist()
    assert int(found.images[:, :, 0].sum()) == int(found.images[..., 7].sum()) == 0
    assert found.test == 9
    assert found.labels.tolist() == [*(n % 3 for n in range(9)), 0, 1, 2]


def broken_image(root):
    (folders(root) / "red" / "0.png").write_bytes(b"no image")


def one_class(root):
    paint(root / "red" / "0.png", (1, 2, 3))


def few(root):
    folders(root, 2)


def other_classes(root):
    folders(root / "train")
    folders(root / "test")
    paint(root / "test" / "green" / "0.png", (0, 255, 0))


def no_labels(root):
    idx(root / "train-images-idx3-ubyte", np.zeros((3, 4, 4)))


def short(root):
    idx(root / "train-labels-idx1-ubyte", np.zeros(3))
    idx(root / "train-images-idx3-ubyte", np.zeros((3, 4, 4)))
    whole = (root / "train-images-idx3-ubyte").read_bytes()
    (root / "train-images-idx3-ubyte").write_bytes(whole[:-1])


def unequal(root):
    idx(root / "train-labels-idx1-ubyte", np.zeros(4))
    idx(root / "train-images-idx3-ubyte", np.zeros((3, 4, 4)))


def oblong(root):
    idx(root / "train-labels-idx1-ubyte", np.zeros(3))
    idx(root / "train-images-idx3-ubyte", np.zeros((3, 4, 6)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (broken_image, r"red/0\.png cannot be read as an image"),
        (one_class, "has 1 folders with images.*at least two"),
        (few, "has 4 images; expected at least 10"),
        (other_classes, "has the classes blue, green, red; expected blue, red"),
        (no_labels, "without its labels; expected train-labels-idx1-ubyte"),
        (short, "no whole IDX file of 3 dimensions"),
        (unequal, "3 pictures, but 4 labels"),
        (oblong, "not all of one square size"),
        (lambda root: root.rmdir(), "is no folder"),
    ],
)
def test_what_cannot_be_read_is_one_message(make, words, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(SettingError, match=words):
        pictures.read(root)


def test_patches_of_usual_sizes():
    assert [patch_of(side) for side in (8, 28, 32, 64)] == [2, 4, 4, 8]
    with pytest.raises(ValueError, match="patch 3 must divide pixels 8"):
        VisionTransformer(1, 8, 3, 2)


def test_a_vision_transformer_sees_every_patch_where_it_is():
    torch.manual_seed(0)
    model = VisionTransformer(2, 8, 4, 3, dim=8, layers=1, heads=2)
    with torch.no_grad():
        model.places.normal_()
    x = torch.randn(2, 2, 8, 8)
    assert model(x).shape == (2, 3)
    for row, column in ((0, 0), (3, 7), (7, 7)):
        other = x.clone()
        other[0, 1, row, column] += 1
        assert (model(other)[0] - model(x)[0]).abs().max() > 1e-5
        torch.testing.assert_close(model(other)[1], model(x)[1])
    swapped = torch.cat([x[:, :, 4:], x[:, :, :4]], 2)  # the same patches elsewhere
    assert (model(swapped) - model(x)).abs().max() > 1e-4
    with torch.no_grad():
        model.places.zero_()
    torch.testing.assert_close(model(swapped), model(x))
    # A patch is a square of the picture, all channels, in order.
    seen = []
    model.patches.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    model(x)
    torch.testing.assert_close(seen[0][0, 1], x[0, :, :4, 4:].flatten())


def test_its_hidden_matrices_are_those_of_its_blocks():
    model = VisionTransformer(1, 8, 2, 10)
    names = {id(p): n for n, p in model.named_parameters()}
    *hidden, rest = optim.split(model, OUTER)
    inside, outside = [names[id(p)] for group in hidden for p in group["params"]], rest["params"]
    assert [group["matrix"] for group in (*hidden, rest)] == [None, None, False]  # of one matrix, and of three in one
    assert sorted(inside) == [f"blocks.{n}.{w}.weight" for n in range(2) for w in ("down", "out", "qkv", "up")]
    assert len(inside) + len(outside) == len(names)
    with pytest.raises(ValueError, match=r"outer: 'heads\.\*' fits no parameter"):
        optim.split(model, ("heads.*",))


def test_pictures_are_learned_by_class(tmp_path):
    found = pictures.read(folders(tmp_path, 10), pixels=8)
    trial = vision(0, found=found, dim=16, layers=1)
    optimizer = torch.optim.AdamW(trial.module.parameters(), 1e-2)
    assert trial.score() == pytest.approx(np.log(2), abs=0.5)
    for step in range(15):
        optimizer.zero_grad()
        trial.loss(step).backward()
        optimizer.step()
    assert trial.score() < 0.1


def test_problems_name_the_pictures_and_take_steps(tmp_path):
    found = problems(steps=7, data=folders(tmp_path), pixels=8)
    assert {task.steps for task in found.values()} == {7}
    assert found["images"].title == "12 pictures of 2 classes, vision transformer"
    assert "images" not in problems(quick=True)
