"""RecurrentPPO of sb3-contrib in the same environment, as an agent without any code for adaptation.

It is RL2 (Duan et al., 2016): a recurrent policy that observes its previous action and reward too. Trained for as
many environment steps as the agent of RUN, for as many seconds, and for five times as many seconds; all are evaluated
in the same lifetimes. The seconds of RUN are comparable only if nothing else ran beside it. Figure: peers.png in the
run's folder. Needs tests/requirements.txt.

No other peer can be installed: of the public meta-RL baselines AMAGO, variBAD and the original RL2 are in no package
registry, garage (2021) needs packages that no current Python has, popularl (2025) knows only a pole on a cart, and
metarl (2024) is MAML alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from matplotlib.figure import Figure
from sb3_contrib import RecurrentPPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tyro.conf import Positional

from context_engine import references, rollout
from environment import WorldSettings, make_worlds
from main import EVALUATION_SEEDS, Settings, evaluate, load_system
from memory import UserError, WorldStep
from tests.benchmarks import command_line, read_result, score_cells
from world_model import bootstrap_ci, compare, format_ci, normalised, plot_curve

WORLDS = 32  # that it trains in at once
LIFETIMES = 512  # of each evaluation


class PreviousStep(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Adds to each observation what led to it, for recurrent agents that infer the rules (RL2, Duan et al., 2016).

    Observations become {"frame": as before, "previous": (A + 2,) float32}: the previous action as one-hot, its reward,
    and 1 where an episode inside the lifetime has just ended; zeros after a reset.
    """

    def __init__(self, env: gymnasium.Env) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        previous = gymnasium.spaces.Box(-np.inf, np.inf, (env.action_space.n + 2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({"frame": env.observation_space, "previous": previous})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict]:
        """As the wrapped environment's."""
        frame, info = self.env.reset(seed=seed, options=options)
        return {"frame": frame, "previous": np.zeros(self.observation_space["previous"].shape, np.float32)}, info

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """As the wrapped environment's."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        ended = info.get("episode_terminated", False) or info.get("episode_truncated", False)
        previous = previous_step(np.asarray(action), np.asarray(reward), np.asarray(ended), self.env.action_space.n)
        return {"frame": frame, "previous": previous}, reward, terminated, truncated, info


def previous_step(action: np.ndarray, reward: np.ndarray, ended: np.ndarray, actions: int) -> np.ndarray:
    """What `PreviousStep` adds after steps (...): (..., actions + 2) float32."""
    return np.concatenate([np.eye(actions)[action], np.stack([reward, ended], -1)], -1).astype(np.float32)


class TimeLimit(BaseCallback):
    """Ends the training after so many seconds.

    `progress` lists for each rollout the seconds so far and the mean return of the last lifetimes.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.start, self.seconds = time.perf_counter(), seconds
        self.progress: list[tuple[float, float]] = []

    def _on_step(self) -> bool:
        return time.perf_counter() - self.start < self.seconds

    def _on_rollout_end(self) -> None:
        returns = [lifetime["r"] for lifetime in self.model.ep_info_buffer]
        self.progress.append((time.perf_counter() - self.start, float(np.mean(returns))))


def enlarged(world: WorldSettings) -> WorldSettings:
    """The same environment with larger frames: the peer's convolutions need at least 36 pixels."""
    return dataclasses.replace(world, cell=math.ceil(48 / world.grid))


def train_recurrent_ppo(
    world: WorldSettings, seed: int, seconds: float = math.inf, env_steps: int = 10**12
) -> tuple[RecurrentPPO, list[tuple[float, float]]]:
    """Train on the training tasks of `world` for so many seconds or steps, with about as many weights as our agent has.

    Returns:
        the model, and `TimeLimit.progress`.
    """
    worlds = make_vec_env(
        "HiddenRules-v0", WORLDS, seed=seed, env_kwargs={"settings": enlarged(world)}, wrapper_class=PreviousStep
    )
    policy = {
        "lstm_hidden_size": 128,
        "shared_lstm": True,
        "enable_critic_lstm": False,
        "net_arch": [64],
        "features_extractor_kwargs": {"cnn_output_dim": 64},
    }
    model = RecurrentPPO(
        "MultiInputLstmPolicy",
        worlds,
        n_steps=world.lifetime,
        batch_size=8 * world.lifetime,
        n_epochs=4,
        learning_rate=1e-3,
        gamma=0.95,
        ent_coef=0.01,
        policy_kwargs=policy,
        seed=seed,
        device="cpu",
    )
    limit = TimeLimit(seconds)
    return model.learn(env_steps, callback=limit), limit.progress


class PeerAgent:
    """A trained recurrent policy behind the interface that `context_engine.rollout` needs; greedy."""

    def __init__(self, model: RecurrentPPO) -> None:
        self.model = model

    def reset(self, frames: torch.Tensor) -> None:
        """Begin a lifetime with a new recurrent state."""
        self.state, self.starts = None, np.ones(len(frames), bool)
        previous = np.zeros((len(frames), *self.model.observation_space["previous"].shape), np.float32)
        self.obs = {"frame": frames.numpy(), "previous": previous}

    def act(self) -> torch.Tensor:
        """The most probable actions (B,) int64."""
        obs = self.obs | {"frame": self.obs["frame"].transpose(0, 3, 1, 2)}  # channels first, as in its training
        action, self.state = self.model.predict(obs, self.state, self.starts, deterministic=True)
        self.starts = np.zeros_like(self.starts)
        return torch.as_tensor(action)

    def observe(self, action: torch.Tensor, step: WorldStep) -> None:
        """Keep the next observation, as `PreviousStep` makes it."""
        parts = (action.numpy(), step.reward.numpy(), step.ended.numpy())
        self.obs = {"frame": step.obs.numpy(), "previous": previous_step(*parts, self.model.action_space.n)}


def evaluate_peer(model: RecurrentPPO, settings: Settings, lifetimes: int) -> dict[str, Any]:
    """As `main.evaluate`, with the same tasks, starts and slips, on larger frames; adds `env_steps` and `weights`."""
    seed = EVALUATION_SEEDS["test"]
    world = make_worlds(enlarged(settings.world), lifetimes, "test", seed)
    trajectories = {"agent": rollout(world, PeerAgent(model))}
    trajectories |= references(settings.world, lifetimes, "test", seed, torch.device("cpu"))
    weights = sum(parameter.numel() for parameter in model.policy.parameters())
    return compare(trajectories) | {"env_steps": model.num_timesteps, "weights": weights}


def normalised_gap(own: np.ndarray, peer: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """How much the normalised return of `peer` is below that of `own`; see `world_model.normalised`."""
    return normalised(own, low, high) - normalised(peer, low, high)


def plot(results: dict[str, dict[str, Any]], progress: dict[str, np.ndarray], path: Path) -> None:
    """Returns over the seconds of training, and reward by step of the held-out lifetime, to `path` (PNG).

    Args:
        results: evaluations by agent; the references of the first one are plotted too.
        progress: seconds and mean return of training lifetimes (n, 2) by agent.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    (learning, adaptation), first = figure.subplots(1, 2), next(iter(results.values()))
    for name, points in progress.items():
        learning.plot(*points.T, label=name)
    learning.set(xlabel="seconds of training", ylabel="return of training lifetimes")
    curves = {name: result["agent"] for name, result in results.items()}
    curves |= {label: first[name] for name, label in (("known_rule", "known rule"), ("thompson", "Thompson sampling"))}
    for name, curve in curves.items():
        plot_curve(adaptation, curve["by_step"], curve["by_step_error"], name)
    adaptation.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def training_curve(run: Path) -> np.ndarray:
    """How the return of collected lifetimes grows in a run: (n, 2) float64, seconds since the first update that was
    logged and the mean return."""
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    returns = events.Scalars("charts/return")
    return np.array([(event.wall_time - returns[0].wall_time, event.value) for event in returns])


def main(run: Positional[Path]) -> None:
    """Train the peers, print the table and save the figure after each.

    Args:
        run: Folder of a finished run to compare with.
    """
    system, state = load_system(run)
    settings, env_steps = system.settings, state["counters"][2]
    if settings.world.gym_id:
        raise UserError(f"{run} was trained in {settings.world.gym_id}: peers are for built-in environments.")
    seconds = read_result(run, "timing.json")["total"]
    curve = training_curve(run)
    curve[:, 0] += seconds - curve[-1, 0]  # logging begins after the first collections and ends with the training
    result = evaluate(system, "test", LIFETIMES)
    own = np.array([result["returns"][name] for name in ("agent", "random", "known_rule")], float)
    heads = ["agent", "seconds", "environment steps", "return", "normalised", "normalised, less than this project's"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    print(f"| this project's | {seconds:.0f} | {env_steps:,} | {' | '.join(score_cells(result))} | |", flush=True)
    results, progress = {"this project's": result}, {"this project's": curve}
    budgets = {
        "as many steps": {"env_steps": env_steps},
        "as many seconds": {"seconds": seconds},
        "five times the seconds": {"seconds": 5 * seconds},
    }
    for budget, limits in budgets.items():
        start, name = time.perf_counter(), f"RecurrentPPO, {budget}"
        model, points = train_recurrent_ppo(settings.world, settings.seed, **limits)
        spent, result = time.perf_counter() - start, evaluate_peer(model, settings, LIFETIMES)
        results[name], progress[name] = result, np.array(points)
        quantities = np.stack([own[0], np.array(result["returns"]["agent"], float), own[1], own[2]])
        gap = format_ci(float(normalised_gap(*quantities)), bootstrap_ci(normalised_gap, quantities), 3)
        cells = [name, f"{spent:.0f}", f"{result['env_steps']:,}", *score_cells(result), gap]
        print("| " + " | ".join(cells) + " |", flush=True)
        plot(results, progress, run / "peers.png")
    print(f"\n{LIFETIMES} lifetimes on the test split; figure in {run / 'peers.png'}")


if __name__ == "__main__":
    command_line(main)
