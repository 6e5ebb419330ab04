"""Demonstrations keep the arrays that they were given, cut them into episodes, and refuse what does not fit."""

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from sb3_pg import DemonstrationLoss, Demonstrations, NonFiniteError, OffPolicyPG, Reinforce
from sb3_pg.errors import DamagedFileError
from tests.helpers import ACTION_SPACES, OBSERVATION_SPACES, ScriptedEnv

LENGTHS = (3, 1, 4)
N_STEPS = sum(LENGTHS)


def arrays(
    observation_space: spaces.Space[Any] = OBSERVATION_SPACES["vector"],
    action_space: spaces.Space[Any] = ACTION_SPACES["discrete"],
) -> dict[str, Any]:
    """Three episodes of 3, 1 and 4 steps, with rewards 0, 1, 2, ...; the second is truncated."""
    observation_space, action_space = copy.deepcopy((observation_space, action_space))
    observation_space.seed(0)
    action_space.seed(0)
    terminated, truncated = np.zeros(N_STEPS, bool), np.zeros(N_STEPS, bool)
    terminated[[2, 7]] = truncated[3] = True

    def rows(space: spaces.Space[Any], n: int) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: rows(part, n) for key, part in space.spaces.items()}
        return np.stack([space.sample() for _ in range(n)])

    return {
        "observations": rows(observation_space, N_STEPS),
        "actions": rows(action_space, N_STEPS),
        "rewards": np.arange(N_STEPS, dtype=np.float32),
        "terminated": terminated,
        "truncated": truncated,
        "final_observations": rows(observation_space, len(LENGTHS)),
    }


def changed(name: str, value: Any) -> dict[str, Any]:
    return {**arrays(), name: value}


def with_number(name: str, index: Any, value: float) -> dict[str, Any]:
    """The arrays with one other number."""
    array = np.array(arrays()[name])
    array[index] = value
    return changed(name, array)


