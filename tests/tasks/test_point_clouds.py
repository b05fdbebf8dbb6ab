"""The task of point clouds: its data, each loader, and each kind of bad input."""

from __future__ import annotations

import builtins
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdefense import registry
from mmdefense.checkpoints.architecture import build_architecture
from mmdefense.data.clouds import random_jitter
from mmdefense.errors import BadInputError, UnsupportedError
from mmdefense.protocol import Task
from mmdefense.report.panels import markup
from mmdefense_tasks.point_clouds import PointCloudClassification, load_clouds
from mmdefense_tasks.point_files import read_cloud
from mmdefense_tasks.surfaces import KINDS, draw_surfaces

OFF = "OFF\n4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n"


def save(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def archive(path: Path, count=6, points=20, features=6) -> Path:
    clouds = np.random.default_rng(0).normal(size=(count, points, features)).astype(np.float32)
    return save(path, points=clouds, labels=np.arange(count) % 2)


def assert_in_unit_sphere(samples):
    points = samples.inputs[..., :3]
    torch.testing.assert_close(
        points.norm(dim=2).amax(1), torch.ones(len(samples)), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(points.mean(1), torch.zeros(len(samples), 3), rtol=0, atol=1e-5)


def test_it_is_a_task_and_its_cases_can_be_built():
    task: Task = registry.load("tasks", "point-cloud-classification")()
    samples = draw_surfaces(16, 8, seed=0)
    assert task.describe(samples) == {"classes": 8, "features": 3}
    first, *_ = cases = task.cases()
    assert first.name == "surfaces-pcba"
    assert first.data == "surfaces"
    assert len({case.name for case in cases}) == len(cases)
    assert {"surfaces-clean", "radhar-pcba", "radhar-clean"} <= {case.name for case in cases}
    for model in {case.model for case in cases}:
        net = build_architecture(model.format(**task.describe(samples))).eval()
        adapter = registry.adapt(net, **task.adapter_options(samples))
        assert adapter.logits(samples.inputs).shape == (16, 8)
    assert all(registry.load("attacks", c.attack).tasks == (task.name,) for c in cases if c.attack)


def test_surfaces_are_drawn_from_their_seed_in_the_unit_sphere():
    first, again, other = (draw_surfaces(24, 32, seed) for seed in (0, 0, 1))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    assert first.inputs.shape == (24, 32, 3)
    assert first.classes == tuple(KINDS)
    assert first.labels.bincount().tolist() == [3] * 8
    assert first.augmentation is None
    assert_in_unit_sphere(first)


def test_each_kind_of_surface_satisfies_its_equation():
    u = torch.rand(2, 500, 4, generator=torch.Generator().manual_seed(0))
    points = {kind: draw(u) for kind, draw in KINDS.items()}
    x, y, z = points["sphere"].unbind(2)
    torch.testing.assert_close(x**2 + y**2 + z**2, torch.ones(2, 500))
    torch.testing.assert_close(points["box"].abs().amax(2), torch.full((2, 500), 0.75))
    x, y, z = points["saddle"].unbind(2)
    torch.testing.assert_close(z, 0.7 * (x**2 - y**2))
    x, y, z = points["bowl"].unbind(2)
    torch.testing.assert_close(z, 1.2 * (x**2 + y**2) - 0.6)
    x, y, z = points["torus"].unbind(2)
    torch.testing.assert_close(
        ((x**2 + y**2).sqrt() - 0.85) ** 2 + z**2, torch.full((2, 500), 0.09)
    )
    x, y, z = points["cone"].unbind(2)
    ring = (x**2 + y**2).sqrt()
    on_side = (ring - 0.9 * (1 - z) / 2).abs() < 1e-4
    assert (on_side | ((z + 1).abs() < 1e-5)).all()
    x, y, z = points["cylinder"].unbind(2)
    ring = (x**2 + y**2).sqrt()
    assert (((ring - 0.7).abs() < 1e-4) | (z.abs() == 1)).all()
    assert (ring < 0.7001).all()
    assert points["helix"].norm(dim=2).max() < 1.4


def test_the_embedded_parts_are_disjoint_and_of_a_set_size():
    train, test = (load_clouds("surfaces", split=part, points=8) for part in ("train", "test"))
    assert (len(train), len(test)) == (2400, 800)
    assert not torch.equal(train.inputs[:8], test.inputs[:8])


def test_training_uses_the_usual_augmentation():
    samples = draw_surfaces(8, 8, seed=0)
    assert PointCloudClassification.for_training(samples).augmentation is random_jitter


def test_an_archive_is_read_and_cut_to_the_coordinates(tmp_path):
    archive(tmp_path / "train.npz")
    (tmp_path / "classes.txt").write_text("cup\nvase\n")
    samples = load_clouds(tmp_path, points=12)
    assert samples.inputs.shape == (6, 12, 3)
    assert samples.classes == ("cup", "vase")
    assert samples.labels.tolist() == [0, 1] * 3
    assert_in_unit_sphere(samples)
    whole = load_clouds(tmp_path / "train.npz", points=50, features=6)
    assert whole.inputs.shape == (6, 20, 6)
    assert torch.equal(load_clouds(tmp_path, points=12).inputs, samples.inputs)


def test_features_stay_with_their_points(tmp_path):
    points = np.random.default_rng(0).normal(size=(2, 30, 4)).astype(np.float32)
    points[..., 3] = points[..., 0]
    save(tmp_path / "train.npz", points=points, labels=np.array([0, 1]))
    samples = load_clouds(tmp_path, points=10, features=4)
    x, twin = samples.inputs[..., 0], samples.inputs[..., 3]
    assert torch.equal(x.argsort(1), twin.argsort(1))


def test_eight_bit_points_are_127ths(tmp_path):
    corners = np.array([[[127, 0, 0], [-127, 0, 0]]], dtype=np.int8)
    save(tmp_path / "a.npz", points_int8=corners, labels=np.array([0]))
    assert load_clouds(tmp_path / "a.npz").inputs.tolist() == [[[1, 0, 0], [-1, 0, 0]]]


def test_class_names_are_mapped_to_the_models(tmp_path):
    archive(tmp_path / "train.npz")
    (tmp_path / "classes.txt").write_text("cup\nvase\n")
    samples = load_clouds(tmp_path, classes=("Vase", "bowl", "Cup"))
    assert samples.labels.tolist() == [2, 0] * 3
    with pytest.raises(BadInputError, match="got vase"):
        load_clouds(tmp_path, classes=("cup",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"points": np.zeros((2, 0, 3)), "labels": np.zeros(2, int)}, "at least one point"),
        ({"points": np.full((2, 4, 3), np.nan), "labels": np.zeros(2, int)}, "NaN or infinity"),
        ({"points": np.zeros((2, 4, 2)), "labels": np.zeros(2, int)}, "of shape"),
        ({"points": np.zeros((2, 4)), "labels": np.zeros(2, int)}, r"must hold 'points' \(N, P"),
        ({"points": np.zeros((2, 4, 3)), "labels": np.zeros(3, int)}, "one label per cloud"),
        ({"points": np.zeros((0, 4, 3)), "labels": np.zeros(0, int)}, "at least one"),
        ({"points": np.zeros((2, 4, 3)), "labels": np.full(2, 0.5)}, "integer 'labels'"),
        ({"labels": np.zeros(2, int)}, "must hold 'points'"),
        ({"points": np.array(["a", "b"]), "labels": np.zeros(2, int)}, "must hold 'points'"),
    ],
)
def test_a_damaged_archive_is_refused_in_one_line(tmp_path, arrays, message):
    with pytest.raises(BadInputError, match=message) as caught:
        load_clouds(save(tmp_path / "a.npz", **arrays))
    assert "\n" not in str(caught.value)


