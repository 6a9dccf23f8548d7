"""The layout that the README promises: small files, short functions, imports that go down only."""

import ast
from pathlib import Path

from scripts import house

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"generate": 600, "model": 350}


def test_the_house_is_in_order():
    report = house.survey(ROOT)
    assert set(report["modules"]) == set(house.FLOORS) and not report["circles"]
    assert report["lines"] < 4450  # what is added must first find something that can go
    for name, module in report["modules"].items():
        assert not module["up"], f"{name} imports upwards: {module['up']}"
        assert module["longest"] <= 60, f"{name}.{module['function']} has {module['longest']} lines"
        assert module["widest"] <= 100 and module["lines"] <= LIMITS.get(name, 720), name


def test_scripts_have_short_functions_too():
    for path in (ROOT / "scripts").glob("*.py"):
        long = [f for f in house.functions(ast.parse(path.read_text())) if f[0] > 60]
        assert not long, f"{path.name}: {long}"


def test_a_circle_and_an_arrow_upwards_are_seen(tmp_path):
    source = '"""Doc."""\nimport checkpoint  # why\n\n\ndef f(x):\n    return x + 1\n'
    (tmp_path / "checkpoint.py").write_text("import model\n")
    (tmp_path / "model.py").write_text(source)
    report = house.survey(tmp_path)
    model, checkpoint = report["modules"]["model"], report["modules"]["checkpoint"]
    assert report["circles"] == ["checkpoint", "model"] and checkpoint["up"] == ["model"]
    assert model["code_tokens"] == 2 + 6 + 4  # import checkpoint; def f ( x ) :; return x + 1
    assert (model["longest"], model["function"]) == (2, "f")