def equal(one: Any, other: Any) -> bool:
    """Whether two sets of observations, or arrays, have the same numbers of the same type."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return bool(one.dtype == other.dtype and np.array_equal(one, other))


def require_same(one: Demonstrations, other: Demonstrations) -> None:
    for name in arrays():
        assert equal(getattr(one, name), getattr(other, name)), name


def test_episodes_and_returns() -> None:
    demos = Demonstrations.from_arrays(**arrays())
    assert (demos.n_steps, demos.n_episodes, len(demos)) == (8, 3, 8)
    assert demos.episodes == [slice(0, 3), slice(3, 4), slice(4, 8)]
    assert demos.returns is not None
    assert demos.returns.tolist() == [3, 3, 22]


def test_without_flags_all_is_one_truncated_episode() -> None:
    demos = Demonstrations.from_arrays([[0.0], [1.0]], [0, 1])
    assert demos.episodes == [slice(0, 2)]
    assert demos.truncated.tolist() == [False, True]
    assert not demos.terminated.any()
    assert demos.rewards is demos.returns is demos.final_observations is None


def test_an_unfinished_last_episode_is_truncated_and_the_given_flags_stay() -> None:
    terminated = np.array([0.0, 1.0, 0.0, 0.0])
    truncated = np.zeros(4, bool)
    demos = Demonstrations(np.zeros((4, 1)), [0, 0, 0, 0], terminated=terminated, truncated=truncated)
    assert demos.terminated.tolist() == [False, True, False, False]
    assert demos.truncated.tolist() == [False, False, False, True]
    assert not truncated.any()


def test_termination_wins() -> None:
    demos = Demonstrations(np.zeros((2, 1)), [0, 0], terminated=[True, True], truncated=[True, False])
    assert demos.terminated.all()
    assert not demos.truncated.any()


def test_rewards_are_floating() -> None:
    demos = Demonstrations(np.zeros((2, 1)), [0, 0], [1, 2])
    assert demos.rewards is not None
    assert demos.rewards.dtype == np.float64


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed("observations", np.zeros((7, 3))), r"observations must have 8 rows, one for each step .*, got 7"),
        (changed("observations", {}), "observations must have at least one key"),
        (changed("observations", {"a": np.zeros(8), "b": np.zeros(9)}), r"observations\['b'\] must have 8 rows"),
        (changed("observations", 1.0), "observations must have a row per step, got the single number 1.0"),
        (changed("observations", [[1.0], [1.0, 2.0]]), "observations must be one array with a row per step"),
        (changed("actions", []), "actions must have at least one step"),
        (changed("rewards", np.zeros(9)), r"rewards must have 8 rows, .*, got 9"),
        (changed("rewards", np.zeros((8, 1))), r"rewards must have one number per step, got shape \(8, 1\)"),
        (with_number("terminated", 1, 1) | {"truncated": np.full(8, 2)}, "truncated must be .* got 2 at step 0"),
        (changed("terminated", np.zeros(3, bool)), "terminated must have 8 rows"),
        (changed("final_observations", np.zeros((2, 3))), "final_observations must have 3 rows, one for each episode"),
        (changed("final_observations", np.zeros((3, 2))), r"must have shape \(3,\) an episode, got \(2,\)"),
        (changed("final_observations", {"a": np.zeros(3)}), "final_observations must be .*, as observations are"),
    ],
)
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Demonstrations.from_arrays(**given)


@pytest.mark.parametrize("bad", [np.array(["a"] * 8), np.array([None] * 8), np.zeros(8, complex)])
@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminated"])
def test_what_is_no_number_is_refused(name: str, bad: np.ndarray) -> None:
    with pytest.raises(TypeError, match=f"{name} must hold numbers, got {bad.dtype}"):
        Demonstrations.from_arrays(**changed(name, bad))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "index", "row"),
    [
        ("observations", (5, 1), "step 5"),
        ("rewards", 2, "step 2"),
        ("final_observations", (1, 0), "episode 1"),
    ],
)
def test_first_nonfinite_number_is_named(
    name: str, index: Any, row: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sb3_pg.demonstrations.checks.CHUNK", 6)  # two rows of observations at a time
    with pytest.raises(NonFiniteError, match=f"{name} at {row} of the demonstrations is {value}"):
        Demonstrations.from_arrays(**with_number(name, index, value))


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("space", OBSERVATION_SPACES)
def test_saved_and_loaded(space: str, mmap: bool, tmp_path: Path) -> None:
    demos = Demonstrations.from_arrays(**arrays(OBSERVATION_SPACES[space], ACTION_SPACES["box"]))
    demos.save(tmp_path / "demos")
    assert [path.name for path in tmp_path.iterdir()] == ["demos.npz"]
    require_same(Demonstrations.load(tmp_path / "demos.npz", mmap), demos)
    require_same(Demonstrations.from_arrays(str(tmp_path / "demos")), demos)


def test_unknown_arrays_stay_unknown(tmp_path: Path) -> None:
    Demonstrations(np.zeros((2, 1)), [0, 1]).save(tmp_path / "demos.npz")
    demos = Demonstrations.load(tmp_path / "demos.npz")
    assert demos.rewards is demos.final_observations is None


def test_mapped_arrays_stay_on_the_disk_and_are_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "demos.npz"
    Demonstrations.from_arrays(**arrays(OBSERVATION_SPACES["image"])).save(path)
    demos = Demonstrations.load(path, mmap=True)
    assert isinstance(demos.observations, np.ndarray)
    assert isinstance(demos.observations.base, np.memmap)
    assert isinstance(demos.subset(2).observations, np.ndarray)
    assert np.shares_memory(demos.subset(2).observations, demos.observations)
    with pytest.raises(ValueError, match="read-only"):
        demos.observations[0] = 0


def test_mapped_file_can_be_overwritten_by_its_own_arrays(tmp_path: Path) -> None:
    path = tmp_path / "demos.npz"
    before = Demonstrations.from_arrays(**arrays())
    before.save(path)
    demos = Demonstrations.load(path, mmap=True)
    demos.subset(2).save(path)
    require_same(demos, before)
    require_same(Demonstrations.load(path), before.subset(2))


def test_numpy_reads_what_was_saved(tmp_path: Path) -> None:
    demos = Demonstrations.from_arrays(**arrays(OBSERVATION_SPACES["dict"]))
    demos.save(tmp_path / "demos.npz")
    with np.load(tmp_path / "demos.npz") as file:
        assert equal(file["observations/vec"], demos.observations["vec"])
        assert equal(file["rewards"], demos.rewards)


def d4rl(**more: Any) -> dict[str, np.ndarray]:
    """The arrays under D4RL's names."""
    given = arrays()
    following = np.concatenate((given["observations"][1:], given["observations"][:1]))
    following[[2, 3, 7]] = given["final_observations"]
    names = {"terminals": given["terminated"], "timeouts": given["truncated"], "next_observations": following}
    return {name: given[name] for name in ("observations", "actions", "rewards")} | names | more


