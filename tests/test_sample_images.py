"""Images that videos begin with: their pixels, and their way through tables, shards, splits and preference pairs."""

import csv
import io
import re
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import plain_clip
from shard_kit import clip, record, write_pairs
from videoalign import VideoAlignError
from videoalign.cli import main
from videoalign.datamodules.contents import ShardError
from videoalign.datamodules.frames import encode_frames
from videoalign.datamodules.info import info
from videoalign.datamodules.prompts import read_items, read_prompts
from videoalign.datamodules.sample_images import SampleImage, image_of, pixels, read_image
from videoalign.datamodules.shards import ShardSet, ShardWriter, add_contents
from videoalign.datamodules.verify import open_damaged, verify
from videoalign.models.flow import draw_seed
from videoalign.models.frame_sampling import FrameSampling


def picture(seed: int = 0, kind: str = "PNG", height: int = 20, width: int = 30, mode: str = "RGB", **options) -> bytes:
    """Content of an image of random pixels."""
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 4), dtype=np.uint8)
    values[..., 3] = 255 * (values[..., 3] > 100)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def write_images(out: Path, kinds: list[str | None], per_shard: int = 2) -> dict[str, SampleImage | None]:
    """A *pairs* set with an image of each kind, or none; returns the images by key."""
    images = {}
    with ShardWriter(out, "pairs", per_shard=per_shard) as writer:
        for i, kind in enumerate(kinds):
            image = read_image(picture(i, kind), "image") if kind else None
            writer.write(f"k{i}", {"a": clip(i), "b": clip(i + 8)}, record(i), image)
            images[f"k{i}"] = image
    return images


# --- pixels -----------------------------------------------------------------------------------------------------------


def test_pixels_of_an_rgb_image_are_its_own() -> None:
    want = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)[..., :3]
    found = pixels(picture(0), "image")
    assert found.dtype == np.uint8 and np.array_equal(found, want)


def test_what_is_transparent_lies_on_white() -> None:
    content = picture(3, mode="RGBA")
    rgba = np.asarray(Image.open(io.BytesIO(content)))
    found = pixels(content, "image")
    assert (found[rgba[..., 3] == 0] == 255).all()
    assert np.array_equal(found[rgba[..., 3] == 255], rgba[..., :3][rgba[..., 3] == 255])


def test_half_transparent_grey_is_mixed_with_white() -> None:
    buffer = io.BytesIO()
    Image.new("LA", (4, 4), (100, 51)).save(buffer, "PNG")
    assert abs(pixels(buffer.getvalue(), "image").astype(int) - (100 * 51 + 255 * 204) // 255).max() <= 1


def test_palettes_with_a_transparent_colour_lie_on_white() -> None:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)
    found = pixels(buffer.getvalue(), "image")
    assert found[0, 0].tolist() == [255, 255, 255] and found[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("mode", "kind"), [("L", "PNG"), ("L", "JPEG"), ("1", "PNG")])
def test_grey_becomes_three_equal_colours(mode: str, kind: str) -> None:
    found = pixels(picture(1, kind, mode=mode), "image")
    assert found.shape == (20, 30, 3) and np.ptp(found, axis=2).max() == 0 and np.ptp(found) > 100


def test_sixteen_bits_become_eight() -> None:
    values = np.array([[0, 257 * 7, 65535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    assert pixels(buffer.getvalue(), "image")[0].tolist() == [[0] * 3, [7] * 3, [255] * 3]


def test_cmyk_is_converted() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(buffer, "JPEG", quality=95)
    red, green, blue = pixels(buffer.getvalue(), "image")[8, 8].tolist()
    assert red > 240 and green < 15 and blue < 15


def test_rotation_in_the_metadata_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=exif)
    assert pixels(buffer.getvalue(), "image").shape == (30, 20, 3)


def moving() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def test_of_a_telephones_picture_the_first_one_counts() -> None:
    """Behind the picture such a JPEG holds a second one, gains or depth; Pillow calls it MPO."""
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(
        buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20), "blue")]
    )
    assert Image.open(io.BytesIO(buffer.getvalue())).format == "MPO"
    assert read_image(buffer.getvalue(), "image").kind == "jpg"
    red, green, blue = pixels(buffer.getvalue(), "image")[0, 0].tolist()
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as an image"),
        (b"no image", "cannot be read as an image"),
        (picture()[:200], "cannot be read as an image"),
        (picture(0, "JPEG")[:300], "cannot be read as an image"),
        (picture(0, "BMP"), "is a BMP; images are PNG, JPEG, WEBP"),
        (moving(), "moves: it has 2 frames"),
        (Path("none.png"), r"cannot be read as an image \(No such file"),
    ],
)
def test_what_is_no_image_is_refused(content: bytes | Path, message: str) -> None:
    with pytest.raises(VideoAlignError, match=f"cover.png {message}"):
        read_image(content, "cover.png")


