"""Checks of the house style: sizes, layers, requirements with reasons, citations, names."""

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "beagle_jax").rglob("*.py"))
ENTRY_POINTS = sorted(
    path
    for path in (ROOT / "beagle_jax").glob("*.py")
    if "def main(" in path.read_text(encoding="utf-8")
)


def too_long(root: Path) -> list[str]:
    """Lists files of more than 500 lines among those written by hand.

    Not the licence, data, weights, notebooks and results.
    """
    folders = (
        "beagle_jax",
        "benchmarks",
        "configs",
        "docs",
        "experiments",
        "launch",
        "notebooks",
        "tests",
    )
    written = [path for folder in folders for path in (root / folder).rglob("*")] + list(
        root.glob("*")
    )
    kinds = (".py", ".sh", ".sbatch", ".md", ".yaml", ".yml", ".toml", ".txt")
    return [
        str(path)
        for path in written
        if path.suffix in kinds and len(path.read_text(encoding="utf-8").splitlines()) > 500
    ]


def test_no_file_exceeds_500_lines():
    assert too_long(ROOT) == []


def test_a_file_that_does_is_seen(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("x = 1\n" * 501)
    assert too_long(tmp_path) == [str(tmp_path / "tests" / "test_x.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno + 1 > 60] == []


def test_layers_of_the_package_know_only_those_below():
    below = {
        "model": {"model"},
        "data": {"data", "model"},
        "weights": {"weights", "model"},
        "training": {"training", "data", "model"},
        "decoding": {"decoding", "data", "weights", "model"},
        "corpus": {"corpus", "decoding", "data", "weights", "model"},
        "evaluation": {"evaluation", "decoding", "data", "weights", "model"},
        "serving": {"serving", "decoding", "data", "weights", "model"},
        "commands": {
            "commands",
            "corpus",
            "evaluation",
            "serving",
            "training",
            "decoding",
            "data",
            "weights",
            "model",
        },
    }
    for path in (ROOT / "beagle_jax" / "config").glob("*.py"):
        used = set(
            re.findall(r"(?:from|import) beagle_jax\.(\w+)", path.read_text(encoding="utf-8"))
        )
        # remote.py imports errors.py alone: settings that are URLs are checked as they are read.
        assert used <= {"config", "errors", "remote", "terminal"}, f"{path} imports {used}"
    for folder, allowed in below.items():
        for path in (ROOT / "beagle_jax" / folder).glob("*.py"):
            used = (
                set(re.findall(r"from beagle_jax\.(\w+)[. ]", path.read_text(encoding="utf-8")))
                & below.keys()
            )
            assert used <= allowed, f"{path} imports {used - allowed}"


PRINTING = ("command.py", "errors.py", "terminal.py")  # what commands share
# Programs of their own: one that ships with exports, one that writes generated files.
APART = (
    "weights/modeling_beagle.py",
    "weights/modeling_decoding.py",
    "weights/modeling_eagle.py",
    "weights/modeling_sampling.py",
    "weights/modeling_tree.py",
    "config/schema.py",
)


def prints(text: str) -> list[int]:
    """Lines that print."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    names = ("print", "tqdm.write", "sys.stdout.write", "sys.stderr.write")
    return [node.lineno for node in calls if ast.unparse(node.func) in names]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_commands_and_entry_points_print(path):
    name = path.relative_to(ROOT / "beagle_jax").as_posix()
    if path in ENTRY_POINTS or name in PRINTING + APART or name.startswith("commands/"):
        return
    assert prints(path.read_text(encoding="utf-8")) == [], "log it, and terminal.py prints it"


def test_what_prints_is_seen():
    text = 'x = 1\nprint(x)\nif x:\n    tqdm.write("x")\n_log.info("print(x)")\n'
    assert prints(text) == [2, 4]


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.stem)
def test_entry_points_parse_call_and_print(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


def test_every_requirement_has_its_reason():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [
        line for line in lines if line and not line.startswith("#") and "  # " not in line
    ] == []


def test_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(
        r"(?<!/)(?:beagle_jax|configs|launch|benchmarks|drafts|tests)/[\w./-]+\w", text
    )
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def too_wide(root: Path) -> list[str]:
    """Lists comment lines over 100 columns in settings and scripts.

    Addresses cannot be cut and are free. configs/ and experiments/ are not checked.
    """
    kinds = (".yaml", ".yml", ".toml", ".sh", ".sbatch")
    paths = [
        path
        for folder in ("", ".ci", ".github/workflows", "launch", "tests")
        for path in (root / folder).glob("*")
        if path.suffix in kinds or path.name == "run"
    ]
    return [
        f"{path.relative_to(root)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 100 and line.lstrip().startswith("#") and "://" not in line
    ]


def test_comments_of_settings_and_scripts_are_at_most_100_columns_wide():
    assert too_wide(ROOT) == []


def test_a_line_that_is_wider_is_seen(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "x.yaml").write_text(f"# {'a' * 98}\n# {'a' * 99}\n")
    assert too_wide(tmp_path) == ["launch/x.yaml:2"]


def check_matrix(requirement: str, jobs: list[dict[str, str]]) -> None:
    """Checks the jobs' versions of jax against the requirement.

    The first job has the oldest minor version that it allows, the last job the newest, and no job
    one that it does not allow.
    """
    bounds = {part.operator: Version(part.version) for part in Requirement(requirement).specifier}
    pins = [
        {part.operator: Version(part.version) for part in Requirement(job["jax"]).specifier}
        for job in jobs
    ]
    assert pins[0][">="] == bounds[">="] and pins[-1]["<"] == bounds["<"]
    assert all(pin["<"].release == (0, pin[">="].release[1] + 1) for pin in pins)
    assert [job["python"] for job in jobs] == ["3.11", "3.13"]


def matrix() -> tuple[str, list[dict[str, str]]]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    [jax] = [line.partition("#")[0].strip() for line in lines if line.startswith("jax>=")]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    return jax, workflow["jobs"]["run"]["strategy"]["matrix"]["include"]


def test_the_workflow_runs_the_oldest_and_the_newest_jax():
    check_matrix(*matrix())


@pytest.mark.parametrize("wrong", ["jax>=0.9,<0.13", "jax>=0.10,<0.14"])
def test_a_workflow_that_lags_behind_the_requirement_is_seen(wrong):
    with pytest.raises(AssertionError):
        check_matrix(wrong, matrix()[1])


CITED = re.compile(r"method\.md (\d+(?:\.\d+[a-z]?)?(?:, \d+\.\d+[a-z]?)*)")
# Notes of the developers that no user has.
ELSEWHERE = re.compile(r"\b(?:product|layout|joints|house_style|quickstart_target)\.md|jax_notes")


def sections(method: str) -> set[str]:
    """Returns the numbers of docs/method.md's headings and of the points of its two lists."""
    numbers = set(re.findall(r"^#+ (\d+(?:\.\d+[a-z]?)?)[. ]", method, re.M))
    for part in re.split(r"^## ", method, flags=re.M)[1:]:
        chapter = part.partition(".")[0]
        points = len(re.findall(r"^\d+\. ", part.partition("\n")[2], re.M))
        numbers |= {f"{chapter}.{point}" for point in range(1, points + 1)}
    return numbers


def dangling(text: str, known: set[str]) -> list[str]:
    """Lists citations that lead to no section of docs/method.md, or out of the repository."""
    flat = re.sub(r"\s+(?:# )?", " ", text)
    cited = [number for match in CITED.findall(flat) for number in match.split(", ")]
    return [number for number in cited if number not in known] + ELSEWHERE.findall(flat)


def test_what_docstrings_cite_is_in_the_repository():
    known = sections((ROOT / "docs" / "method.md").read_text(encoding="utf-8"))
    folders = ("beagle_jax", "benchmarks", "experiments", "tests", "configs")
    kinds = (".py", ".yaml")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds
    ]
    wrong_of = {
        str(path.relative_to(ROOT)): wrong
        for path in files
        if path.name != "test_house.py" and "frozen" not in path.parts
        if (wrong := dangling(path.read_text(encoding="utf-8"), known))
    }
    assert wrong_of == {}


def test_a_citation_that_leads_nowhere_is_seen():
    known = sections("# M\n\n## 1. A\n\n### 1.2 B\n\n## 13. C\n\n1. x\n1. y\n")
    assert known == {"1", "1.2", "13", "13.1", "13.2"}, known
    assert dangling("see method.md 1.2,\n    # 13.2 and method.md 1", known) == []
    assert dangling("method.md 13.3; method.md 2; product.md", known) == ["13.3", "2", "product.md"]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def switched_off(mypy: dict) -> list[str]:
    """What mypy's settings leave unchecked: error codes, and modules whose errors are ignored."""
    sections = [mypy, *mypy.get("overrides", [])]
    codes = [code for section in sections for code in section.get("disable_error_code", [])]
    return codes + [
        str(section.get("module")) for section in sections if "ignore_errors" in section
    ]


def test_mypy_checks_everything():
    mypy = project()["mypy"]
    assert switched_off(mypy) == []
    assert mypy["disallow_untyped_defs"] and mypy["disallow_incomplete_defs"]


def test_a_code_that_is_switched_off_is_seen():
    override = {"module": "beagle_jax.x", "disable_error_code": ["index"]}
    assert switched_off({"overrides": [override]}) == ["index"]
    assert switched_off({"overrides": [{"module": "x", "ignore_errors": True}]}) == ["x"]


def not_shipped(package_data: dict[str, list[str]]) -> list[str]:
    """Files of the package that are neither Python nor package data, by the setuptools settings."""
    shipped = {
        path
        for package, patterns in package_data.items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    files = [path for path in (ROOT / "beagle_jax").rglob("*") if path.is_file()]
    return [
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix not in (".py", ".pyc") and path not in shipped
    ]


def test_a_built_package_has_every_file():
    package_data = project()["setuptools"]["package-data"]
    assert not_shipped(package_data) == []
    assert (ROOT / "beagle_jax" / "py.typed").exists()


def test_a_file_that_a_built_package_lacks_is_seen():
    package_data = project()["setuptools"]["package-data"]
    assert not_shipped(package_data | {"beagle_jax": []}) == ["beagle_jax/py.typed"]


# They say that something was found, asked for or read, and not what it is.
EMPTY_NAMES = frozenset(["one", "told", "found", "asked", "read", "kept", "picked", "here"])
VERBS = frozenset({"read"})  # a function may be called that: it reads


def bound_names(tree: ast.AST) -> list[tuple[int, str]]:
    """Lists (line, name) of everything that a file binds.

    Variables of every kind, parameters, assigned attributes, functions and classes.
    """
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.attr))
        elif isinstance(node, ast.arg):
            names.append((node.lineno, node.arg))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name not in VERBS:
                names.append((node.lineno, node.name))
        elif isinstance(node, ast.alias):
            names.append((node.lineno, node.asname or ""))
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar):
            names.append((node.lineno, node.name or ""))
    return names


