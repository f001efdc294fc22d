"""Dashboard and alerts name metrics that a running router exports, with labels it puts on them."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from kvrelay_protocol import errors
from kvrelay_router.metrics import RouterMetrics

ROOT = Path(__file__).parents[3]
FILES = ROOT / "infra" / "helm" / "kvrelay" / "files"
RULES = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((FILES / "dashboard.json").read_text())
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [target["expr"] for target in TARGETS]
SCRAPE_LABELS = {"instance", "job", "le"}


@pytest.fixture(scope="module")
def exported(router):
    """Names of series that /metrics can show."""
    with urllib.request.urlopen(f"http://127.0.0.1:{router.port}/metrics") as answer:
        text = answer.read().decode()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    ends = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    return {name + end for name, kind in kinds.items() for end in ends[kind]}


def labels_of_each_metric():
    """Label names by metric, histograms and counters under their family's name."""
    metrics = vars(RouterMetrics(CollectorRegistry()))
    plain = [
        m for m in [*metrics.values(), *metrics["_from_workers"].values()] if hasattr(m, "_name")
    ]
    return {m._name: set(getattr(m, "_labelnames", ())) for m in plain}


def test_every_metric_named_is_one_that_the_router_exports(exported):
    named = {name for e in EXPRESSIONS for name in re.findall(r"\bkvrelay_\w+", e)}
    assert len(named) > 20
    assert named - exported == set()


def test_the_dashboards_variable_is_filled_from_a_metric_that_exists(exported):
    (variable,) = DASHBOARD["templating"]["list"]
    metric = re.fullmatch(r"label_values\((\w+), instance\)", variable["query"]["query"])
    assert metric[1] in exported


def test_selectors_and_legends_name_labels_that_a_metric_has():
    known = labels_of_each_metric()
    for expression in EXPRESSIONS:
        for name, selector in re.findall(r"(kvrelay_\w+)\{([^}]*)\}", expression):
            family = re.sub(r"_(total|bucket|sum|count)$", "", name)
            used = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert used - SCRAPE_LABELS <= known[family], name
    for target in TARGETS:
        names = re.findall(r"kvrelay_\w+", target["expr"])
        families = [re.sub(r"_(total|bucket|sum|count)$", "", name) for name in names]
        grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
        used = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        used |= {label.strip() for group in grouped for label in group.split(",")}
        assert used - SCRAPE_LABELS <= set.union(*(known[f] for f in families)), target["expr"]


def test_codes_that_alerts_name_are_in_the_error_tree():
    codes = {
        cls.code for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.KvrelayError)
    }  # fmt: skip
    named = {
        code
        for rule in RULES
        for codes_named in re.findall(r'code(?:!=|=|!~|=~)"([^"]+)"', rule["expr"])
        for code in codes_named.split("|")
    }
    assert named
    assert named <= codes


def test_every_alert_has_a_case_in_which_it_fires():
    cases = yaml.safe_load((ROOT / "infra" / "observability" / "alerts_test.yaml").read_text())
    fired = {
        check["alertname"]
        for case in cases["tests"]
        for check in case["alert_rule_test"]
        if check.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in RULES}


def test_panels_do_not_overlap_and_have_numbers_of_their_own():
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    numbers = [p["id"] for p in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
