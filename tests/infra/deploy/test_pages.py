"""docs/deploy: each page answers the same questions, and what it points to is there."""

import re
from pathlib import Path

import pytest
import yaml
from cli_flags import FLAGS

from kvrelay.cli.commands.serve import SERVE_FLAGS
from kvrelay.cli.commands.shared import STACK_FLAGS
from kvrelay.cli.container import PLATFORMS as HOSTS
from kvrelay.cli.container import PORT_VARIABLES, stack_values
from kvrelay.cli.settings import resolve

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "docs" / "deploy"
PAGES = sorted(FOLDER.glob("*.md"))
PLATFORMS = [page for page in PAGES if page.stem not in {"README", "aws"}]
KVRELAYS = {flag.name for flags in [*FLAGS.values(), STACK_FLAGS] for flag in flags}
OTHERS = {
    "docker": {"--build-arg", "--build", "--profile", "--no-deps", "--gpus", "--target"},
    "gcloud": {"--image", "--gpu", "--gpu-type", "--cpu", "--memory", "--no-cpu-throttling",
               "--concurrency", "--timeout", "--startup-probe", "--set-env-vars"},
    "helm": {"--namespace", "--create-namespace", "--set", "--values"},
    "ucx": {"--with-verbs", "--with-efa", "--with-cuda"},
    "kvrelay": {"--help"},
}  # fmt: skip


@pytest.mark.parametrize("page", PLATFORMS, ids=lambda p: p.stem)
@pytest.mark.parametrize("question", ["created", "wait", "drain", "at zero", "not proved"])
def test_a_page_says_what_happens(page, question):
    assert question in page.read_text().lower()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if link != "aws.md" and not (FOLDER / link).exists()] == []


@pytest.mark.parametrize("page", PLATFORMS, ids=lambda p: p.stem)
def test_flags_are_ones_that_somebody_takes(page):
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", page.read_text()))
    assert named - KVRELAYS - set.union(*OTHERS.values()) == set()


def test_values_that_pages_name_are_in_the_chart():
    values = yaml.safe_load((ROOT / "infra/helm/kvrelay/values.yaml").read_text())
    tops = "|".join(values)
    for page in PAGES:
        for path in re.findall(rf"`((?:{tops})(?:\.[A-Za-z]+)+)[`=]", page.read_text()):
            found = values
            for key in path.split("."):
                assert key in found, f"{page.name}: {path}"
                found = found[key]


def test_the_table_of_platforms_says_what_serve_does():
    page = (FOLDER / "one-container.md").read_text()
    for platform in HOSTS.values():
        title = "other" if platform.name == "other" else platform.title
        (row,) = [line for line in page.splitlines() if re.match(rf"\| {title} \| \d+ \|", line)]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        given = {"model": "s3://bucket/model", "platform": platform.name}
        _, values = stack_values(resolve(SERVE_FLAGS, given, environ={}), {}, (), FOLDER / "none")
        assert cells[1] == str(values.ping_while_starting)
        if platform.grace_s is not None:
            assert cells[2] == f"{platform.grace_s:g} s"
        assert cells[3] == f"{values.drain_grace:g} s"
        assert cells[4].startswith(f"{values.request_timeout:g} s")
    assert all(f"`{name}`" in page for name in PORT_VARIABLES)
