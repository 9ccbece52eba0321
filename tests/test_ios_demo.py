"""ios_demo as far as no Swift is needed: the project's files are whole, and its constants are those of this package.

scripts/check_ios.sh builds and tests the Swift package."""

import plistlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lordba import adapter, blob
from lordba.profiling import record
from lordba.runtime import bundle, coreml_adapter, coreml_runner
from lordba.scales import ScaleCode

PROJECT = Path(__file__).parents[1]
DEMO = PROJECT / "ios_demo"
KIT = DEMO / "LordbaKit"
SOURCES = KIT / "Sources" / "LordbaKit"


def spec(name: str) -> dict[str, Any]:
    return yaml.safe_load((DEMO / name).read_text())


@pytest.mark.parametrize(
    ("file", "pattern", "value"),
    [
        ("Manifest.swift", r"formatVersion = (\d+)", bundle.FORMAT_VERSION),
        ("Manifest.swift", r'fileName = "(.+)"', bundle.MANIFEST_NAME),
        ("Adapter.swift", r"formatVersion = (\d+)", adapter.FORMAT_VERSION),
        ("Adapter.swift", r'configName = "(.+)"', adapter.CONFIG_NAME),
        ("Adapter.swift", r'weightsName = "(.+)"', adapter.WEIGHTS_NAME),
        ("Adapter.swift", r'prefix = "(.+)"', adapter.PREFIX),
        ("AdapterBlob.swift", r"version: UInt32 = (\d+)", blob.VERSION),
        ("AdapterBlob.swift", r"headerBytes = (\d+)", blob.HEADER.size),
        ("AdapterBlob.swift", r"recordBytes = (\d+)", blob.RECORD.size),
        ("Scales.swift", r"case (fp32, .*)", ", ".join(code.value for code in ScaleCode)),
        ("Profile.swift", r"formatVersion = (\d+)", record.FORMAT_VERSION),
        ("Profile.swift", r"normalMAD = ([\d.]+)", record.NORMAL_MAD),
        ("CoreML/CoreMLRunner.swift", r'baseFunction = "(.+)"', coreml_runner.BASE_FUNCTION),
        ("CoreML/AdapterInputs.swift", r"parts = \[(.*)\]", ", ".join(f'"{n}"' for n in coreml_adapter.NAMES)),
    ],
)
def test_constants_are_those_of_the_python_package(file, pattern, value):
    found = re.findall(pattern, (SOURCES / file).read_text())
    assert found == [str(value)]


def test_blob_codes_and_adapter_modes_are_known():
    scales = (SOURCES / "Scales.swift").read_text()
    for code, number in blob.CODE_NUMBERS.items():
        assert f"case .{code.value}: {number}\n" in scales
    runner = (SOURCES / "CoreML" / "CoreMLRunner.swift").read_text()
    for mode in (coreml_runner.FUNCTIONS, coreml_runner.PACKAGES, coreml_runner.INPUTS):
        assert f'case "{mode}"' in runner
    assert f'== "{coreml_runner.METHODS}"' in (DEMO / "App" / "Runtimes" / "ExecuTorchRunner.swift").read_text()


def test_the_kernels_are_those_of_the_library():
    kernels = KIT / "Sources" / "CLordba" / "kernels"
    assert kernels.is_symlink() and kernels.resolve() == PROJECT / "backends" / "kernels"
    header = KIT / "Sources" / "CLordba" / "include" / "lordba_kernels.h"
    assert header.is_symlink() and header.resolve() == PROJECT / "backends" / "kernels" / "lordba_kernels.h"
    excluded = re.findall(r'"kernels/([\w.]+)"', (KIT / "Package.swift").read_text())
    assert all((kernels / name).is_file() for name in excluded)
    for source in kernels.glob("*.c"):  # SwiftPM hands every file to every CPU's compiler
        text = source.read_text()
        if source.name.startswith("neon"):
            assert "#if defined(__aarch64__)" in text
        if source.name.startswith("avx"):
            assert source.name in excluded


def test_the_project_names_files_that_are_there():
    project = spec("project.yml")
    (name, target), *others = project["targets"].items()
    assert not others and target["platform"] == "iOS" and target["type"] == "application"
    assert project["options"]["deploymentTarget"] == {"iOS": "17.0"}
    assert ".iOS(.v17)" in (KIT / "Package.swift").read_text()
    for source in target["sources"]:
        assert (DEMO / source["path"]).is_dir()
        assert all((DEMO / source["path"] / excluded).is_file() for excluded in source["excludes"])
    settings = target["settings"]["base"]
    assert (DEMO / settings["INFOPLIST_FILE"]).is_file() and (DEMO / settings["CODE_SIGN_ENTITLEMENTS"]).is_file()
    assert (DEMO / project["packages"]["LordbaKit"]["path"] / "Package.swift").is_file()
    products = re.findall(r'\.library\(name: "(\w+)"', (KIT / "Package.swift").read_text())
    assert {d["product"] for d in target["dependencies"]} == set(products)
    assert project["schemes"][name]["build"]["targets"] == {name: "all"}
    # two modules of one name cannot be built
    assert settings["PRODUCT_MODULE_NAME"] not in products


def test_executorch_is_the_pinned_release():
    pinned = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = (d.removeprefix("executorch==") for d in pinned if d.startswith("executorch=="))
    extended = spec("executorch.yml")
    assert extended["include"] == "project.yml"
    assert extended["packages"]["ExecuTorch"]["branch"] == f"swiftpm-{version}"


def test_property_lists():
    info = plistlib.loads((DEMO / "App" / "Info.plist").read_bytes())
    assert info["UIFileSharingEnabled"] and info["LSSupportsOpeningDocumentsInPlace"]  # bundles come in by Finder
    assert info["CFBundleIdentifier"] == "$(PRODUCT_BUNDLE_IDENTIFIER)"
    assert not any("Usage" in key or "NSAppTransport" in key or "Background" in key for key in info)
    entitlements = plistlib.loads((DEMO / "App" / "LordbaDemo.entitlements").read_bytes())
    assert entitlements == {"com.apple.developer.kernel.increased-memory-limit": True}


def test_nothing_reaches_for_the_network():
    for path in [*DEMO.rglob("*.swift")]:
        assert not re.search(r"URLSession|import Network|NWConnection|https?://", path.read_text()), path


def test_the_workflow_pins_its_actions():
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "macos.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used)
    commands = "\n".join(step.get("run", "") for step in steps)
    for test in re.findall(r"tests/\w+\.py", commands):
        assert "on_macos" in (PROJECT / test).read_text(), f"{test} holds nothing that needs macOS"
    marked = {p for p in (PROJECT / "tests").glob("test_*.py") if re.search(r"^ *@on_macos$", p.read_text(), re.M)}
    assert {p.name for p in marked} == {Path(t).name for t in re.findall(r"tests/\w+\.py", commands)}