@pytest.mark.parametrize("side", [6000, 14_000])  # within what Pillow opens, and beyond
def test_decompression_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.new("1", (side, side)).save(buffer, "PNG")
    assert len(buffer.getvalue()) < 1_000_000
    with pytest.raises(VideoAlignError, match=r"above the limit of|exceeds limit of"):
        read_image(buffer.getvalue(), "bomb.png")


# --- shards -----------------------------------------------------------------------------------------------------------


def test_images_are_kept_byte_by_byte_in_whatever_mixture(tmp_path: Path) -> None:
    images = write_images(tmp_path / "set", ["PNG", None, None, None, "JPEG", "WEBP", "PNG"])
    shards = ShardSet(tmp_path / "set")
    assert {content.key: image_of(content) for content in shards.contents()} == images
    assert {raw.key: image_of(raw) for raw in shards} == images
    assert [content.image for content in shards.contents()] == ["png", None, None, None, "jpg", "webp", "png"]
    part = shards.contents().take([5, 1])
    assert [content.image for content in part] == ["webp", None]
    assert part[0].raw().members["webp"] == images["k5"].content and part[1].image_id == ""
    assert part[0].image_id != shards.contents()[4].image_id
    assert list(verify(open_damaged(str(tmp_path / "set")))) == []
    assert "4 of 7 samples with the image that its videos begin with, 4 different ones" in info(str(tmp_path / "set"))


def test_sets_without_images_have_the_bytes_of_earlier_releases(tmp_path: Path) -> None:
    write_images(tmp_path / "set", [None, None])
    columns = ShardSet(tmp_path / "set").contents().extensions
    assert columns == ["a.mp4", "b.mp4", "json"]
    assert "image" not in (tmp_path / "set/index.json").read_text()
    assert "with the image" not in info(str(tmp_path / "set"))


def test_contents_are_made_anew_with_their_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "set", ["PNG", None, "JPEG"])
    before = (tmp_path / "set/000000.parquet").read_bytes()
    (tmp_path / "set/000000.parquet").unlink()
    with pytest.raises(ShardError, match="is missing"):
        ShardSet(tmp_path / "set").contents()
    assert add_contents(tmp_path / "set") == 3
    assert (tmp_path / "set/000000.parquet").read_bytes() == before
    assert {content.key: image_of(content) for content in ShardSet(tmp_path / "set").contents()} == images


def rewritten(folder: Path, change) -> None:
    """Write a set's first shard anew, with other members, and its table of contents."""
    with tarfile.open(folder / "000000.tar") as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(folder / "000000.tar", "w") as tar:
        for member, content in change(members):
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_damaged_images_are_found(tmp_path: Path) -> None:
    write_images(tmp_path / "set", ["PNG", "JPEG"])
    rewritten(tmp_path / "set", lambda members: [(m, c[:90] if m.name == "k1.jpg" else c) for m, c in members])
    found = list(verify(open_damaged(str(tmp_path / "set"))))
    assert any("k1" in line and "jpg cannot be read as an image" in line for line in found)


def test_a_sample_has_one_image(tmp_path: Path) -> None:
    write_images(tmp_path / "set", ["PNG", None])

    def add(members):
        other = tarfile.TarInfo("k0.jpg")
        return [*members[:1], (other, picture(5, "JPEG")), *members[1:]]

    rewritten(tmp_path / "set", add)
    assert any("has 2 images (jpg, png)" in line for line in verify(open_damaged(str(tmp_path / "set"))))


def test_a_table_of_contents_without_its_images_is_found(tmp_path: Path) -> None:
    write_images(tmp_path / "set", ["PNG", None])
    write_images(tmp_path / "bare", [None, None])
    shutil.copy(tmp_path / "bare/000000.parquet", tmp_path / "set")
    found = list(verify(open_damaged(str(tmp_path / "set"))))
    assert any("not as they were written" in line for line in found)


