"""Prints pip constraints that pin each dependency in pyproject.toml, extras included, to its lower bound."""

import re
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:\[[^]]*\])?(?:>=(?P<bound>[\w.]+))?[^;]*(?P<marker>;.*)?")


def lowest_constraints(pyproject: str) -> list[str]:
    """Return one constraint per dependency.

    :param pyproject: Text of pyproject.toml. It is searched by pattern, since Python 3.10 cannot parse TOML.
    :raises ValueError: If a dependency has no lower bound.
    """
    tables = pyproject.partition("\ndependencies = ")[2].partition("\n[project.scripts]")[0]
    bounds: dict[str, str] = {}
    missing: set[str] = set()
    for text in re.findall(r'"([^"\n]+)"', re.sub(r"#.*", "", tables)):
        match = REQUIREMENT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no requirement that is understood here")
        name, bound, marker = match["name"], match["bound"], match["marker"] or ""
        if bound is not None:
            bounds.setdefault(name, f"{name}=={bound}{marker}")
        else:
            missing.add(name)
    missing -= {*bounds, "sb3_pg"}
    if missing:
        raise ValueError(f"no lower bound (>=) in pyproject.toml: {', '.join(sorted(missing))}")
    return sorted(bounds.values())


if __name__ == "__main__":
    print("\n".join(lowest_constraints(PYPROJECT.read_text(encoding="utf-8"))))
