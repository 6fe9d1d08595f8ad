"""Archives and files of unknown origin: read in place, never extracted, bounded; what is unsafe or damaged is named."""

import io
import re
import stat
import struct
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import trees
from PIL import Image

from gpkernels.errors import UserError
from gpkernels.training import data
from gpkernels.training.config import TrainConfig
from gpkernels.training.data import decoding, parquet, sources


def config(path, kind="folder", **settings):
    return TrainConfig(**{"data": f"{kind}:{path}", "image_size": 32, **settings})


def png(grey, size=(40, 40), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, (grey,) * 3).save(buffer, "PNG", **options)
    return buffer.getvalue()


def greys(images):
    return images.images[:, 0, 16, 16].tolist()


def test_a_zip_is_the_folder_it_was_made_of(tmp_path):
    folder = trees.folder(tmp_path / "in/images")
    opened = data.load(config(folder))
    archive = data.load(config(trees.zipped(tmp_path / "images.zip", folder)))
    assert np.array_equal(archive.images, opened.images)
    assert archive.labels.tolist() == opened.labels.tolist()
    assert archive.class_names == ("class0", "class1", "class2")
    assert archive.name == "images"
    one_folder = data.load(config(trees.zipped(tmp_path / "outer.zip", tmp_path / "in")))  # images/class0/...
    assert one_folder.labels.tolist() == opened.labels.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.zip", "in", "outer.zip"]  # nothing is extracted


def unsafe(file):
    """Three good images, and members that no archive of images needs."""
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that comes twice
        archive.writestr("a/1.png", png(10))
        archive.writestr("a/2.png", png(20))
        archive.writestr("a/3.png", png(30))
        archive.writestr("/etc/4.png", png(40))
        archive.writestr("a/../../5.png", png(50))
        archive.writestr("..\\6.png", png(60))
        archive.writestr("C:/7.png", png(70))
        archive.writestr(link, "/etc/passwd")
        archive.writestr("a/2.png", png(80))
        archive.writestr("bomb.png", bytes(2**21))
        archive.writestr("__MACOSX/a/._1.png", b"resource fork")
        archive.writestr("a/.DS_Store", b"")
        archive.writestr("a/\33[2Jx.png", b"not an image")
    return file


def test_unsafe_members_are_refused_and_named(tmp_path):
    images = data.load(config(unsafe(tmp_path / "x.zip")))
    assert greys(images) == [10, 20, 30]
    refused = [reason.removeprefix(f"{tmp_path}/x.zip/") for reason in images.skipped]
    refused[6] = re.sub(r"from \d{4} compressed", "from N compressed", refused[6])
    assert refused == [
        "/etc/4.png: refused, its path leads out of the archive",
        "a/../../5.png: refused, its path leads out of the archive",
        "..\\6.png: refused, its path leads out of the archive",
        "C:/7.png: refused, its path leads out of the archive",
        "link.png: refused, it is a link",
        "a/2.png: refused, its name comes twice",
        "bomb.png: refused, 2097152 bytes from N compressed ones",
        "a/?[2Jx.png: not an image (JPEG, PNG, BMP, WEBP, GIF, TIFF)",
    ]


def test_encrypted_and_oversized_members_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for grey in (10, 20, 30):
            archive.writestr(f"{grey}.png", png(grey) + bytes(1000 if grey == 30 else 0))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    second = content.index(b"PK\1\2", content.index(b"PK\1\2") + 1)
    content[second + 8] |= 1  # the flag of encryption in the central directory
    (tmp_path / "x.zip").write_bytes(content)
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    images = data.load(config(tmp_path / "x.zip"))
    assert greys(images) == [10]
    assert "20.png: refused, it is encrypted" in images.skipped[0]
    assert "30.png: wanted at most 1000 bytes, got" in images.skipped[1]


def test_a_damaged_member_is_skipped_and_a_damaged_archive_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for grey in (10, 20, 30):
            archive.writestr(f"{grey}.png", png(grey))
    content = bytearray((tmp_path / "x.zip").read_bytes())
    place = content.index(b"20.png") + 60
    content[place] ^= 255
    (tmp_path / "x.zip").write_bytes(content)
    images = data.load(config(tmp_path / "x.zip"))
    assert greys(images) == [10, 30]
    assert "20.png: damaged in the archive (Bad CRC-32" in images.skipped[0]
    (tmp_path / "y.zip").write_bytes(content[:-30])
    (tmp_path / "z.zip").write_bytes(b"")
    for name in "yz":
        with pytest.raises(UserError, match=rf"--data folder: wanted a zip file, got .*/{name}.zip, which is none or"):
            data.load(config(tmp_path / f"{name}.zip"))


def test_a_zip_without_images_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../1.png", png(10))
        archive.writestr("readme.txt", "x")
    for kind in ("folder", "celeba"):
        with pytest.raises(
            UserError, match=f"--data {kind}: wanted images .*got none; the first of 1 refused: .*leads out"
        ):
            data.load(config(tmp_path / "x.zip", kind))