def test_splits_copies_and_frames_keep_images(tmp_path: Path) -> None:
    images = write_images(tmp_path / "set", ["PNG", None, "JPEG", "WEBP", "PNG", "PNG"])
    call = ["shards", "split", str(tmp_path / "set"), "--out", str(tmp_path / "split"), "--by", "prompt"]
    main([*call, "--shares", "train=0.5,val=0.5"])
    shares = [ShardSet(tmp_path / "split" / name) for name in ("train", "val")]
    assert {c.key: image_of(c) for shards in shares for c in shards.contents()} == images
    both = ShardSet(str(tmp_path / "split/{train,val}"))
    assert {content.key: image_of(content) for content in both.contents()} == images
    main(["shards", "copy", str(tmp_path / "set"), str(tmp_path / "copy")])
    assert {c.key: image_of(c) for c in ShardSet(tmp_path / "copy").contents()} == images
    glance = FrameSampling(fps=None, num_frames=2, min_pixels=0)
    list(encode_frames(ShardSet(tmp_path / "set"), tmp_path / "frames", glance, 16))
    assert {c.key: image_of(c) for c in ShardSet(tmp_path / "frames").contents()} == images


def test_joined_sets_keep_images(tmp_path: Path) -> None:
    image = read_image(picture(), "image")
    for name in "ab":
        with ShardWriter(tmp_path / name, "videos") as writer:
            record = {"prompt": "p", "source": name}
            writer.write("one", {"": clip(1)}, record, image if name == "a" else None)
    main(["shards", "join", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "both")])
    assert {c.key: image_of(c) for c in ShardSet(tmp_path / "both").contents()} == {"0-one": image, "1-one": None}


# --- imports ----------------------------------------------------------------------------------------------------------