def empty_names(source: str) -> list[str]:
    """Lists bound names that the house forbids, as "line: name"."""
    names = sorted(set(bound_names(ast.parse(source))))
    return [f"{line}: {name}" for line, name in names if name in EMPTY_NAMES]


def code_of(path: Path) -> str:
    """Returns a Python file's text, or the code cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return "\n".join("".join(cell["source"]) for cell in cells)


def test_names_say_what_they_hold():
    folders = ("beagle_jax", "benchmarks", "experiments", "notebooks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files += (ROOT / "notebooks").glob("*.ipynb")
    wrong = {str(path.relative_to(ROOT)): empty_names(code_of(path)) for path in sorted(files)}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "found = 1",
        "a, (b, *kept) = x",
        "found: int",
        "found += 1",
        "self.asked = 1",
        "for one in x: pass",
        "[one for one in x]",
        "{k: 1 for k, one in x}",
        "(told := x)",
        "lambda read: 0",
        "def f(a, *, told=1): pass",
        "def f(*picked): pass",
        "def asked(): pass",
        "class found: pass",
        "with x as here: pass",
        "import x as found",
        "from x import y as here",
        "try: pass\nexcept E as told: pass",
        "match x:\n case [one, *_]: pass",
        "match x:\n case [_, *kept]: pass",
    ],
)
def test_a_name_that_says_nothing_is_seen(line):
    assert len(empty_names(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["def read(x): pass", "found_names = 1", "f(found=1)", "x.kept", "x['one']", "print(one)"],
)
def test_other_uses_of_these_words_are_free(line):
    assert empty_names(line) == []