def save_arrays(path: Path, save: Any = np.savez, **more: Any) -> None:
    """Save the arrays under D4RL's names."""
    save(path, **d4rl(**more))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_with_the_names_of_d4rl(save: Any, tmp_path: Path) -> None:
    others = {"infos/qpos": np.zeros((8, 2)), "metadata/algorithm": np.array({"any": "object"}, dtype=object)}
    save_arrays(tmp_path / "medium.npz", save, **others)
    demos = Demonstrations.from_arrays(tmp_path / "medium.npz")
    require_same(demos, Demonstrations.from_arrays(**arrays()))


def test_hdf5_with_the_names_of_d4rl(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "medium.hdf5", "w") as file:
        for name, array in d4rl(**{"infos/qpos": np.zeros((8, 2))}).items():
            file[name] = array
        file["metadata/algorithm"] = "sac"
    require_same(Demonstrations.load(tmp_path / "medium.hdf5"), Demonstrations.from_arrays(**arrays()))
    with pytest.raises(ValueError, match="mmap must be False for HDF5"):
        Demonstrations.load(tmp_path / "medium.hdf5", mmap=True)
    (tmp_path / "damaged.hdf5").write_bytes((tmp_path / "medium.hdf5").read_bytes()[:100])
    with pytest.raises(DamagedFileError, match=r"damaged\.hdf5 cannot be read"):
        Demonstrations.load(tmp_path / "damaged.hdf5")


def test_refused_files(tmp_path: Path) -> None:
    path = tmp_path / "demos.npz"
    with pytest.raises(FileNotFoundError, match=r"demos\.npz"):
        Demonstrations.load(tmp_path / "demos")
    np.savez(path, obs=np.zeros(3), actions=np.zeros(3))
    with pytest.raises(ValueError, match=r"demos\.npz must have an array 'observations', got actions"):
        Demonstrations.load(path)
    save_arrays(path, actions=np.array([{}] * 8))
    for mmap in (False, True):
        with pytest.raises(DamagedFileError, match=r"demos\.npz cannot be read: .*(O|o)bject"):
            Demonstrations.load(path, mmap)
    save_arrays(path, np.savez_compressed)
    with pytest.raises(ValueError, match=r"mmap must be False for a compressed file such as .*demos\.npz, got True"):
        Demonstrations.load(path, mmap=True)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match=r"demos\.npz cannot be read"):
        Demonstrations.load(path)
    with pytest.raises(ValueError, match=r"rewards must be left out, since .* is a file with all arrays"):
        Demonstrations.from_arrays(path, rewards=np.zeros(3))


def test_subset() -> None:
    demos = Demonstrations.from_arrays(**arrays()).subset(2)
    expected = arrays()
    assert demos.episodes == [slice(0, 3), slice(3, 4)]
    assert demos.returns is not None
    assert demos.returns.tolist() == [3, 3]
    for name, n in (("observations", 4), ("actions", 4), ("rewards", 4), ("final_observations", 2)):
        assert equal(getattr(demos, name), expected[name][:n])


