from importlib import metadata

import pytest

from d2v_scale.benchmarks import device_packages


def test_here_nothing_is_wrong() -> None:
    assert list(device_packages.problems()) == []


def test_the_old_deepspeed_that_a_download_of_wheels_finds_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.3.1.dev5" if name == "deepspeed" else real(name))
    assert list(device_packages.problems()) == ["deepspeed is 0.3.1.dev5 (wanted: deepspeed>=0.19.8,<0.20)"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name == "webdataset":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert device_packages.main([]) == 2
    assert capsys.readouterr().err == "error: webdataset is not installed (wanted: webdataset>=1.0.2,<2)\n"


def test_a_module_that_does_not_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_packages, "_MODULES", ("d2v_scale.no_such_module",))
    (problem,) = device_packages.problems()
    assert problem.startswith("d2v_scale.no_such_module cannot be imported: ModuleNotFoundError")


def test_pins_are_of_all_that_is_required_but_torch_and_deepspeed() -> None:
    names = {pin.partition("==")[0] for pin in device_packages.pins()}
    assert {"megatron-core", "transformers", "tokenizers", "typeshed-client", "hjson", "braceexpand"} <= names
    assert not {"torch", "deepspeed", "torchaudio", "mlflow", "sympy"} & names
    assert f"numpy=={metadata.version('numpy')}" in device_packages.pins()
