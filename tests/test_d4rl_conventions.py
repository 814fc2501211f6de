"""AntMaze and Adroit as D4RL has them, against its files, maps and reference scores."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from iwsft import datasets, environments
from iwsft.trajectory import ACTION, OBSERVATION, REWARD, lengths

U = ["#####", "#S  #", "### #", "#G  #", "#####"]


def d4rl(env_id: str, **kwargs: Any) -> gym.Env[Any, Any]:
    return environments.make(env_id, conventions="d4rl", **kwargs)


class TestAntMaze:
    def test_walls_start_and_goal_of_the_u_maze(self) -> None:
        env = d4rl("AntMaze_UMaze-v4")
        simulation = env.unwrapped.ant_env
        origin = env.get_wrapper_attr("_origin")
        walls = {
            tuple((simulation.model.geom(i).pos[:2] - origin).round(6).tolist())
            for i in range(simulation.model.ngeom)
            if "block" in simulation.model.geom(i).name
        }
        # Cells are 4 wide, x runs along the columns and y along the rows, 0 in the start's cell.
        cells = [(4.0 * (j - 1), 4.0 * (i - 1)) for i in range(5) for j in range(5)]
        assert walls == {cells[5 * i + j] for i in range(5) for j in range(5) if U[i][j] == "#"}
        goals, starts = [], []
        for seed in range(40):
            observation, info = env.reset(seed=seed)
            goals.append(observation["desired_goal"])
            starts.append(environments.flattener(env)(observation))
            assert info["success"] is False
        away = np.array(goals) - [0, 8]  # from the middle of cell (3, 1)
        assert (away >= 0).all()
        assert (away <= 1.5).all()
        assert np.allclose(away.mean(0), 0.75, atol=0.25)
        assert np.array(starts).shape == (40, 29)
        assert (np.abs(np.array(starts)[:, :2]) <= 0.1).all()
        assert np.array(starts)[:, 15:].std() == pytest.approx(0.1, rel=0.1)  # velocities

    @pytest.mark.parametrize(
        ("env_id", "goal", "steps"),
        [
            ("AntMaze_UMaze-v4", (0, 8), 700),
            ("AntMaze_Medium-v4", (20, 20), 1000),
            ("AntMaze_Large-v4", (32, 24), 1000),
        ],
    )
    def test_goals_and_limits(self, env_id: str, goal: tuple[int, int], steps: int) -> None:
        env = d4rl(env_id)
        away = env.reset(seed=0)[0]["desired_goal"] - goal
        assert ((away >= 0) & (away <= 1.5)).all()
        assert env.spec is not None
        assert env.spec.max_episode_steps == steps

    def test_the_ant_is_d4rls(self) -> None:
        """0.1 s an action and torques of 30, where gymnasium's ant has 0.05 s and 150."""
        for env, seconds, torque in (
            (d4rl("AntMaze_UMaze-v4"), 0.1, 30.0),
            (environments.make("AntMaze_UMaze-v4"), 0.05, 150.0),
        ):
            env.reset(seed=0)
            data = env.unwrapped.ant_env.data
            env.step(np.ones(8, np.float32))
            assert data.time == pytest.approx(seconds)
            hinges = data.qfrc_actuator[6:]
            assert np.allclose(np.abs(hinges), torque)

    @pytest.mark.parametrize(("distance", "reached"), [(0.3, True), (0.47, True), (0.55, False)])
    def test_the_goal_is_half_a_unit_around(self, distance: float, reached: bool) -> None:
        """0.47 lies between gymnasium-robotics' radius and D4RL's."""
        env = d4rl("AntMaze_UMaze-v4")
        env.reset(seed=3)
        ant = env.unwrapped.ant_env
        qpos = ant.init_qpos.copy()
        qpos[:2] = env.unwrapped.goal + [distance, 0.0]
        ant.set_state(qpos, np.zeros(14))
        observation, reward, terminated, _, info = env.step(np.zeros(8, np.float32))
        away = np.linalg.norm(observation["achieved_goal"] - observation["desired_goal"])
        assert away == pytest.approx(distance, abs=0.02)
        assert (reward, terminated, info["success"]) == (float(reached), reached, reached)

    def test_a_seed_fixes_start_and_goal(self) -> None:
        env = d4rl("AntMaze_UMaze-v4")
        first, again, other = (env.reset(seed=seed)[0] for seed in (5, 5, 6))
        for key in first:
            assert np.array_equal(first[key], again[key])
            assert not np.array_equal(first[key], other[key])