def test_an_archive_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK, but no archive")
    with pytest.raises(BadInputError, match="must be an npz archive; it is damaged"):
        load_clouds(tmp_path / "a.npz")
    pickled = save(tmp_path / "b.npz", points=np.array([{}]), labels=np.zeros(1, int))
    with pytest.raises(BadInputError, match="cannot be read"):
        load_clouds(pickled)


def test_more_features_than_there_are_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="at least 7 values per point, got 6"):
        load_clouds(archive(tmp_path / "a.npz"), features=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "no_such_set"}, "none found"),
        ({"where": "surfaces", "split": "dev"}, "split must"),
        ({"where": "surfaces", "points": 0}, "points must"),
        ({"where": "surfaces", "features": 2}, "features must"),
        ({"where": "surfaces", "features": 6}, "3 values per point"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(BadInputError, match=message):
        load_clouds(**options)


def test_a_folder_without_clouds_or_without_the_part_is_refused(tmp_path):
    (tmp_path / "train" / "cup").mkdir(parents=True)
    with pytest.raises(BadInputError, match="one folder of clouds per class"):
        load_clouds(tmp_path)
    with pytest.raises(BadInputError, match="has no split 'test'"):
        load_clouds(tmp_path, split="test")


@pytest.fixture
def meshes(tmp_path) -> Path:
    for kind in ("cup", "vase"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "a.off").write_text(OFF)
    return tmp_path


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module"), ImportError("libusb-1.0.so")])
def test_without_open3d_a_mesh_says_what_is_missing(meshes, monkeypatch, error):
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "open3d":
            raise error
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UnsupportedError, match=r"\[points\].*libusb-1.0-0"):
        load_clouds(meshes)


