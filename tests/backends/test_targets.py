from __future__ import annotations

from pathlib import Path

import pytest

from amoeba_export.backends import find_backend, list_backends
from amoeba_export.backends.targets import graph_options, list_targets, over_ssh, parse_options, read_target
from amoeba_export.errors import DamagedFile, InputError, NotFound, TargetUnavailable, UnknownName
from amoeba_export.formats import FORMATS
from amoeba_export.ir import RuntimeLimits

SHIPPED = (
    "cpu",
    "h100-vllm",
    "jetson-agx-orin-edgellm",
    "jetson-agx-orin-llamacpp",
    "jetson-agx-orin-vllm",
    "jetson-agx-thor-edgellm",
    "jetson-agx-thor-vllm",
    "jetson-orin-nano-edgellm",
    "jetson-orin-nano-llamacpp",
    "jetson-orin-nx-edgellm",
    "jetson-orin-nx-llamacpp",
    "jetson-orin-nx-vllm",
    "llamacpp-cpu",
    "openvino-cpu",
    "raspberry-pi-5-llamacpp",
    "raspberry-pi-5-onnxruntime",
    "rtx-4090-llamacpp",
    "rtx-4090-vllm",
)


def test_the_targets_that_amoeba_ships() -> None:
    targets = list_targets()
    assert set(SHIPPED) == set(targets)
    for target in targets.values():
        backend = find_backend(target.backend)
        assert target.sources, f"{target.name} does not say where its figures come from"
        assert set(target.formats) <= set(FORMATS)
        if backend.containers:
            assert target.formats[0] in backend.containers
        assert target.flow
        if target.flow == "llama.cpp":
            assert target.formats[0] == "gguf"
        if target.flow in ("vLLM", "TensorRT Edge-LLM"):
            assert target.formats == ("safetensors",)
            limits = target.limits
            assert {limits.ffn_multiple, limits.query_multiple, limits.hidden_multiple} == {128}
            assert "w4a16" in limits.multiples_of
            assert "w4a16" in target.dtypes


def test_plain_names_are_the_flow_that_is_recommended_there() -> None:
    plain = {alias: target.name for target in list_targets().values() for alias in target.aliases}
    assert plain == {
        "h100": "h100-vllm",
        "jetson": "jetson-orin-nano-llamacpp",
        "jetson-agx-orin": "jetson-agx-orin-llamacpp",
        "jetson-agx-thor": "jetson-agx-thor-vllm",
        "jetson-orin-nano": "jetson-orin-nano-llamacpp",
        "jetson-orin-nx": "jetson-orin-nx-llamacpp",
        "raspberry-pi-5": "raspberry-pi-5-llamacpp",
        "rtx-4090": "rtx-4090-llamacpp",
    }


def test_limits_are_read(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    head = 'description = "mine"\nbackend = "onnxruntime"\n[limits]\nruntime = "R"\n'
    path.write_text(head + "hidden_by_heads = true\noutput_biases = false\n")
    assert read_target(path).limits == RuntimeLimits(runtime="R", hidden_by_heads=True, output_biases=())
    path.write_text(head + "output_biases = true\n")
    assert read_target(path).limits.takes_output_biases("qwen3")
    path.write_text(head + "ffn_multipel = 128\n")
    with pytest.raises(InputError, match=r"limits\.ffn_multipel: there is no such key\. Did you mean 'ffn_multiple'"):
        read_target(path)


def test_an_alias_names_the_same_target() -> None:
    assert read_target("jetson") == read_target("jetson-orin-nano") == read_target("jetson-orin-nano-llamacpp")
    assert read_target("jetson").name == "jetson-orin-nano-llamacpp"


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
    assert options.backend == "llamacpp"
    assert options.options == {"gpu_layers": 999}
    assert parse_options(over_ssh(read_target("cpu"), "me@board")).backend == "onnxruntime"


def test_the_flow_decides_how_a_graph_is_spelled() -> None:
    assert graph_options(read_target("cpu"), "fp32") == {"dialect": "ort"}
    assert graph_options(read_target("raspberry-pi-5-onnxruntime"), "fp32") == {"dialect": "ort"}
    remote = over_ssh(read_target("raspberry-pi-5-onnxruntime"), "me@board")
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
