"""The layout that the README promises: small files, short functions, imports that go down only."""

from pathlib import Path

from scripts import house

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"generate": 600, "model": 350}


def test_the_house_is_in_order():
    report = house.survey(ROOT)
    assert set(report["modules"]) == set(house.FLOORS) and not report["circles"]
    assert report["lines"] < 4000
    for name, module in report["modules"].items():
        assert not module["up"], f"{name} imports upwards: {module['up']}"
        assert module["longest"] <= 60, f"{name}.{module['function']} has {module['longest']} lines"
        assert module["widest"] <= 100 and module["lines"] <= LIMITS.get(name, 700), name


def test_scripts_have_short_functions_too():
    import ast
    for path in (ROOT / "scripts").glob("*.py"):
        long = [f for f in house.functions(ast.parse(path.read_text())) if f[0] > 60]
        assert not long, f"{path.name}: {long}"


def test_a_circle_and_an_arrow_upwards_are_seen(tmp_path):
    (tmp_path / "checkpoint.py").write_text("import model\n")
    (tmp_path / "model.py").write_text('"""Doc."""\nimport checkpoint  # why\n\n\ndef f(x):\n    return x + 1\n')
    report = house.survey(tmp_path)
    assert report["circles"] == ["checkpoint", "model"] and report["modules"]["checkpoint"]["up"] == ["model"]
    assert report["modules"]["model"]["code_tokens"] == 2 + 6 + 4  # import; def f ( x ) :; return x + 1
    assert (report["modules"]["model"]["longest"], report["modules"]["model"]["function"]) == (2, "f")
