"""README, guides and examples: what they show runs, and what they name exists."""

import csv
import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stable_baselines3.common.logger import Logger

import sb3_pg
from sb3_pg import GradientDiagnosticsCallback
from sb3_pg.zoo import ALGORITHMS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts]


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.encode()) <= 9000


@pytest.mark.slow
def test_blocks_of_the_readme_run_when_pasted(tmp_path: Path) -> None:
    """One after the other, in one folder, as a reader pastes them."""
    blocks = python_blocks(README)
    assert len(blocks) >= 2
    for block in blocks:
        run(block.replace("50_000", "2_000"), tmp_path)
    assert (tmp_path / "cartpole.zip").is_file()


#: Page -> what stands in for the command line that its block reads.
COMMAND_LINES = {"rl_zoo3": "--algo reinforce --env CartPole-v1 -n 200 --eval-freq -1"}
#: Export takes packages that need not be there; tests/test_onnx_export.py does the same.
NEEDS = {"demonstrations": ("minari",), "onnx": ("onnx", "onnxruntime", "onnxscript"), "many_cores": ("ray",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", sorted(path for path in PAGES if python_blocks(path.read_text())), ids=lambda p: p.stem
)
def test_blocks_of_a_page_run_when_pasted(page: Path, tmp_path: Path) -> None:
    """All of them in one session, in their order."""
    for package in NEEDS.get(page.stem, ()):
        pytest.importorskip(package)
    code = "\n".join(python_blocks(page.read_text()))
    code = re.sub(r"\.learn\(\d\d+_000", ".learn(2_000", code).replace("range(100)", "range(3)")
    arguments = ["script", *COMMAND_LINES.get(page.stem, "").split()]
    run(f"import sys\nsys.argv = {arguments}\n{code}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path, tmp_path: Path) -> None:
    code = re.sub(r"\.learn\(\d[\d_]*", ".learn(5_000", example.read_text())
    run(code, tmp_path)


def modules_with_examples() -> Iterator[str]:
    for module in pkgutil.walk_packages(sb3_pg.__path__, "sb3_pg."):
        spec = importlib.util.find_spec(module.name)
        if module.name != "sb3_pg.__main__" and spec and spec.origin and ">>> " in Path(spec.origin).read_text():
            yield module.name


@pytest.mark.parametrize("name", list(modules_with_examples()))
def test_examples_of_docstrings_give_what_they_show(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0


def test_links_of_the_readme_and_the_project_files_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert (ROOT / link).exists(), f"{name}: {link}"


def test_every_algorithm_has_a_page_and_a_row() -> None:
    for name, cls in ALGORITHMS.items():
        assert (ROOT / "docs" / "algorithms" / "texts" / f"{name}.md").is_file()
        assert f"| [`{cls.__name__}`](docs/algorithms/texts/{name}.md)" in README


#: Runs that together log every name, besides one run of each algorithm with its defaults.
LOGGING_RUNS: list[tuple[str, dict[str, Any]]] = [
    *((name, {"n_steps": 64} if name in ("npg", "trpo", "kl_penalty_pg") else {}) for name in ALGORITHMS),
    *((name, {"critic_learning_rate": 1e-3}) for name in ("actor_critic", "async_actor_critic", "npg")),
    ("trpo", {"n_steps": 64, "target_kl": 1e-9, "line_search_max_iter": 1, "critic_learning_rate": 1e-3}),
    *(
        (name, {"objective": "average", "n_steps": 64})
        for name in ("actor_critic", "async_actor_critic", "npg", "trpo", "kl_penalty_pg")
    ),
    ("off_policy_pg", {"max_ratio": 1.5, "min_ess": 1.0}),
    ("off_pac", {"actor_gradient": "importance", "critic_learning_rate": 1e-3}),
]
#: Names that a run logs only after a number that is not finite.
AFTER_NONFINITE = {"train/n_skipped", "train/rejected_kl", "train/rejected_gain"}
#: Names that a run logs only where actors collect while the learner learns, see ``test_async_actor_critic.py``.
WITH_ACTORS = {
    *("rollout/policy_lag_mean", "rollout/policy_lag_max", "rollout/fragments_dropped", "rollout/actor_restarts"),
    *("time/learner_wait_seconds", "time/actor_wait_seconds", "time/fragments_per_second"),
}
#: Names that a run logs only with ``anchor``, see ``tests/demonstrations/test_anchors.py``.
WITH_ANCHOR = {"anchor/kl", "anchor/nll", "anchor/coef"}


class NamesLogger(Logger):
    """Keeps the names of what is logged."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(None, [])
        self.names = names

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        self.names.add(key)
        super().record(key, value, exclude)


def documented_names(algorithm: str) -> set[str]:
    with (ROOT / "docs" / "logged_names.csv").open() as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    return {row["name"] for row in rows if row["algorithms"] == "all" or algorithm in row["algorithms"].split()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_algorithm_logs_the_names_that_the_documentation_has(algorithm: str) -> None:
    logged: set[str] = set()
    on_policy = algorithm not in ("off_policy_pg", "off_pac")
    callback = GradientDiagnosticsCallback(every=2) if on_policy else None
    for name, arguments in LOGGING_RUNS:
        for env in ("CartPole-v1", "Pendulum-v1") if name == algorithm else ():
            cls: Any = ALGORITHMS[algorithm]
            model = cls("MlpPolicy", env, device="cpu", seed=0, **arguments)
            model.set_logger(NamesLogger(logged))
            model.learn(1700 if algorithm in ("reinforce", "off_policy_pg") else 300, callback, log_interval=1)
    ours = {name for name in logged if name.startswith(("train/", "diagnostics/"))}
    assert ours - documented_names(algorithm) == set()
    assert documented_names(algorithm) - logged <= AFTER_NONFINITE | WITH_ACTORS | WITH_ANCHOR


def test_names_of_the_package_in_the_documentation_exist() -> None:
    """``{py:func}`sb3_pg.functional.gae``` and the like: Sphinx does not complain of a missing one."""
    for page in [*PAGES, *(ROOT / "sb3_pg").rglob("*.py")]:
        for role in re.findall(r"(?:py:\w+\}|:(?:class|func|mod|data|meth|exc):)`~?(sb3_pg[\w.]+)`", page.read_text()):
            parts = role.split(".")
            target: object = None
            for n in range(len(parts), 0, -1):
                try:
                    target = importlib.import_module(".".join(parts[:n]))
                except ModuleNotFoundError:
                    continue
                for part in parts[n:]:
                    target = getattr(target, part)
                break
            assert target is not None, f"{page}: {role}"


def test_tests_that_the_course_names_exist() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        if "_build" not in page.parts:
            for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)`", page.read_text()):
                assert (ROOT / path).exists(), f"{page}: {path}"