@pytest.mark.parametrize("n", [0, 4])
def test_subset_of_more_or_less_than_all(n: int) -> None:
    with pytest.raises(ValueError, match=rf"n_episodes must be in \[1, 3\], got {n}"):
        Demonstrations.from_arrays(**arrays()).subset(n)


@pytest.mark.parametrize("space", ["vector", "dict"])
@pytest.mark.parametrize("seed", range(4))
def test_split_is_of_whole_episodes(seed: int, space: str) -> None:
    demos = Demonstrations.from_arrays(**arrays(OBSERVATION_SPACES[space]))
    train, held_out = demos.split(0.1, seed)
    assert held_out is not None
    assert (train.n_episodes, held_out.n_episodes) == (2, 1)
    steps = demos.held_out_steps(0.1, seed)
    for part, rows in zip((train, held_out), steps, strict=True):
        first = part.observations["vec"] if isinstance(part.observations, dict) else part.observations
        all_rows = demos.observations["vec"] if isinstance(demos.observations, dict) else demos.observations
        assert equal(first, all_rows[rows])
        assert equal(part.actions, demos.actions[rows])
        assert sorted(s.stop - s.start for s in part.episodes) == sorted(
            s.stop - s.start for s in demos.episodes if s.start in rows
        )
    assert sorted(np.concatenate(steps)) == list(range(8))


def test_splits_differ_with_the_seed_and_not_without() -> None:
    demos = Demonstrations.from_arrays(**arrays())
    held_out = [tuple(demos.held_out_steps(0.3, seed)[1]) for seed in range(10)]
    assert held_out == [tuple(demos.held_out_steps(0.3, seed)[1]) for seed in range(10)]
    assert len(set(held_out)) == 3


