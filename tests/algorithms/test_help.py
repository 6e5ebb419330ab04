"""Help: every argument stands in the signature and in the docstring, and static checkers know it."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from sb3_pg.algorithms import ALGORITHMS, OffPAC

CLASSES = list(ALGORITHMS.values())


def arguments_of(cls: Any) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(cls).parameters
    return {name: parameter for name, parameter in parameters.items() if not name.startswith("_")}


@pytest.mark.parametrize("cls", CLASSES)
def test_at_most_three_classes_of_ours_stand_in_the_mro(cls: Any) -> None:
    assert len([base for base in cls.__mro__ if base.__module__.startswith("sb3_pg.")]) <= 3


@pytest.mark.parametrize("cls", CLASSES)
def test_every_argument_has_a_name_a_type_and_a_text(cls: Any) -> None:
    doc = inspect.getdoc(cls) or ""
    documented = re.findall(r"^:param ([a-z]\w*): \S", doc, re.MULTILINE)
    arguments = arguments_of(cls)
    assert {"gamma", "seed", "device", "policy_kwargs"} <= arguments.keys()
    named = [name for name in arguments if arguments[name].kind is not inspect.Parameter.VAR_KEYWORD]
    assert documented == named
    assert all(arguments[name].annotation is not inspect.Parameter.empty for name in named)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_signature_tells_what_the_constructor_takes(cls: Any) -> None:
    """Names, defaults, and that no other name is taken."""
    model = cls("MlpPolicy", "CartPole-v1", device="cpu")
    kept_elsewhere = {"policy", "env", "device", "policy_kwargs", "stats_window_size"}
    kept_elsewhere |= {"rollout_buffer_class", "rollout_buffer_kwargs", "replay_buffer_class", "replay_buffer_kwargs"}
    kept_elsewhere |= {"train_freq", "use_rms_prop", "rms_prop_eps"}
    for name, parameter in arguments_of(cls).items():
        if name not in kept_elsewhere and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert getattr(model, name) == parameter.default, name
    with pytest.raises(TypeError, match="no argument 'gama'; did you mean 'gamma'"):
        cls("MlpPolicy", "CartPole-v1", gama=0.9)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_subclass_has_its_own_signature(cls: Any) -> None:
    class Mine(cls):  # type: ignore[misc]
        def __init__(self, policy: Any, env: Any, mine: int = 1, **kwargs: Any) -> None:
            self.mine = mine
            super().__init__(policy, env, **kwargs)

    assert list(inspect.signature(Mine).parameters) == ["policy", "env", "mine", "kwargs"]
    assert Mine("MlpPolicy", "CartPole-v1", mine=2, gamma=0.5, device="cpu").gamma == 0.5


@pytest.mark.parametrize("cls", CLASSES)
def test_keyword_types_and_tables_say_the_same(cls: Any) -> None:
    """Each argument of the tables is explicit or in the TypedDict of ``**kwargs``, and in no other place."""
    init = inspect.unwrap(cls.__init__)
    keyword = inspect.signature(init, follow_wrapped=False)
    typed: set[str] = set()
    if cls is not OffPAC:  # which lists all its arguments
        (annotation,) = get_args(init.__annotations__["kwargs"])
        typed = set(get_type_hints(annotation))
    always = {"policy", "env", "learning_rate"}
    names = {name for group in cls.groups for name in group.arguments if name not in refused(cls)} - always
    code = init.__code__
    explicit = set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    assert names == (explicit | typed) - always
    assert not explicit & typed
    assert "kwargs" not in keyword.parameters


def refused(cls: Any) -> set[str]:
    return {name for group in cls.groups for name in group.refused}


TYPOS = """
from sb3_pg import NPG, TRPO, ActorCritic, AsyncActorCritic, KLPenaltyPG, OffPAC, OffPolicyPG, Reinforce
{lines}
"""
WRONG = {
    "Reinforce": ["n_stps=5", 'baseline="valeu"', 'truncation="never"', "gamma='high'"],
    "ActorCritic": ["n_stps=5", 'advantage="gea"', 'critic_fit="soon"'],
    "AsyncActorCritic": ["n_stps=5", 'correction="v-trace"', "n_episodes=4"],
    "NPG": ["n_stps=5", 'step="fix"', 'on_nonfinite="ignore"'],
    "TRPO": ["n_stps=5", 'critic_target="lamda"'],
    "KLPenaltyPG": ["n_stps=5", 'dual_update="aditive"'],
    "OffPolicyPG": ["n_stps=5", 'ratio="per_stp"', 'baseline="valeu"'],
    "OffPAC": ["n_stps=5", 'actor_gradient="scores"'],
}
RIGHT = {
    "Reinforce": 'baseline="value", n_steps=5, gamma=0.9, seed=0',
    "ActorCritic": 'advantage="gae", n_episodes=4, n_steps=None, critic_fit="before"',
    "AsyncActorCritic": 'correction="none", max_policy_lag=3, use_rms_prop=False',
    "NPG": 'step="fixed", ent_coef=0.1',
    "TRPO": 'critic_target="lambda", cg_tolerance=0.1',
    "KLPenaltyPG": 'dual_update="additive", vf_coef=0.1',
    "OffPolicyPG": 'ratio="per_step", train_freq=(8, "episode")',
    "OffPAC": 'actor_gradient="score", tau=0.1',
}


@pytest.mark.slow
def test_mypy_catches_misspelled_names_and_words(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    wrong = [f'{name}("MlpPolicy", "CartPole-v1", {typo})' for name, typos in WRONG.items() for typo in typos]
    right = [f'{name}("MlpPolicy", "CartPole-v1", {fine})' for name, fine in RIGHT.items()]
    script = tmp_path / "script.py"
    script.write_text(TYPOS.format(lines="\n".join(wrong + right)))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(script)]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = {int(line) for line in re.findall(r"script\.py:(\d+): error", out)}
    lines = script.read_text().splitlines()
    assert [lines[n - 1] for n in sorted(found)] == wrong, out