def test_hidden_files_are_left_alone(tmp_path):
    trees.folder(tmp_path, 3)
    for name in (".thumbs/1.png", "class0/._000.png", "__MACOSX/000.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    images = data.load(config(tmp_path))
    assert (len(images.images), images.skipped) == (3, [])


def claims(width, height):
    """A PNG of a few bytes whose header claims a size."""
    content = bytearray(png(0))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize("side", [8193, 12_000, 60_000])  # beyond ours; where Pillow warns; where Pillow refuses
def test_image_bombs_are_skipped_before_they_are_decoded(tmp_path, side):
    (tmp_path / "good.png").write_bytes(png(10))
    (tmp_path / "bomb.png").write_bytes(claims(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        images = data.load(config(tmp_path))
    assert greys(images) == [10]
    assert "bomb.png: " in images.skipped[0]
    assert "decompression bomb" in images.skipped[0]


def test_the_limit_of_pixels_does_not_depend_on_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1600)
    (tmp_path / "1.png").write_bytes(png(10))
    (tmp_path / "2.png").write_bytes(png(20, (41, 40)))
    images = data.load(config(tmp_path))
    assert greys(images) == [10]
    assert "2.png: decompression bomb: wanted at most 1600 pixels, got 41x40" in images.skipped[0]


def test_other_formats_are_not_opened_whatever_their_name(tmp_path, monkeypatch):
    """Pillow would hand an EPS to Ghostscript."""
    (tmp_path / "good.png").write_bytes(png(10))
    Image.new("RGB", (40, 40)).save(tmp_path / "1.eps")
    (tmp_path / "1.eps").rename(tmp_path / "1.jpg")
    opened = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **b: opened.append(a))
    images = data.load(config(tmp_path))
    assert "1.jpg: not an image (JPEG" in images.skipped[0]
    assert not opened


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 500)
    (tmp_path / "1.png").write_bytes(png(10))
    (tmp_path / "2.png").write_bytes(png(20) + bytes(500))
    images = data.load(config(tmp_path))
    assert greys(images) == [10]
    assert "2.png: wanted at most 500 bytes, got more than 500" in images.skipped[0]


def test_photographs_are_turned_as_their_camera_was(tmp_path):
    tall = Image.fromarray(np.arange(60 * 40 * 3, dtype=np.uint32).reshape(60, 40, 3).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    tall.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "1.png", exif=exif)
    tall.save(tmp_path / "2.png")
    images = data.load(config(tmp_path))
    assert np.array_equal(images.images[0], images.images[1])