def open3d():
    try:
        import open3d
    except ImportError as error:
        pytest.skip(f"Open3D cannot be used: {error}")
    return open3d


def test_meshes_are_sampled_and_get_normals(meshes):
    open3d()
    samples = load_clouds(meshes, points=40, features=6)
    assert samples.inputs.shape == (2, 40, 6)
    assert samples.classes == ("cup", "vase")
    lengths = samples.inputs[..., 3:].norm(dim=2)
    torch.testing.assert_close(lengths, torch.ones(2, 40))
    assert_in_unit_sphere(samples)


@pytest.mark.parametrize("suffix", [".ply", ".pcd"])
def test_clouds_are_thinned_filtered_and_filled_up(tmp_path, suffix):
    library = open3d()
    points = np.random.default_rng(0).normal(size=(300, 3))
    points[0] = 100
    cloud = library.geometry.PointCloud(library.utility.Vector3dVector(points))
    path = tmp_path / f"a{suffix}"
    library.io.write_point_cloud(str(path), cloud)
    assert read_cloud(path, 50).shape == (50, 3)
    assert read_cloud(path, 400).shape == (400, 3)
    assert read_cloud(path, 400).abs().max() == 100
    assert read_cloud(path, 400, outliers=2.0).abs().max() < 10
    assert len(read_cloud(path, 400, voxel=1.0).unique(dim=0)) < 200


