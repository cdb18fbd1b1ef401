"""Other people's agents in this world: `python3 -m tests.benchmarks.peers RUN`.

RecurrentPPO of sb3-contrib as RL2 (Duan et al., 2016), without adaptation code, beside this project's agent of a RUN: trained
for as many frames, for as many seconds, and for five times as many seconds, and evaluated in the same lifetimes. The seconds
of RUN compare only where nothing else ran beside it. Needs tests/requirements.txt.

It is the only one: of the public meta-RL baselines AMAGO, variBAD and RL2's own are in no package registry, garage (2021) asks
for packages that no Python of today has, popularl (2025) knows nothing but a pole on a cart, and metarl (2024) is MAML alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import gymnasium
import torch
from matplotlib.figure import Figure
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from agent import rollout
from environment import WorldSettings, make_worlds
from main import EVALUATION_SEEDS, Settings, compare, plot_curve, evaluate, bootstrap_ci, load_system, normalised, references, format_ci
from memory import WorldStep
from tests.benchmarks import collected, named_runs, scores

WORLDS = 32


LIFETIMES = 512


class PreviousStep(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Shows what led to each picture, for recurrent agents that must find the rules out (RL2, Duan et al., 2016).

    Observations become {"picture": as before, "previous": (A + 2,) float32}: the previous action as one-hot, its reward,
    and 1 where an episode inside the lifetime has just ended; zeros after a reset.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        previous = gymnasium.spaces.Box(-np.inf, np.inf, (env.action_space.n + 2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"picture": env.observation_space, "previous": previous})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, np.ndarray], dict]:
        """As the wrapped environment's."""
        picture, info = self.env.reset(seed=seed, options=options)
        return {"picture": picture, "previous": np.zeros(self.observation_space["previous"].shape, np.float32)}, info

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """As the wrapped environment's."""
        picture, reward, terminated, truncated, info = self.env.step(action)
        ended = info.get("episode_terminated", False) or info.get("episode_truncated", False)
        previous = previous_step(np.asarray(action), np.asarray(reward), np.asarray(ended), self.env.action_space.n)
        return {"picture": picture, "previous": previous}, reward, terminated, truncated, info


def previous_step(action: np.ndarray, reward: np.ndarray, ended: np.ndarray, actions: int) -> np.ndarray:
    """What `PreviousStep` shows of steps (...): (..., actions + 2) float32."""
    return np.concatenate([np.eye(actions)[action], np.stack([reward, ended], -1)], -1).astype(np.float32)


