"""The reader refuses what is not a sound 3-D volume; the writer keeps the reference's geometry to the bit."""

import gzip
import os
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from nibabel.eulerangles import euler2mat

from data_pipeline import nifti

SHAPE = (5, 7, 6)


def oblique(codes="RAS"):
    table = nib.orientations.axcodes2ornt(codes)
    turned = from_matvec(euler2mat(0.3, -0.2, 0.1) @ np.diag([1.5, 0.9, 2.0]), [3.0, -40.0, 7.5])
    return turned @ nib.orientations.inv_ornt_aff(table, SHAPE)


def save(path, array=None, affine=None, kind=nib.Nifti1Image, edit=None):
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if array is None else array
    image = kind(array, oblique() if affine is None else affine)
    image.header.set_xyzt_units("mm", "sec")
    if edit:
        edit(image.header)
    nib.save(image, path)
    return path


def header_bytes(**fields):
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["sform_code"], header["srow_x"][0], header["srow_y"][1], header["srow_z"][2] = 1, 1, 1, 1
    header["dim"][:4] = (3, *SHAPE)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_reading_equals_nibabel(tmp_path, kind, name):
    path = save(tmp_path / name, kind=kind)
    volume = nifti.read(path)
    truth = nib.load(path)
    np.testing.assert_array_equal(volume.array, np.asarray(truth.dataobj))
    np.testing.assert_array_equal(volume.affine, truth.affine)


def test_reading_applies_the_scaling_and_the_byte_order(tmp_path):
    path = tmp_path / "a.nii"
    image = nib.Nifti1Image(np.arange(210.0).reshape(SHAPE), oblique(), nib.Nifti1Header(endianness=">"))
    image.header.set_data_dtype(np.int16)
    nib.save(image, path)
    volume = nifti.read(path)
    assert volume.array.dtype == np.float64
    np.testing.assert_array_equal(volume.array, nib.load(path).get_fdata())


def test_reading_goes_by_content_and_not_by_name(tmp_path):
    packed = save(tmp_path / "a.nii.gz")
    (tmp_path / "b.nii").write_bytes(packed.read_bytes())
    (tmp_path / "c.nii.gz").write_bytes(gzip.decompress(packed.read_bytes()))
    for name in ("b.nii", "c.nii.gz"):
        np.testing.assert_array_equal(nifti.read(tmp_path / name).array, nifti.read(packed).array)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_truncation_is_an_error_that_names_the_file(tmp_path, name):
    data = save(tmp_path / name).read_bytes()
    for length in {*range(0, len(data), 10), *range(len(data) - 12, len(data))}:
        (tmp_path / "cut.nii.gz").write_bytes(data[:length])
        with pytest.raises(nifti.NiftiError, match=r"cut\.nii\.gz: ") as caught:
            nifti.read(tmp_path / "cut.nii.gz")
        assert "\n" not in str(caught.value)


def test_flipped_byte_in_a_compressed_file_never_changes_voxels_unseen(tmp_path):
    path = save(tmp_path / "a.nii.gz")
    data, truth = path.read_bytes(), nifti.read(path).array
    refused = 0
    for position in range(len(data)):
        (tmp_path / "b.nii.gz").write_bytes(
            data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
        )
        try:
            np.testing.assert_array_equal(nifti.read(tmp_path / "b.nii.gz").array, truth)
        except nifti.NiftiError:
            refused += 1
    assert refused > 0.9 * len(data)


def test_damaged_headers_are_read_or_refused_but_never_crash(tmp_path):
    data = save(tmp_path / "a.nii").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(data)
        for position in rng.integers(0, 352, rng.integers(1, 6)):
            damaged[position] = rng.integers(256)
        (tmp_path / "b.nii").write_bytes(damaged)
        try:
            assert nifti.read(tmp_path / "b.nii").array.ndim == 3
        except nifti.NiftiError as error:
            assert "b.nii: " in str(error)


