from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export.backends import find_backend, list_backends
from amoeba_export.backends.targets import graph_options, list_targets, over_ssh, parse_options, read_target
from amoeba_export.errors import DamagedFile, InputError, NotFound, TargetUnavailable, UnknownName
from amoeba_export.formats import FORMATS

SHIPPED = (
    "cpu",
    "h100",
    "jetson-agx-orin",
    "jetson-orin-nano",
    "jetson-orin-nx",
    "openvino-cpu",
    "raspberry-pi-5",
    "rtx-4090",
)


def test_the_targets_that_amoeba_ships() -> None:
    targets = list_targets()
    assert set(SHIPPED) <= set(targets)
    for target in targets.values():
        backend = find_backend(target.backend)
        assert target.sources, f"{target.name} does not say where its figures come from"
        assert set(target.formats) <= set(FORMATS)
        if backend.containers:
            assert target.formats[0] in backend.containers
        if backend.source != "measured":
            assert target.on_device, f"{target.name} is estimated and does not say how it would be measured"


def test_an_alias_names_the_same_target() -> None:
    assert read_target("jetson") == read_target("jetson-orin-nano")
    assert read_target("jetson").name == "jetson-orin-nano"


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName) as caught:
        read_target("jetsun")
    assert caught.value.exit_code == 2
    assert caught.value.what == "There is no target named 'jetsun'. Did you mean 'jetson'?"
    assert caught.value.next_step is not None
    assert all(name in caught.value.next_step for name in SHIPPED)


def test_a_target_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "desk.toml"
    path.write_text('description = "mine"\nbackend = "onnxruntime"\nalign = 8\n[options]\nthreads = 1\n')
    target = read_target(path)
    assert (target.name, target.align, dict(target.options)) == ("desk", 8, {"threads": 1})
    assert parse_options(target).threads == 1


def test_a_recorded_table_is_found_beside_its_target_file(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text('description = "mine"\nbackend = "recorded"\n[options]\ntable = "board.json"\n')
    assert parse_options(read_target(path)).table == tmp_path / "board.json"


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(
        'descripton = "mine"\nbackend = "onnxruntim"\nalign = 0\nformats = ["onnxx"]\n'
        '[on_device]\nbackend = "torch"\n[on_device.options]\ncompil = true\n'
    )
    with pytest.raises(InputError) as caught:
        read_target(str(path))
    assert str(caught.value) == (
        "The target has 6 mistakes:\n"
        "  - description: it is required\n"
        "  - formats.0: input should be 'onnx', 'safetensors' or 'gguf', not 'onnxx'\n"
        "  - align: input should be greater than or equal to 1, not 0\n"
        "  - descripton: there is no such key. Did you mean 'description'?\n"
        "  - backend: there is no backend 'onnxruntim'. Did you mean 'onnxruntime'?\n"
        "  - on_device.options.compil: there is no such key. Did you mean 'compile'?\n"
        f"  where: {path}\n"
        "  next:  Correct the file."
    )


def test_a_file_that_is_not_toml(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("description = ")
    with pytest.raises(DamagedFile):
        read_target(path)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(NotFound, match=r"The target file was not found: nowhere\.toml"):
        read_target("nowhere.toml")


def test_a_host_is_measured_with_the_flow_that_the_target_names() -> None:
    target = over_ssh(read_target("jetson"), "me@board", port=2222, identity=Path("key"))
    assert target.backend == "ssh"
    options = parse_options(target)
    assert (options.host, options.port, options.identity) == ("me@board", 2222, Path("key"))
    assert options.backend == "onnxruntime"
    assert options.options == {"providers": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
    assert parse_options(over_ssh(read_target("cpu"), "me@board")).backend == "onnxruntime"


def test_the_flow_decides_how_a_graph_is_spelled() -> None:
    assert graph_options(read_target("cpu"), "fp32") == {"dialect": "ort"}
    assert graph_options(read_target("jetson"), "fp32") == {"dialect": "ort"}
    remote = over_ssh(read_target("jetson"), "me@board")
    assert graph_options(remote, "fp32") == {"dialect": "ort"}
    assert graph_options(read_target("openvino-cpu"), "fp32") == {"dialect": "standard"}
    assert graph_options(read_target("openvino-cpu"), "int4")["dialect"] == "ort"
    assert graph_options(read_target("h100"), "fp32") == {}


def test_a_target_without_a_flow_cannot_be_measured_over_ssh(tmp_path: Path) -> None:
    path = tmp_path / "guess.toml"
    path.write_text(
        'description = "a guess"\nbackend = "analytic"\n[options]\nbandwidth_gb_s = 1\nbandwidth_efficiency = 1\n'
        "compute_tflops = 1\nper_layer_ms = 0\nper_token_ms = 0\nuncertainty = 0.5\n"
    )
    with pytest.raises(InputError, match="Target 'guess' does not say how the device is measured"):
        over_ssh(read_target(path), "me@board")


def test_an_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="There is no backend named 'onyx'"):
        find_backend("onyx")


def test_a_plug_in_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from amoeba_export import backends

    broken = EntryPoint(name="broken", value="not_a_package.backend", group=backends.ENTRY_POINT_GROUP)
    monkeypatch.setattr(backends, "entry_points", lambda group: [broken])
    assert "broken" in list_backends()
    with pytest.raises(TargetUnavailable, match=r"The plug-in 'not_a_package\.backend' of backend 'broken' cannot be"):
        find_backend("broken")