COLUMNS = "path_A,path_B,prompt,VQ,MQ,TA,image"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with four videos and two images among them, and one image beside the tables."""
    monkeypatch.chdir(tmp_path)
    Path("videos/images").mkdir(parents=True)
    for i, name in enumerate("abcd"):
        Path(f"videos/{name}.mp4").write_bytes(plain_clip(30 * i + 20))
    for i, name in enumerate(("videos/images/x.png", "videos/y.jpg", "z.webp")):
        Path(name).write_bytes(picture(i, ("PNG", "JPEG", "WEBP")[i]))
    return tmp_path


def imported(lines: str, *options: str, columns: str = COLUMNS, command: str = "import-csv") -> ShardSet:
    Path("table.csv").write_text(f"{columns}\n{lines}")
    main(["shards", command, "table.csv", "--videos", "videos", "--out", "out", "--workers", "1", *options])
    return ShardSet("out")


ROWS = """\
a.mp4,b.mp4,p,A,B,same,images/x.png
c.mp4,d.mp4,q,A,B,same,y.jpg
a.mp4,c.mp4,r,A,A,A,
b.mp4,d.mp4,s,A,A,A,z.webp
"""


def test_rated_pairs_are_imported_with_their_images(place: Path) -> None:
    found = {content.record["prompt"]: content for content in imported(ROWS).contents()}
    files = {"p": "videos/images/x.png", "q": "videos/y.jpg", "s": "z.webp"}
    assert {prompt: image_of(c).content for prompt, c in found.items() if c.image} == {
        prompt: Path(file).read_bytes() for prompt, file in files.items()
    }
    assert found["r"].image is None and "image" not in found["r"].record
    assert found["p"].record["image"] == {"file": "images/x.png", "sha256": image_of(found["p"]).sha256}


def test_benchmarks_are_imported_with_their_images(place: Path) -> None:
    lines = "a.mp4,b.mp4,p,A,B,same,images/x.png\na.mp4,c.mp4,p,A,B,same,y.jpg\n"
    shards = imported(lines, "--kind", "videos")
    images = {content.key: image_of(content).kind for content in shards.contents()}
    assert [(images[row["key_A"]], images[row["key_B"]]) for row in shards.table("pairs.csv")] == [
        ("png", "png"),
        ("jpg", "jpg"),
    ]
    assert len(images) == 4  # a.mp4 stands for two samples, because it was rated beside two images


def test_held_out_pairs_keep_their_images(place: Path) -> None:
    Path("table.csv").write_text(f"{COLUMNS}\n{ROWS[: ROWS.index('a.mp4,c')]}")
    call = ["shards", "import-csv", "table.csv", "--videos", "videos", "--out", "out", "--workers", "1"]
    main([*call, "--held-out", "0.5"])
    kinds = [c.image for name in ("train", "val") for c in ShardSet(f"out/{name}").contents()]
    assert sorted(kinds) == ["jpg", "png"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.mp4,d.mp4,q,A,B,same,none.png", "1 videos and images are not there, which 1 rows name"),
        ("c.mp4,d.mp4,q,A,B,same,../y.jpg", "line 3: path '../y.jpg' is not a path inside"),
        ("c.mp4,d.mp4,q,A,B,same,a.mp4", "line 3: a.mp4 cannot be read as an image"),
        ("b.mp4,a.mp4,p,B,A,same,y.jpg", "line 3: repeats line 2: .* but other image"),
    ],
)
def test_unsound_images_of_pairs_are_named(place: Path, capsys: pytest.CaptureFixture, line: str, message: str) -> None:
    with pytest.raises(SystemExit):
        imported(f"a.mp4,b.mp4,p,A,B,same,images/x.png\n{line}\n")
    assert re.search(message, capsys.readouterr().err)
    assert not Path("out").exists()


def test_a_row_that_repeats_another_with_its_image_is_merged(place: Path) -> None:
    shards = imported("a.mp4,b.mp4,p,A,B,same,y.jpg\nb.mp4,a.mp4,P ,B,A,same,y.jpg\n")
    assert len(shards) == 1


def test_videos_are_imported_with_their_images(place: Path) -> None:
    lines = "a.mp4,p,m,y.jpg\nb.mp4,p,n,\n"
    shards = imported(lines, columns="path,prompt,source,image", command="import-videos")
    assert {c.record["path"]: c.image for c in shards.contents()} == {"a.mp4": "jpg", "b.mp4": None}


def test_a_video_with_two_images_is_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        imported("a.mp4,p,m,y.jpg\na.mp4,p,m,z.webp\n", columns="path,prompt,source,image", command="import-videos")
    assert "repeats line 2: the same video and prompt, but another image" in capsys.readouterr().err


# --- prompts files ----------------------------------------------------------------------------------------------------


def table_of(folder: Path, *rows: tuple[str, str]) -> Path:
    with open(folder / "prompts.csv", "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "image"), *rows])
    return folder / "prompts.csv"


def test_prompts_with_images_are_items_of_their_own(tmp_path: Path) -> None:
    for i, name in enumerate(("x.png", "y.png")):
        (tmp_path / name).write_bytes(picture(i))
    shutil.copy(tmp_path / "x.png", tmp_path / "again.png")
    absolute = str(tmp_path / "y.png")
    path = table_of(tmp_path, ("p", "x.png"), ("p", absolute), ("q", "x.png"), ("p", "again.png"))
    items = read_items(path)
    assert [(item.prompt, item.image.name) for item in items] == [("p", "again.png"), ("p", "y.png"), ("q", "x.png")]
    assert items[0].sha256 == items[2].sha256 != items[1].sha256
    assert len({item.seed(7, 0) for item in items}) == 3
    assert read_prompts(path) == ["p", "q"]


def test_prompts_without_images_keep_their_noise(tmp_path: Path) -> None:
    (item,) = read_items(table_of(tmp_path, ("p", "")))
    assert item.image is None and item.seed(7, 3) == draw_seed(7, "p", 3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("p", "x.png"), ("q", "a.png"), ("r", "b.png")], r"2 of 3 images are missing, .*a\.png \(line 3\)"),
        ([("p", "x.png"), ("q", "")], "1 of 2 rows name no image, the first of them in line 3"),
        ([("p", "x.png"), ("", "x.png")], "line 3: it names an image, but no prompt"),
        ([("p", "t.png"), ("q", "t.png"), ("r", "x.png")], r"line 2: .*t\.png cannot be read .* 1 more of 3 images"),
    ],
)
def test_prompts_files_whose_images_are_unsound_are_refused(tmp_path: Path, rows: list, message: str) -> None:
    (tmp_path / "x.png").write_bytes(picture())
    (tmp_path / "t.png").write_text("no image")
    with pytest.raises(VideoAlignError, match=message):
        read_items(table_of(tmp_path, *rows))


def test_generate_names_missing_images_before_it_loads_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = table_of(tmp_path, ("p", "x.png"))
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--generator", "nowhere", "--prompts", str(path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2 and "1 of 1 images are missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pairs_kept_their_format(tmp_path: Path) -> None:
    """The set of an earlier test kit, which knows no images, is read as ever."""
    assert [content.image for content in ShardSet(write_pairs(tmp_path / "pairs")).contents()] == [None] * 7