def jpegs():
    """JPEGs of natural-like content in all subsamplings, progressive, grey, and as cut off or damaged as they come."""
    rng = np.random.default_rng(0)
    for index in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8)).resize((89, 109), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (109, 89, 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        buffer = io.BytesIO()
        mode = {3: "L", 7: "CMYK"}.get(index, "RGB")
        quality = (60, 75, 95)[index % 3]
        options = {} if mode == "L" else {"subsampling": index % 3}
        picture.convert(mode).save(buffer, "JPEG", quality=quality, progressive=index % 4 == 1, **options)
        yield buffer.getvalue()
    yield buffer.getvalue()[:-40]
    yield buffer.getvalue() + b"more"
    damaged = bytearray(buffer.getvalue())
    damaged[len(damaged) // 2 :: 50] = bytes(len(damaged[len(damaged) // 2 :: 50]))
    yield bytes(damaged)


def test_simplejpeg_changes_no_pixel(monkeypatch):
    pytest.importorskip("simplejpeg")
    assert decoding.decoder().startswith("simplejpeg ")
    square = decoding.Cut("all", (0, 0, 89, 109))

    def decoded(content):
        try:
            return decoding.decode(content, square, 64).tobytes()
        except OSError as error:
            return str(error)

    contents = list(jpegs())
    fast = [decoded(content) for content in contents]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert fast == [decoded(content) for content in contents]
    assert "truncated" in fast[12]
    assert isinstance(fast[14], bytes)  # Pillow forgives what simplejpeg does not
    for content, pixels in zip(contents[:12], fast, strict=False):
        with Image.open(io.BytesIO(content)) as image:
            plain = image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
        assert pixels == np.asarray(plain).transpose(2, 0, 1).tobytes()


def test_parquet_of_unknown_origin(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    def write(name, table):
        pyarrow.parquet.write_table(pa.table(table), tmp_path / name, row_group_size=2)
        return tmp_path / name

    rows = [{"bytes": content, "path": None} for content in (png(10), b"not an image", png(30), None, png(50))]
    images = data.load(config(write("a.parquet", {"image": rows}), "celeba", crop="none", split="all"))
    assert greys(images) == [10, 30, 50]
    assert "a.parquet row 1: not an image (JPEG" in images.skipped[0]
    assert "a.parquet row 3: wanted the bytes of an image, got null" in images.skipped[1]
    plain = write("b.parquet", {"image": [png(10), png(20)]})
    assert greys(data.load(config(plain, "celeba", crop="none", split="all"))) == [10, 20]
    for name, table, message in (
        ("c.parquet", {"picture": [png(10)]}, "wanted a column 'image' of .*, got columns picture"),
        ("d.parquet", {"image": [1, 2]}, "wanted a column 'image' of struct"),
    ):
        with pytest.raises(UserError, match=message):
            data.load(config(write(name, table), "celeba"))
    (tmp_path / "e.parquet").write_bytes(plain.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"wanted a parquet file, got .*/e.parquet, which is none or damaged"):
        data.load(config(tmp_path / "e.parquet", "celeba"))
    damaged = bytearray(plain.read_bytes())
    damaged[4:40] = bytes(36)
    (tmp_path / "f.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"wanted at least one readable image, got none; .*damaged row group"):
        data.load(config(tmp_path / "f.parquet", "celeba", crop="none", split="all"))


def test_pages_that_claim_too_much_are_refused_before_they_are_decompressed(tmp_path, monkeypatch):
    """Though the column's metadata says that it is small: what is allocated is what the page's own header says."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pictures = [png(10), bytes(2**22), png(30), png(40)]
    table = pa.table({"image": pictures, "Young": [True, False, True, True]})
    options = {"row_group_size": 2, "compression": "zstd", "use_dictionary": False}
    pyarrow.parquet.write_table(table, file, **options)
    size = pyarrow.parquet.ParquetFile(file).metadata.row_group(0).column(0).total_uncompressed_size
    content = file.read_bytes()
    assert content.count(varint(2 * size))
    file.write_bytes(content.replace(varint(2 * size), varint(2 * 2**20)))
    read = []
    plain = pyarrow.parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "iter_batches",
        lambda self, *args, **kwargs: read.append(kwargs["row_groups"]) or plain(self, *args, **kwargs),
    )
    images = data.load(config(file, "celeba", crop="none", split="all"))
    assert greys(images) == [30, 40]
    assert re.search(r"row 0: damaged row group \(refused, 4194\d+ bytes from \d+ compressed ones\)", images.skipped[0])
    assert read == [[1]]


def test_rows_that_repeat_a_large_one_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    noise = np.random.default_rng(0).bytes(2**16)
    table = pa.table({"image": [noise] * 100 + [png(10)] * 100})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "MAX_BYTES", 2**18)
    sizes = []
    plain = pyarrow.parquet.ParquetFile.iter_batches

    def batches(self, *args, **kwargs):
        for batch in plain(self, *args, **kwargs):
            sizes.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", batches)
    assert greys(data.load(config(tmp_path / "a.parquet", "celeba", crop="none", split="all"))) == [10] * 100
    assert 2**17 < max(sizes) <= 2**18


def test_parquet_whose_rows_or_columns_do_not_lie_in_the_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    rows = 12345
    pyarrow.parquet.write_table(pa.table({"image": [b"x"] * rows}), file)
    content = file.read_bytes()
    assert len(content) < rows
    with pytest.raises(UserError, match=f"wanted fewer rows than the {len(content)} bytes of .*, got {rows}"):
        data.load(config(file, "celeba", split="all"))
    pyarrow.parquet.write_table(pa.table({"image": [png(10)]}), file, compression="none", use_dictionary=False)
    length = pyarrow.parquet.ParquetFile(file).metadata.row_group(0).column(0).total_compressed_size
    content = file.read_bytes()
    assert 8192 > length >= 64
    file.write_bytes(content.replace(varint(2 * length), varint(2 * 8000)))
    with pytest.raises(UserError, match=r"damaged row group .wanted a column within the file, got bytes 4 to 8004"):
        data.load(config(file, "celeba", split="all"))


def test_an_attribute_that_is_null_is_not_had(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"image": [png(10), png(20), png(30)], "Young": [None, True, False]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    images = data.load(config(tmp_path / "a.parquet", "celeba", crop="none", split="all", label_attribute="Young"))
    assert images.labels.tolist() == [0, 1, 0]


def test_flags_that_claim_too_much_are_refused(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = pa.table({"image": [png(grey) for grey in range(100)], "Young": [True] * 100})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(sources, "_FREE", 1)
    monkeypatch.setattr(sources, "MAX_RATIO", 0.5)
    with pytest.raises(UserError, match=r"wanted columns of bool in .*a.parquet, got a damaged one \(refused, "):
        data.load(config(tmp_path / "a.parquet", "celeba", split="all", label_attribute="Young"))


def varint(value):
    """Of Thrift's compact protocol."""
    return bytes([value]) if value < 128 else bytes([value % 128 + 128]) + varint(value // 128)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"parquet files want pyarrow: pip install 'gpkernels\[parquet\]'"):
        data.load(config(tmp_path / "a.parquet", "celeba"))