CORNERS = [(x, y, z) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
SIDES = [(0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5)]
POLYGON = [(0, 1, 5, 7, 6, 2)]  # of a cube, around a corner


def off(header="OFF\n8 6 0", corners=CORNERS, faces=SIDES, behind="") -> str:
    lines = [" ".join(map(str, corner)) + behind for corner in corners]
    return "\n".join([header, *lines, *(f"{len(f)} {' '.join(map(str, f))}" for f in faces), ""])


def obj(corners=CORNERS, faces=SIDES, between="{}", behind="") -> str:
    lines = [f"v {' '.join(map(str, corner))}{behind}" for corner in corners]
    faces = [" ".join(between.format(index + 1) for index in face) for face in faces]
    return "\n".join([*lines, *(f"f {face}" for face in faces), ""])


def ply(behind="", names=(), corners=CORNERS, kind="double") -> str:
    properties = [f"property {kind} {axis}" for axis in "xyz"] + [f"property {n}" for n in names]
    lines = [" ".join(map(str, corner)) + behind for corner in corners]
    head = ["ply", "format ascii 1.0", f"element vertex {len(corners)}", *properties]
    return "\n".join([*head, "end_header", *lines, ""])


def read(tmp_path, name, text, points=600, **options):
    open3d()
    pytest.importorskip("trimesh")
    (tmp_path / name).write_text(text)
    return read_cloud(tmp_path / name, points, **options)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("glued.off", off("OFF8 6 0")),
        ("comments.off", off("OFF # a cube\n# by hand\n\n8 6 0")),
        ("windows.off", off().replace("\n", "\r\n")),
        ("coloured.off", off("COFF\n8 6 0", behind=" 255 0 0 255")),
        ("normals.off", off("NOFF\n8 6 0", behind=" 0 0 1")),
        ("quads.obj", obj()),
        ("slashes.obj", "vn 0 0 1\nvt 0 0\n" + obj(between="{}/1/1")),
        ("materials.obj", "mtllib none.mtl\n" + obj().replace("f 5", "usemtl b\nf 5")),
        ("coloured.obj", obj(behind=" 1 0 0")),
        ("SUFFIX.OBJ", obj()),
    ],
)
def test_the_surface_of_a_cube_is_read(tmp_path, name, text):
    cloud = read(tmp_path, name, text, values="normals")
    points, normals = cloud[:, :3] - 0.5, cloud[:, 3:]
    torch.testing.assert_close(points.abs().amax(1), torch.full((600,), 0.5).double())
    sides = torch.cat([points >= 0.4999, points <= -0.4999], 1)
    assert sides.sum(0).min() > 60  # a sixth of the points, at random
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(600).double())
    facing = points.abs().argmax(1, keepdim=True)  # the normals of faces, not estimated ones
    assert (normals.gather(1, facing).abs() > 0.9999).float().mean() > 0.99


@pytest.mark.parametrize(
    ("name", "text"), [("a.off", off("OFF\n8 1 0", faces=POLYGON)), ("a.obj", obj(faces=POLYGON))]
)
def test_a_polygon_is_read(tmp_path, name, text):
    assert (read(tmp_path, name, text).amin(1) < 0.999).all()


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.obj", obj(faces=[])), ("a.off", off("OFF\n8 0 0", faces=[])), ("a.ply", ply())],
)
def test_a_file_without_faces_is_a_cloud(tmp_path, name, text):
    cloud = read(tmp_path, name, text, 8)
    assert sorted(map(tuple, cloud.tolist())) == sorted(CORNERS)
    with pytest.raises(BadInputError, match="has no normals; give --read values=estimated"):
        read_cloud(tmp_path / name, 8, values="normals")
    estimated = read_cloud(tmp_path / name, 8, values="estimated")
    torch.testing.assert_close(estimated[:, 3:].norm(dim=1), torch.ones(8).double())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.ply", ply(" 255 0 51", ("uchar red", "uchar green", "uchar blue"))),
        ("a.obj", obj(faces=[], behind=" 1 0 0.2")),
    ],
)
def test_colours_are_no_normals(tmp_path, name, text):
    colours = read(tmp_path, name, text, 8, values="colours")[:, 3:]
    torch.testing.assert_close(colours, torch.tensor([1, 0, 0.2]).double().expand(8, 3))
    with pytest.raises(BadInputError, match=r"no normals; .* or values=colours"):
        read_cloud(tmp_path / name, 8, values="normals")


def test_normals_of_a_cloud_are_those_of_the_file(tmp_path):
    text = ply(" 0.6 0 0.8", [f"float n{axis}" for axis in "xyz"])
    normals = read(tmp_path, "a.ply", text, 8, values="normals")[:, 3:]
    torch.testing.assert_close(normals, torch.tensor([0.6, 0, 0.8]).double().expand(8, 3))
    with pytest.raises(BadInputError, match="has no colours"):
        read_cloud(tmp_path / "a.ply", 8, values="colours")
    with pytest.raises(BadInputError, match="values must be one of normals, estimated, colours"):
        read_cloud(tmp_path / "a.ply", 8, values="intensity")