class Watch(BaseCallback):
    """Ends training after so many seconds; `progress` has seconds and the mean return of the latest lifetimes, rollout by rollout."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.begin, self.seconds, self.progress = time.perf_counter(), seconds, []

    def _on_step(self) -> bool:
        return time.perf_counter() - self.begin < self.seconds

    def _on_rollout_end(self) -> None:
        returns = [lifetime["r"] for lifetime in self.model.ep_info_buffer]
        self.progress.append((time.perf_counter() - self.begin, float(np.mean(returns))))


def enlarged(world: WorldSettings) -> WorldSettings:
    """The same world in larger pictures: its convolutions need 36 pixels and more."""
    return dataclasses.replace(world, cell=math.ceil(48 / world.grid))


def train_recurrent_ppo(
    world: WorldSettings, seed: int, seconds: float = np.inf, frames: int = 10**12
) -> tuple[RecurrentPPO, list[tuple[float, float]]]:  # fmt: skip
    """Train on the training tasks of `world`, for so many seconds or frames; about as many weights as our agent has. With it the
    `Watch.progress`."""
    worlds = make_vec_env(
        "HiddenRules-v0", WORLDS, seed=seed, env_kwargs={"settings": enlarged(world)}, wrapper_class=PreviousStep
    )  # fmt: skip
    policy = {
        "lstm_hidden_size": 128, "shared_lstm": True, "enable_critic_lstm": False,
        "net_arch": [64], "features_extractor_kwargs": {"cnn_output_dim": 64},
    }  # fmt: skip
    model = RecurrentPPO(
        "MultiInputLstmPolicy", worlds, n_steps=world.lifetime, batch_size=8 * world.lifetime, n_epochs=4, learning_rate=1e-3,
        gamma=0.95, ent_coef=0.01, policy_kwargs=policy, seed=seed, device="cpu",
    )  # fmt: skip
    watch = Watch(seconds)
    return model.learn(frames, callback=watch), watch.progress


class PeerAgent:
    """A trained recurrent policy behind the interface of `agent.Agent`; greedy."""

    def __init__(self, model: RecurrentPPO) -> None:
        self.model = model

    def reset(self, frames: torch.Tensor) -> None:
        """A lifetime begins: the recurrent state with it."""
        self.state, self.starts = None, np.ones(len(frames), bool)
        previous = np.zeros((len(frames), *self.model.observation_space["previous"].shape), np.float32)
        self.seen = {"picture": frames.numpy(), "previous": previous}

    def act(self) -> torch.Tensor:
        """The likeliest actions (B,) int64."""
        pictures = self.seen["picture"].transpose(0, 3, 1, 2)  # as its policy was trained on
        action, self.state = self.model.predict(self.seen | {"picture": pictures}, self.state, self.starts, deterministic=True)
        self.starts = np.zeros_like(self.starts)
        return torch.as_tensor(action)

    def observe(self, action: torch.Tensor, step: WorldStep) -> None:
        """What `PreviousStep` shows."""
        seen = (action.numpy(), step.reward.numpy(), step.ended.numpy())
        self.seen = {"picture": step.obs.numpy(), "previous": previous_step(*seen, self.model.action_space.n)}


def evaluate_peer(model: RecurrentPPO, settings: Settings, lifetimes: int) -> dict[str, Any]:
    """As `main.evaluate`, with the same tasks, starts and slips, on pictures of its own size."""
    world = make_worlds(enlarged(settings.world), lifetimes, "test", EVALUATION_SEEDS["test"])
    lived = {"agent": rollout(world, PeerAgent(model))} | references(settings.world, lifetimes, "test", torch.device("cpu"))
    weights = sum(parameter.numel() for parameter in model.policy.parameters())
    return compare(lived) | {"frames": model.num_timesteps, "weights": weights}


def draw(results: dict[str, dict[str, Any]], progress: dict[str, np.ndarray], path: Path) -> None:
    """As PNG: what training lifetimes return over its seconds, and reward by step of the held-out lifetime of every agent and of the
    references, see `agent.plot_curve`."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    (learning, axes), first = figure.subplots(1, 2), next(iter(results.values()))
    for name, points in progress.items():
        learning.plot(*points.T, label=name)
    learning.set(xlabel="seconds of training", ylabel="return of lifetimes in training")
    curves = {name: result["agent"] for name, result in results.items()}
    curves |= {label: first[name] for name, label in (("known_rule", "known rule"), ("thompson", "Thompson sampling")) if name in first}
    for name, curve in curves.items():
        plot_curve(axes, curve["by_step"], curve["by_step_error"], name)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(run: Path) -> None:
    """Train the peers, print the table, draw adaptation curves to peers.png in the run's folder."""
    system, state = load_system(run)
    settings, seconds = system.settings, json.loads((run / "timing.json").read_text())["total"]
    ours = evaluate(system, "test", LIFETIMES)
    budgets = {
        "as many frames": {"frames": state["counters"][2]}, "as many seconds": {"seconds": seconds},
        "five times the seconds": {"seconds": 5 * seconds},
    }  # fmt: skip
    heads = ["agent", "seconds", "frames", "return", "normalised", "less than ours, normalised"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    own_progress = collected(run)[:, [0, 2]]
    own_progress[:, 0] += seconds - own_progress[-1, 0]  # metrics begin after the first lifetimes, and end with the training
    results, progress = {}, {}
    own = np.array([ours["returns"][name] for name in ("agent", "random", "known_rule")], float)
    for name, budget in ({"this project's": None} | budgets).items():
        result, spent, frames, points = ours, seconds, state["counters"][2], own_progress
        if budget is not None:
            started = time.perf_counter()
            model, points = train_recurrent_ppo(settings.world, settings.seed, **budget)
            spent, result = time.perf_counter() - started, evaluate_peer(model, settings, LIFETIMES)
            frames, name = result["frames"], f"RecurrentPPO, {name}"
        results[name], progress[name] = result, np.array(points)
        theirs = np.array([result["returns"]["agent"]], float)
        less = lambda x, y, low, high: normalised(x, low, high) - normalised(y, low, high)  # noqa: E731
        strata = [np.stack([own[0], theirs[0], own[1], own[2]])]
        gap = format_ci(float(less(*strata[0])), bootstrap_ci(less, *strata), 3) if budget else ""
        print(f"| {name} | {spent:.0f} | {frames:,} | {' | '.join(scores(result))} | {gap} |", flush=True)
        draw(results, progress, run / "peers.png")
    print(f"\n{LIFETIMES} lifetimes on the test split; figure in {run / 'peers.png'}")


if __name__ == "__main__":
    main(*named_runs("peers", several=False))