class TestAdroit:
    @pytest.mark.parametrize(
        ("task", "tolerance"), [("Door", 1.5), ("Hammer", 6.0), ("Relocate", 2.5)]
    )
    def test_random_actions_score_d4rls_minimum(self, task: str, tolerance: float) -> None:
        """The reference minimum is the return of a random policy; it fits the reward's sign."""
        env_id = f"AdroitHand{task}-v1"
        reference = datasets.reference_scores(env_id)
        assert reference is not None
        assert np.mean(random_returns(d4rl(env_id), 10)) == pytest.approx(
            reference[0], abs=tolerance
        )
        if task != "Hammer":  # there the other terms are larger than the difference
            as_is = np.mean(random_returns(environments.make(env_id), 3))
            assert abs(as_is - reference[0]) > 2 * tolerance

    def test_a_dropped_pen_ends_the_episode(self) -> None:
        env = d4rl("AdroitHandPen-v1")
        assert env.spec is not None
        assert env.spec.max_episode_steps == 100
        env.reset(seed=0)
        rng = np.random.default_rng(0)
        for _ in range(100):
            observation, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 24))
            # The pen's height, from the simulation.
            height = env.unwrapped.data.xpos[env.unwrapped.obj_body_id][2]
            assert terminated == (height < 0.075)
            assert observation[26] == height
            if terminated or truncated:
                break
        assert terminated

    def test_demonstrations_replay(self) -> None:
        """Actions of the bundled demonstrations give their recorded returns, and successes.

        Three of them; simulators of different age part ways on others.
        """
        env = d4rl("AdroitHandDoor-v1", max_episode_steps=1000)
        data = datasets.load("door-human").trajectories
        doors = door_positions()
        sizes = lengths(data).tolist()
        for demo, opened in ((11, True), (8, True), (9, False)):
            start = sum(sizes[:demo])
            rows = slice(start, start + sizes[demo])
            state = {"qpos": np.zeros(30), "qvel": np.zeros(30), "door_body_pos": doors[start]}
            env.reset(seed=0, options={"initial_state_dict": state})
            total, success = 0.0, False
            for action in data[ACTION][rows].numpy():
                _, reward, _, _, info = env.step(action)
                total += float(reward)
                success |= bool(info["success"])
            recorded = float(data[REWARD][rows].double().sum())
            assert total == pytest.approx(recorded, rel=0.02)
            assert success == opened == bool((data[OBSERVATION][rows][:, 28] >= 1.35).any())

    def test_recorded_rewards_are_d4rls(self) -> None:
        """From the observations, up to the small cost of the joint velocities, never a gain."""
        packed = datasets.load("door-human").trajectories
        # A reward belongs to the observation after the step.
        sizes = lengths(packed)
        last = (sizes.cumsum(0) - 1).tolist()
        rows = [row for row in range(len(packed)) if row not in last]
        after = packed[OBSERVATION].double().numpy()[np.array(rows) + 1]
        angle, reach = after[:, 28], np.linalg.norm(after[:, 35:38], axis=1)
        wanted = -0.1 * reach - 0.1 * (angle - 1.57) ** 2
        wanted += 2.0 * (angle > 0.2) + 8.0 * (angle > 1.0) + 10.0 * (angle > 1.35)
        difference = packed[REWARD].flatten().double().numpy()[rows] - wanted
        assert difference.max() < 1e-4
        assert np.median(difference) > -1e-3


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("antmaze-umaze-v0", 29),
        ("antmaze-umaze-v2", 29),
        ("antmaze-medium-play-v2", 29),
        ("antmaze-large-diverse-v2", 29),
        ("kitchen-complete-v0", 60),
        ("kitchen-mixed-v0", 60),
        ("door-human-v0", 39),
        ("hammer-expert-v0", 46),
        ("pen-human-v1", 45),
        ("relocate-expert-v1", 39),
    ],
)
def test_environments_of_the_catalogue_step(name: str, columns: int) -> None:
    entry = datasets.catalog.CATALOG[name]
    env = environments.make(entry.env_id, **entry.env_kwargs)
    flatten = environments.flattener(env)
    observation, _ = env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(15):
        assert flatten(observation).shape == (columns,)
        assert np.isfinite(flatten(observation)).all()
        observation, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert np.isfinite(float(reward))
        assert not terminated
        assert not truncated
    env.close()


@pytest.mark.parametrize("kind", ["complete", "partial", "mixed"])
def test_a_kitchen_return_counts_the_tasks_solved(kind: str) -> None:
    """Each task pays 1 once, however long it stays solved; the fourth ends the episode."""
    entry = datasets.catalog.CATALOG[f"kitchen-{kind}-v0"]
    env = environments.make(entry.env_id, **entry.env_kwargs)
    env.reset(seed=0)
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import (
        OBS_ELEMENT_GOALS,
        OBS_ELEMENT_INDICES,
    )

    tasks = entry.env_kwargs["tasks_to_complete"]
    fourth = "bottom burner" if kind == "mixed" else "slide cabinet"
    assert sorted(tasks) == sorted(["microwave", "kettle", "light switch", fourth])
    total = 0.0
    # The kettle last: it does not stay where it is put.
    for task in sorted(tasks, key=lambda name: name == "kettle"):
        for _ in range(2):
            env.unwrapped.data.qpos[OBS_ELEMENT_INDICES[task]] = OBS_ELEMENT_GOALS[task]
            _, reward, terminated, _, info = env.step(np.zeros(9))
            total += float(reward)
            if terminated:
                break
        assert total == len(info["episode_task_completions"])
    assert terminated
    assert total == 4
    env.close()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not cover Hopper-v4.*AntMaze_UMaze-v4"):
        d4rl("Hopper-v4")
    with pytest.raises(ValueError, match="conventions='minari' is unknown"):
        environments.make("AntMaze_UMaze-v4", conventions="minari")  # type: ignore[arg-type]


def random_returns(env: gym.Env[Any, Any], episodes: int) -> list[float]:
    rng = np.random.default_rng(0)
    returns = []
    for seed in range(episodes):
        env.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = env.step(
                rng.uniform(-1, 1, env.action_space.shape)
            )
            total += float(reward)
            over = terminated or truncated
        returns.append(total)
    return returns


def door_positions() -> np.ndarray:
    """The position of the door at each step, ``[N, 3]``."""
    from importlib import resources

    import h5py

    folder = resources.files("iwsft.datasets") / "data"
    with resources.as_file(folder / "door-human.hdf5") as path, h5py.File(path) as file:
        return np.asarray(file["infos/door_body_pos"][()])