FAR = [(0.3 * x + 4.5e5, 0.3 * y + 5.4e6, 0.3 * z + 100) for x, y, z in CORNERS]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.ply", ply(corners=FAR)),
        ("a.obj", obj(FAR, faces=[])),
        ("a.off", off("OFF\n8 0 0", FAR, faces=[])),
    ],
)
def test_map_coordinates_keep_their_shape(tmp_path, name, text):
    open3d()
    pytest.importorskip("trimesh")
    (tmp_path / "cube").mkdir()
    (tmp_path / "cube" / name).write_text(text)
    found = load_clouds(tmp_path, points=8).inputs[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.abs(), torch.full((8, 3), 3**-0.5))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.off", "OFF\n4 4 0\n0 0 0\n", "is it damaged"),
        ("a.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 9\n", "is it damaged"),
        ("a.off", "OFF\n3 1 0\n0 0 nan\n1 0 0\n0 1 0\n3 0 1 2\n", "NaN or infinity"),
        ("a.obj", "v 0 0 0\nf 1 1 1\n", "faces have no area"),
        ("a.obj", "v 0 0 0\nf 1 2 3\n", "is it damaged"),
        ("a.obj", "", "is it damaged"),
        ("a.ply", "ply\nnonsense", "is it damaged"),
    ],
)
def test_damaged_meshes_are_refused_in_one_line(tmp_path, name, text, message):
    with pytest.raises(BadInputError, match=message) as caught:
        read(tmp_path, name, text)
    assert "\n" not in str(caught.value)


def test_a_damaged_mesh_an_empty_cloud_and_nan_points_are_refused(tmp_path):
    library = open3d()
    (tmp_path / "a.off").write_text("OFF\nnonsense")
    with pytest.raises(BadInputError, match="is it damaged"):
        read_cloud(tmp_path / "a.off", 8)
    header = "ply\nformat ascii 1.0\nelement vertex {}\n" + "".join(
        f"property float {axis}\n" for axis in "xyz"
    )
    (tmp_path / "b.ply").write_text(header.format(0) + "end_header\n")
    with pytest.raises(BadInputError, match=r"at least one point|is it damaged"):
        read_cloud(tmp_path / "b.ply", 8)
    bad = library.geometry.PointCloud(library.utility.Vector3dVector([[0, 0, np.nan]] * 3))
    library.io.write_point_cloud(str(tmp_path / "c.pcd"), bad)
    with pytest.raises(BadInputError, match="NaN"):
        read_cloud(tmp_path / "c.pcd", 8)


def test_the_picture_marks_what_a_trigger_put_there():
    clean = draw_surfaces(16, 32, seed=0)
    inputs = clean.inputs.clone()
    inputs[:, :4, :3] = torch.tensor([0.0, 0.0, 1.1])
    task = PointCloudClassification()
    (grid,) = task.show(clean, replace(clean, inputs=inputs)).panels()
    before, after, above = grid.rows
    assert before.names[0] == "sphere"
    assert before.images.shape == after.images.shape == above.images.shape == (8, 3, 144, 144)

    def oranges(row):
        return (row.images[:, 0] > row.images[:, 2] + 0.2).sum()

    assert oranges(before) == 0
    assert oranges(after) > 50
    assert "<img" in str(markup(grid, "x"))
    moved = task.show(clean, replace(clean, inputs=clean.inputs.flip(2)))
    assert oranges(moved.panels()[0].rows[1]) == 0


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [("radhar_points", (2484, 547), 5), ("modelnet10_chair_monitor", (1084, 270), 2)],
)
def test_staged_sets_load(name, sizes, classes):
    for part, size in zip(("train", "test"), sizes, strict=True):
        samples = load_clouds(name, split=part, points=64)
        assert samples.inputs.shape == (size, 64, 3)
        assert samples.labels.unique().tolist() == list(range(classes))
        assert_in_unit_sphere(samples)
    assert name in PointCloudClassification.data()


@pytest.mark.real_data
def test_the_radar_keeps_its_features():
    assert load_clouds("radhar_points", split="test", points=64, features=6).inputs.shape[2] == 6
