"""What the examples say that they need: exact versions, from whatever registry the user has."""

import json
from importlib.metadata import version
from xml.etree import ElementTree as ET

from tests.examples.quickstart import EXAMPLES


def test_pythons_requirements_are_what_the_tests_run_with() -> None:
    lines = (EXAMPLES / "python" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: version(name) for name in wanted} == wanted


def test_nodes_packages_are_locked_by_their_hashes_and_to_no_registry() -> None:
    manifest = json.loads((EXAMPLES / "node" / "package.json").read_text(encoding="utf-8"))
    packages = json.loads((EXAMPLES / "node" / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    root = packages.pop("")
    assert root["dependencies"] == manifest["dependencies"]
    for name, package in packages.items():
        assert "integrity" in package, name
        assert "resolved" not in package, name
    assert manifest["dependencies"] == {
        name: packages[f"node_modules/{name}"]["version"] for name in manifest["dependencies"]
    }


def test_javas_project_names_no_repository() -> None:
    tags = {each.tag.rpartition("}")[2] for each in ET.parse(EXAMPLES / "java" / "pom.xml").iter()}
    assert "dependency" in tags
    assert not tags & {"repository", "pluginRepository"}


def test_the_collectors_readme_builds_it_with_the_builder_of_its_components_version() -> None:
    config = (EXAMPLES / "collector" / "builder-config.yaml").read_text(encoding="utf-8")
    readme = (EXAMPLES / "collector" / "README.md").read_text(encoding="utf-8")
    _, _, built_by = readme.partition("go.opentelemetry.io/collector/cmd/builder@")
    assert f"otlpreceiver {built_by.split()[0]}\n" in config
