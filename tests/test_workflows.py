"What GitHub runs agrees with what settings.ini promises."
import configparser
import json
import re

import yaml
from conftest import ROOT


def settings():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_the_matrix_holds_the_ends_of_the_ranges():
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    matrix, cfg = jobs["test"]["strategy"]["matrix"], settings()
    oldest = next(entry for entry in matrix["include"] if entry["versions"] == "oldest")
    assert oldest["python"] == cfg["min_python"]
    for name in ("torch", "torchvision"):
        promised = re.search(rf"\b{name}>=([\d.]+)", cfg["requirements"])[1]
        assert f"{name}=={promised}.*" in oldest["torch"]
    assert set(matrix["python"]) == {entry["python"] for entry in matrix["include"]}
    assert {system.split("-")[0] for system in matrix["os"]} == {"ubuntu", "macos", "windows"}


def test_the_site_is_published_from_the_branch_of_the_settings():
    site = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text(encoding="utf-8"))
    # YAML reads the word `on` as true
    assert site[True]["push"]["branches"] == [settings()["branch"]]
    steps = site["jobs"]["build"]["steps"]
    upload = next(s for s in steps if "upload-pages-artifact" in s.get("uses", ""))
    assert upload["with"]["path"] == settings()["doc_path"]


def test_the_container_is_json():
    container = (ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8")
    assert json.loads(container)["name"] == settings()["title"]