def test_split_that_leaves_nothing_to_hold_out() -> None:
    demos = Demonstrations.from_arrays(**arrays())
    assert demos.split(0.0) == (demos, None)
    assert demos.subset(1).split(0.5)[1] is None
    assert demos.split(0.99, 0)[0].n_episodes == 1
    for bad in (1.0, -0.1, "a"):
        with pytest.raises(ValueError, match=r"validation must be in \[0, 1\), got"):
            demos.split(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("observed", OBSERVATION_SPACES)
@pytest.mark.parametrize("acted", ACTION_SPACES)
def test_what_a_space_samples_fits_it(observed: str, acted: str, recwarn: pytest.WarningsRecorder) -> None:
    demos = Demonstrations.from_arrays(**arrays(OBSERVATION_SPACES[observed], ACTION_SPACES[acted]))
    demos.check_spaces(OBSERVATION_SPACES[observed], ACTION_SPACES[acted])
    demos.check_spaces(OBSERVATION_SPACES[observed], ACTION_SPACES[acted], squashed=True)
    assert not recwarn.list


def test_images_fit_in_both_layouts() -> None:
    observations = np.zeros((2, 36, 40, 3), np.uint8)
    demos = Demonstrations({"a": observations, "b": np.zeros((2, 1))}, [0, 1])
    for shape in ((36, 40, 3), (3, 36, 40)):
        space = spaces.Dict({"a": spaces.Box(0, 255, shape, np.uint8), "b": spaces.Box(-1, 1, (1,))})
        demos.check_spaces(space, spaces.Discrete(2))
    space = spaces.Dict({"a": spaces.Box(0, 255, (40, 36, 3), np.uint8), "b": spaces.Box(-1, 1, (1,))})
    with pytest.raises(ValueError, match=r"observations\['a'\] must have shape \(40, 36, 3\) a row"):
        demos.check_spaces(space, spaces.Discrete(2))


IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


@pytest.mark.parametrize(
    ("observations", "space", "message"),
    [
        (np.zeros((2, 3)), spaces.Box(-1, 1, (4,)), r"observations must have shape \(4,\) a row, .*, got \(3,\)"),
        (np.zeros((2, 36, 36, 1), np.float32), IMAGE, "observations must be integers, .*, got float32"),
        (np.full((2, 36, 36, 1), 256), IMAGE, r"observations must be in \[0, 255\], got 256 at step 0"),
        (np.array([0, 5]), spaces.Discrete(5), r"observations must be in \[0, 4\], got 5 at step 1"),
        (
            np.array([[0, 0], [3, 0]]),
            spaces.MultiDiscrete([3, 4]),
            r"observations must be in \[0, 2\], got 3 at step 1",
        ),
        (np.array([[0], [2]]), spaces.MultiBinary(1), r"observations must be in \[0, 1\], got 2 at step 1"),
        (
            np.zeros((2, 1)),
            OBSERVATION_SPACES["dict"],
            "must be a dict with the keys .* of the model's .*, got no dict",
        ),
        ({"vec": np.zeros((2, 2))}, OBSERVATION_SPACES["dict"], r"got the keys \['vec'\]"),
        ({"vec": np.zeros((2, 3))}, spaces.Box(-1, 1, (3,)), "must be an array, .*, got a dict with the keys"),
        (np.zeros((2, 3)), spaces.Text(3), "spaces must be .* or Dict, got Text"),
    ],
)
def test_observations_that_do_not_fit(observations: Any, space: spaces.Space[Any], message: str) -> None:
    demos = Demonstrations(observations, [0, 1])
    with pytest.raises(ValueError, match=message):
        demos.check_spaces(space, spaces.Discrete(2))


def test_observations_outside_of_their_bounds_are_a_warning() -> None:
    demos = Demonstrations(np.array([[0.0], [2.0]]), [0, 1], final_observations=[[0.0]])
    with pytest.warns(UserWarning, match=r"observations should be in \[-1.0, 1.0\], the bounds .*, got 2.0 at step 1"):
        demos.check_spaces(spaces.Box(-1, 1, (1,)), spaces.Discrete(2))


@pytest.mark.parametrize(
    ("actions", "space", "message"),
    [
        (np.array([0, 2]), spaces.Discrete(2), r"actions must be in \[0, 1\], got 2 at step 1"),
        (np.array([2, 0]), spaces.Discrete(2, start=1), r"actions must be in \[1, 2\], got 0 at step 1"),
        (np.array([0.0, 1.0]), spaces.Discrete(2), "actions must be integers, .*, got float64"),
        (np.array([[0], [1]]), spaces.Discrete(2), r"actions must have shape \(\) a row, .*, got \(1,\)"),
        (np.zeros((2, 1)), spaces.Box(-1, 1, (2,)), r"actions must have shape \(2,\) a row, .*, got \(1,\)"),
        (np.zeros((2, 1)), spaces.Box(0, 9, (1,), np.int64), "actions must be integers, .*, got float64"),
        (np.array([[0, 3], [0, 0]]), spaces.MultiDiscrete([2, 3]), r"actions must be in \[0, 2\], got 3 at step 0"),
    ],
)
def test_actions_that_do_not_fit(actions: np.ndarray, space: spaces.Space[Any], message: str) -> None:
    demos = Demonstrations(np.zeros((2, 1)), actions)
    with pytest.raises(ValueError, match=message):
        demos.check_spaces(spaces.Box(-1, 1, (1,)), space)


BOX = ACTION_SPACES["box"]
OUTSIDE = np.array([[0.0, -3.0], [1.0, 1.0], [0.5, -3.5], [-2.0, 0.0]], np.float32)


def test_actions_outside_of_a_box_are_kept_for_a_gaussian_policy() -> None:
    demos = Demonstrations(np.zeros((4, 3), np.float32), OUTSIDE)
    with pytest.warns(
        UserWarning,
        match=r"actions of 2 of 4 steps are outside .* \[-3.0, 1.0\], got -3.5 at step 2\. They are learned",
    ):
        demos.check_spaces(OBSERVATION_SPACES["vector"], BOX)
    model = Reinforce("MlpPolicy", ScriptedEnv(action_space=BOX))
    assert np.array_equal(demos.actions_for(model.policy), OUTSIDE)


def test_actions_outside_of_a_box_are_refused_for_a_squashed_policy() -> None:
    demos = Demonstrations(np.zeros((4, 3), np.float32), OUTSIDE)
    with pytest.raises(
        ValueError, match=r"actions must be in \[-3.0, 1.0\], since the policy squashes.*, got -3.5 at step 2"
    ):
        demos.check_spaces(OBSERVATION_SPACES["vector"], BOX, squashed=True)


def test_actions_on_the_bound_are_moved_inside_for_a_squashed_policy() -> None:
    demos = Demonstrations(np.zeros((2, 3), np.float32), OUTSIDE[:2])
    demos.check_spaces(OBSERVATION_SPACES["vector"], BOX, squashed=True)
    sde: dict[str, Any] = {"use_sde": True, "policy_kwargs": {"squash_output": True}}
    model = Reinforce("MlpPolicy", ScriptedEnv(action_space=BOX), **sde)
    np.testing.assert_allclose(demos.actions_for(model.policy), [[0, -0.999], [0.999, 0.999]], rtol=1e-6)


def test_actions_count_from_0_for_a_policy() -> None:
    space = spaces.MultiDiscrete([2, 3], start=[1, -1])
    demos = Demonstrations(np.zeros((2, 3), np.float32), np.array([[1, -1], [2, 1]]))
    demos.check_spaces(OBSERVATION_SPACES["vector"], space)
    model = Reinforce("MlpPolicy", ScriptedEnv(action_space=space))
    assert demos.actions_for(model.policy).tolist() == [[0, 0], [1, 2]]


def test_warnings_name_the_line_that_has_called() -> None:
    """Also where a dict's parts are checked, or methods of SB3 are in between."""
    seen = spaces.Dict({"a": spaces.Box(-1, 1, (1,))})
    in_dict = Demonstrations({"a": np.full((4, 1), 2.0, np.float32)}, np.zeros(4, int))
    demos = Demonstrations(np.zeros((4, 3), np.float32), OUTSIDE)
    model: Any = OffPolicyPG("MlpPolicy", ScriptedEnv(action_space=BOX), device="cpu")

    def learn() -> None:
        model.anchor = DemonstrationLoss(demos, 0.1)
        model.learn(20, lambda names, _: vars(names["self"].anchor).update(fits=False) or True)

    calls: list[Any] = [
        lambda: in_dict.check_spaces(seen, spaces.Discrete(2)),
        lambda: demos.check_spaces(OBSERVATION_SPACES["vector"], BOX),
        lambda: model.pretrain(demos, n_epochs=1),
        lambda: Reinforce("MlpPolicy", ScriptedEnv(action_space=BOX), anchor=DemonstrationLoss(demos, 0.1)),
        learn,
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        found = [w.filename for w in caught if re.search("should be in|outside of the bounds", str(w.message))]
        assert found
        assert set(found) == {__file__}


def test_bounds_are_compared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_pg.demonstrations.checks.CHUNK", 4)  # two rows at a time
    demos = Demonstrations(np.zeros((4, 3), np.float32), OUTSIDE)
    with pytest.warns(UserWarning, match=r"actions of 2 of 4 steps are outside .* \[-3.0, 1.0\], got -3.5 at step 2"):
        demos.check_spaces(OBSERVATION_SPACES["vector"], BOX)


def test_summary_and_repr() -> None:
    demos = Demonstrations.from_arrays(**arrays(OBSERVATION_SPACES["dict"]))
    assert demos.summary().splitlines() == [
        "episodes:           3 (2 terminated, 1 truncated)",
        "steps:              8 (mean 2.66667, min 1, max 4 an episode)",
        "returns:            mean 9.33, min 3.00, max 22.00",
        "observations:       {class: int64(), vec: float32(2,)}",
        "actions:            int64()",
        "final observations: known",
    ]
    assert repr(demos).startswith("Demonstrations(n_episodes=3, n_steps=8, observations={class: ")
    assert "mean_return=9.33333" in repr(demos)
    assert "returns:            unknown" in Demonstrations([[0.0]], [0]).summary()