@pytest.mark.parametrize("dim", [(3, 30000, 30000, 30000), (3, 32767, 1, 32767), (3, 600, 600, 700)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_huge_declared_sizes_take_no_memory(tmp_path, dim, pack):
    dims = np.ones(8, np.int16)
    dims[:4] = dim
    (tmp_path / "huge.nii").write_bytes(pack(header_bytes(dim=dims) + bytes(1000)))
    tracemalloc.start()
    with pytest.raises(nifti.NiftiError, match=r"huge.nii: (the header declares|truncated)"):
        nifti.read(tmp_path / "huge.nii")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_compressed_bomb_behind_the_voxels_is_not_unpacked(tmp_path):
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(header_bytes() + bytes(200_000_000), 1))
    tracemalloc.start()
    with pytest.raises(nifti.NiftiError, match="goes on after its last voxel"):
        nifti.read(tmp_path / "bomb.nii.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e7


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": [4, 5, 7, 6, 2, 1, 1, 1]}, "is 4-D"),
        ({"dim": [4, 5, 7, 6, 1, 1, 1, 1]}, "is 4-D"),
        ({"dim": [2, 5, 7, 1, 1, 1, 1, 1]}, "is 2-D"),
        ({"dim": [3, 5, 0, 6, 1, 1, 1, 1]}, "damaged header|cannot be read"),
        ({"dim": [3, 5, -7, 6, 1, 1, 1, 1]}, "damaged header|cannot be read"),
        ({"datatype": 32, "bitpix": 64}, "complex64"),
        ({"datatype": 128, "bitpix": 24}, "real numbers"),
        ({"datatype": 1, "bitpix": 1}, "cannot be read|real numbers"),
        ({"datatype": 999}, "cannot be read"),
        ({"magic": b"ni1"}, "header and voxels in one"),
        ({"vox_offset": 1e9}, "damaged header"),
        ({"vox_offset": np.nan}, "cannot be read|damaged header"),
        ({"vox_offset": -16}, "cannot be read|damaged header"),
        ({"srow_x": [0, 0, 0, 0]}, "affine without inverse"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "affine without inverse"),
        ({"srow_x": [0, 1, 0, 0]}, "affine without inverse"),
        ({"sform_code": 0, "qform_code": 1, "quatern_b": 5}, "cannot be read"),
        ({"scl_slope": 1, "scl_inter": np.inf}, "cannot be read"),
    ],
)
def test_unusable_headers_are_refused(tmp_path, fields, words):
    (tmp_path / "x.nii").write_bytes(header_bytes(**fields) + bytes(2 * 5 * 7 * 6 * 4))
    with pytest.raises(nifti.NiftiError, match=rf"x\.nii: .*({words})"):
        nifti.read(tmp_path / "x.nii")


def test_things_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    (tmp_path / "folder.nii").mkdir()
    os.symlink(tmp_path / "gone", tmp_path / "link.nii")
    for name, words in (
        ("pipe", "not a regular"),
        ("folder", "not a regular"),
        ("link", "a link"),
        ("no", "no such"),
    ):
        with pytest.raises(nifti.NiftiError, match=words):
            nifti.read(tmp_path / f"{name}.nii")


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA", "AIL"])
def test_orientation_is_undone_exactly(codes):
    affine = oblique(codes)
    array = np.random.default_rng(0).normal(size=(*SHAPE, 2))
    table = nifti.orientation(affine)
    turned = nifti.to_ras(array, table)
    np.testing.assert_array_equal(nifti.from_ras(turned, table), array)
    new_affine = nifti.ras_affine(affine, table, SHAPE)
    assert "".join(nib.aff2axcodes(new_affine)) == "RAS"
    index = np.array([1, 2, 3])  # the same place in the world holds the same value
    there = np.linalg.inv(new_affine) @ affine @ [*index, 1]
    np.testing.assert_array_equal(turned[tuple(np.rint(there[:3]).astype(int))], array[tuple(index)])


def both_codes(header):
    header["qform_code"], header["sform_code"] = 1, 4


def only_qform(header):
    header.set_qform(header.get_sform(), code=1)
    header["sform_code"] = 0


def no_code(header):
    header["qform_code"] = header["sform_code"] = 0
    header["pixdim"][1:4] = 0.7, 0.8, 3.1


def odd_fields(header):
    header["descrip"], header["toffset"], header["cal_max"] = b"scanner 7", 2.5, 900


@pytest.mark.parametrize("edit", [None, both_codes, only_qform, no_code, odd_fields])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("as_record", [True, False])
def test_writing_keeps_every_field_of_the_geometry(tmp_path, edit, kind, as_record):
    reference = save(tmp_path / "reference.nii.gz", kind=kind, edit=edit)
    labels = np.random.default_rng(1).integers(0, 5, SHAPE)
    given = nifti.describe(nifti.read(reference)) if as_record else reference
    nifti.write_like(tmp_path / "out.nii.gz", labels, given)
    old, new = nib.load(reference), nib.load(tmp_path / "out.nii.gz")
    assert new.get_data_dtype() == np.uint8 and type(new) is type(old)
    np.testing.assert_array_equal(np.asarray(new.dataobj), labels)
    np.testing.assert_array_equal(new.affine, old.affine)
    of_the_voxels = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_min", "cal_max", "vox_offset"}
    for field in set(old.header) - of_the_voxels:
        assert new.header[field].tobytes() == old.header[field].tobytes(), field


@pytest.mark.parametrize(
    ("array", "name", "words"),
    [
        (np.zeros((5, 6, 7)), "a.nii.gz", r"the array is \(5, 6, 7\), the reference \(5, 7, 6\)"),
        (np.full(SHAPE, 0.5), "a.nii.gz", "whole numbers"),
        (np.full(SHAPE, -1), "a.nii.gz", "whole numbers"),
        (np.full(SHAPE, np.nan), "a.nii.gz", "whole numbers"),
        (np.zeros(SHAPE), "a.img", "must end in"),
    ],
)
def test_writing_refuses_what_would_be_wrong_and_leaves_nothing(tmp_path, array, name, words):
    reference = save(tmp_path / "reference.nii.gz")
    with pytest.raises(ValueError, match=words):
        nifti.write_like(tmp_path / name, array, reference)
    assert os.listdir(tmp_path) == ["reference.nii.gz"]


def test_equal_label_maps_give_equal_files(tmp_path):
    reference = save(tmp_path / "reference.nii.gz")
    for name in ("a.nii.gz", "b.nii.gz"):
        nifti.write_like(tmp_path / name, np.ones(SHAPE), reference)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
