import numpy as np
import pytest
import torch
from PIL import Image

from meadef_lightning.data import YouTubeFacesDataModule
from meadef_lightning.data.faces import frame_order, read_boxes

PERSONS = {"Ada_Lovelace": 12, "Alan_Turing": 14, "Grace_Hopper": 10, "Rare_Guest": 9}
SPLITS = ("victim", "validation", "attacker", "verification", "test")


def frame_name(i):
    """Two videos of one person; frame numbers pass from one digit to two, where text order would differ."""
    video = 0 if i < 5 else 3
    return f"{video}\\{video}.{i + 5}.jpg"


@pytest.fixture
def root(tmp_path):
    """Frames of 60×40, grey, with a face of 10×12 around a centre: brightness tells person and frame."""
    for number, (person, n) in enumerate(PERSONS.items()):
        lines = []
        for i in range(n):
            frame = np.full((40, 60, 3), 128, np.uint8)
            x, y = 20 + i, 15 + number
            frame[y - 6 : y + 6, x - 5 : x + 5] = (50 * number + 10, 10 * i, 0)
            path = tmp_path / person / frame_name(i).replace("\\", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(path, quality=100, subsampling=0)
            lines.append(f"{person}\\{frame_name(i)},0,{x},{y},10,12,0.0,1\n")
        lines.reverse()  # the order in the file must not matter
        (tmp_path / f"{person}.labeled_faces.txt").write_text("".join(lines))
    return tmp_path


def module(root, **kwargs):
    arguments = {"image_size": 8, "min_images": 10, "test_images": 3, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return YouTubeFacesDataModule(str(root), **{**arguments, **kwargs})


def colours(data, split):
    x, y = data.tensors(split)
    inner = x[:, :, 3:5, 3:5].mean((2, 3)) * 255
    persons = ((inner[:, 0] - 10) / 50).round().long()
    frames = (inner[:, 1] / 10).round().long()
    return x, y, persons, frames


def test_persons_with_enough_images_are_kept(root):
    data = module(root)
    assert data.class_names == ("Ada_Lovelace", "Alan_Turing", "Grace_Hopper")
    assert data.image_shape == (3, 8, 8)
    assert sum(len(data.dataset(split)) for split in SPLITS) == 36


def test_faces_are_cut_out_with_their_labels(root):
    data = module(root)
    for split in SPLITS:
        x, y, persons, frames = colours(data, split)
        assert torch.equal(persons, y)
        for image, person, frame in zip(x, persons, frames, strict=True):
            face = torch.tensor([50 * person + 10, 10 * frame, 0]) / 255
            assert (image - face[:, None, None]).abs().max() < 0.06  # nothing of the grey background; JPEG is lossy


def test_last_frames_of_each_person_are_for_testing(root):
    _, y, _, frames = colours(module(root), "test")
    found = sorted(zip(y.tolist(), frames.tolist(), strict=True))
    expected = [(label, n - back) for label, n in enumerate((12, 14, 10)) for back in (3, 2, 1)]
    assert found == expected


def test_in_memory_and_lazy_are_the_same(root):
    for a, b in zip(module(root).tensors("victim"), module(root, in_memory=True).tensors("victim"), strict=True):
        assert torch.equal(a, b)


def test_box_file_may_lie_in_the_persons_folder(root):
    before = module(root).split_summary()
    for person in PERSONS:
        name = f"{person}.labeled_faces.txt"
        (root / name).rename(root / person / name)
    assert module(root).split_summary() == before


def test_fingerprint_covers_boxes(root):
    before = module(root).split_summary()["sources"]["train"]
    path = root / "Ada_Lovelace.labeled_faces.txt"
    path.write_text(path.read_text().replace(",10,12,", ",10,11,"))
    assert module(root).split_summary()["sources"]["train"] != before


def test_published_example_of_a_line(tmp_path):
    path = tmp_path / "Richard_Gere.labeled_faces.txt"
    path.write_text("Richard_Gere\\3\\3.618.jpg,0,262,165,132,132,0.0,1\n\n")
    assert read_boxes(path) == {"Richard_Gere/3/3.618.jpg": (262 - 66, 165 - 66, 132, 132)}


def test_frames_are_ordered_by_number():
    names = ["A/10/10.2.jpg", "A/2/2.100.jpg", "A/2/2.99.jpg", "A/2/2.9.jpg"]
    assert sorted(names, key=frame_order) == ["A/2/2.9.jpg", "A/2/2.99.jpg", "A/2/2.100.jpg", "A/10/10.2.jpg"]


@pytest.mark.parametrize(
    "line",
    [
        "Ada_Lovelace\\0\\0.5.jpg,0,20,15",
        "Ada_Lovelace\\0\\0.5.jpg,0,x,15,10,12,0,1",
        "Ada_Lovelace\\0\\0.5.jpg,0,20,15,0,12,0,1",
        "..\\secret.jpg,0,20,15,10,12,0,1",
        "Ada_Lovelace\\..\\..\\secret.jpg,0,20,15,10,12,0,1",
        "/etc/secret.jpg,0,20,15,10,12,0,1",
        ",0,20,15,10,12,0,1",
    ],
)
def test_bad_lines_are_named(root, line):
    path = root / "Ada_Lovelace.labeled_faces.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"Ada_Lovelace\.labeled_faces\.txt, line 13: .*Unpack the file again"):
        module(root).setup()


def test_without_files_the_error_says_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded automatically: request access at https://"):
        module(tmp_path / "nowhere").setup()


def test_missing_frames_are_named(root):
    (root / "Alan_Turing" / "0" / "0.6.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 14 frames of Alan_Turing are missing .*Alan_Turing/0/0\.6\.jpg"):
        module(root).setup()


def test_too_few_persons_are_explained(root):
    with pytest.raises(ValueError, match=r"Of 4 persons .*, 1 have at least min_images=13 images.*Lower min_images"):
        module(root, min_images=13).setup()


@pytest.mark.parametrize("test_images", [0, 10])
def test_every_person_must_keep_images_to_train_on(test_images):
    with pytest.raises(ValueError, match=f"got test_images={test_images} and min_images=10"):
        module("anywhere", test_images=test_images)
