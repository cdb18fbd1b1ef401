"""RL2: a recurrent policy learnt by PPO over whole lifetimes, in hundreds of built-in worlds at once.

The lifetime is the episode of PPO; what it reads is the observation, the previous action, its reward and whether an
inner episode has just ended (Duan et al., "RL2", 2016; Schulman et al., "PPO", 2017). Gradients go back through all
steps of a lifetime. So that neither perception nor the few training rules are an excuse, three aids may be switched on,
all of which the project's own agent does without or has built in: --symbols reads true positions instead of pixels,
--relabel names the actions anew in every training lifetime (then no action map is unseen), --labels teaches the memory
the hidden rule itself while training (Humplik et al., 2019). Every milestone prints a row: frames, seconds of training,
return in training and on held-out tasks, greedy.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from context_engine import references
from environment import HiddenRulesWorld, WorldSettings
from main import EVALUATION_SEEDS, Settings, get_device, with_preset
from memory import UserError, WorldStep, make_generator
from tests.benchmarks import command_line
from world_model import AGENTS

PRESETS = ("default", "quick", "large")


class Lifetimes(NamedTuple):
    """T steps of B lifetimes."""

    seen: Tensor  # (T, B, F) float32
    previous: Tensor  # (T, B, A + 3) float32: the action before, its reward, whether an episode ended, time left
    action: Tensor  # (T, B) int64
    log_prob: Tensor  # (T, B) float32
    value: Tensor  # (T, B) float32
    reward: Tensor  # (T, B) float32
    rule: Tensor  # (B, A + roles) int64: the move of every action, the colour of every role


class RL2(nn.Module):
    """Encoder, GRU, policy and value.

    Args:
        seen: numbers that an observation has, F.
        actions: A.
        roles: objects and the body.
    """

    def __init__(self, seen: int, actions: int, roles: int, hidden: int = 128, width: int = 256) -> None:
        super().__init__()
        self.hidden, self.sizes = hidden, (*[5] * actions, *[roles] * roles)
        self.see = nn.Sequential(nn.Linear(seen, width), nn.ReLU(), nn.Linear(width, hidden), nn.ReLU())
        self.token = nn.Sequential(nn.Linear(hidden + actions + 3, hidden), nn.ReLU())
        self.gru = nn.GRU(hidden, hidden)
        self.mix = nn.Sequential(nn.Linear(2 * hidden, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.policy, self.value = nn.Linear(width, actions), nn.Linear(width, 1)
        self.rule = nn.Linear(hidden, sum(self.sizes))
        nn.init.orthogonal_(self.policy.weight, 0.01)

    def forward(self, seen: Tensor, previous: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities (T, B, A), values (T, B), memories (T, B, H) and the next state (1, B, H)."""
        encoded = self.see(seen)
        memory, state = self.gru(self.token(torch.cat([encoded, previous], -1)), state)
        mixed = self.mix(torch.cat([memory, encoded], -1))
        return self.policy(mixed).log_softmax(-1), self.value(mixed)[..., 0], memory, state

    def rule_loss(self, memory: Tensor, rule: Tensor) -> Tensor:
        """Cross-entropies of the hidden rule (B, parts), read off memories (T, B, H)."""
        parts = zip(self.rule(memory).split(self.sizes, -1), rule.unbind(1), strict=True)
        return sum(F.cross_entropy(x.flatten(0, 1), part.repeat(len(memory))) for x, part in parts)


def observe(world: HiddenRulesWorld, frame: Tensor, step: WorldStep | None, symbols: bool) -> Tensor:
    """What the policy sees (B, F): the observation and, where an episode has just ended, its final one."""
    if not symbols:
        final = torch.zeros_like(frame)
        if step is not None:
            final[step.ended] = step.final_obs
        return torch.cat([frame, final], -1).flatten(1).float() / 255 - 0.5
    now = world.order_by_colour(world.position)  # (B, colour, 2)
    after = now if step is None else world.order_by_colour(world.next_position, world.step_rule)
    parts = []
    for place in (now, after):
        i, j = torch.triu_indices(place.shape[1], place.shape[1], 1, device=place.device)
        offset = place[:, i] - place[:, j]
        parts += [F.one_hot(place, world.settings.grid).flatten(1), F.one_hot(offset.sign() + 1, 3).flatten(1)]
    return torch.cat(parts, 1).float()


@torch.no_grad()
def roll_out(
    net: RL2, world: HiddenRulesWorld, symbols: bool, relabel: bool, generator: torch.Generator | None
) -> Lifetimes:
    """One lifetime in every world; greedy without a generator."""
    batch, actions, steps, device = world.batch, net.policy.out_features, world.settings.lifetime, world.device
    names = torch.arange(actions, device=device).expand(batch, -1)
    if relabel:
        names = torch.rand(batch, actions, generator=generator, device=device).argsort(1)
    seen, state = observe(world, world.reset(), None, symbols), torch.zeros(1, batch, net.hidden, device=device)
    previous, rows = torch.zeros(batch, actions + 3, device=device), []
    for t in range(steps):
        previous[:, -1] = 1 - t / steps
        log_prob, value, _, state = net(seen[None], previous[None], state)
        action = log_prob[0].argmax(1)
        if generator is not None:
            action = torch.multinomial(log_prob[0].exp(), 1, generator=generator)[:, 0]
        step = world.step(names.gather(1, action[:, None])[:, 0])
        chosen = log_prob[0].gather(1, action[:, None])[:, 0]
        rows.append((seen, previous, action, chosen, value[0], step.reward))
        seen = observe(world, step.obs, step, symbols)
        previous = torch.cat([F.one_hot(action, actions), step.reward[:, None], step.ended[:, None]], 1).float()
        previous = F.pad(previous, (0, 1))
    rule = torch.cat([world.rule.action_map.gather(1, names), world.rule.colours], 1)
    return Lifetimes(*map(torch.stack, zip(*rows, strict=True)), rule)


def advantages(lived: Lifetimes, gamma: float, lambda_: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and returns (T, B), over the ends of inner episodes to the end of the lifetime."""
    out, running, following = torch.empty_like(lived.value), 0.0, 0.0
    for t in reversed(range(len(out))):
        running = lived.reward[t] + gamma * following - lived.value[t] + gamma * lambda_ * running
        following, out[t] = lived.value[t], running
    return out, out + lived.value


def learn(
    net: RL2,
    optimizer: torch.optim.Optimizer,
    lived: Lifetimes,
    entropy_weight: float,
    labels: float,
    generator: torch.Generator,
    epochs: int = 4,
    minibatches: int = 8,
) -> None:
    """PPO on one batch of lifetimes."""
    advantage, target = advantages(lived, gamma=0.95, lambda_=0.8)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    for _ in range(epochs):
        order = torch.randperm(lived.reward.shape[1], generator=generator, device=generator.device)
        for rows in order.tensor_split(minibatches):
            seen, previous, action, before = (part[:, rows] for part in lived[:4])
            log_prob, value, memory, _ = net(seen, previous, seen.new_zeros(1, len(rows), net.hidden))
            ratio = (log_prob.gather(-1, action[..., None])[..., 0] - before).exp()
            gain = torch.min(ratio * advantage[:, rows], ratio.clamp(0.8, 1.2) * advantage[:, rows]).mean()
            entropy = -(log_prob.exp() * log_prob).sum(-1).mean()
            loss = -gain - entropy_weight * entropy + 0.5 * F.mse_loss(value, target[:, rows])
            if labels:
                loss = loss + labels * net.rule_loss(memory, lived.rule[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()


def train(
    world: WorldSettings,
    evaluated: int,
    seed: int,
    frames: int,
    symbols: bool,
    relabel: bool,
    labels: float,
    lr: float,
    lifetimes: int,
    device: torch.device,
) -> None:
    """Train and print a row at every milestone: so many lifetimes are `evaluated`, those of `main.evaluate`."""
    torch.manual_seed(seed)
    generator = make_generator(seed, stream=9, device=device)
    worlds = HiddenRulesWorld(world, lifetimes, "train", seed, device)
    seen = observe(worlds, worlds.reset(), None, symbols).shape[1]
    net = RL2(seen, world.actions, worlds.rule.colours.shape[1]).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr, eps=1e-5)
    done, seconds, due = 0, 0.0, 0
    while done < frames:
        start, share = time.perf_counter(), done / frames
        for group in optimizer.param_groups:
            group["lr"] = lr * max(1 - share, 0.02)
        lived = roll_out(net, worlds, symbols, relabel, generator)
        learn(net, optimizer, lived, 0.03 + (0.002 - 0.03) * share, labels, generator)
        done, seconds = done + lived.reward.numel(), seconds + time.perf_counter() - start
        if done >= due or done >= frames:
            due += frames // 20
            held_out = HiddenRulesWorld(world, evaluated, "test", EVALUATION_SEEDS["test"], device)
            earned = roll_out(net, held_out, symbols, False, None).reward.sum(0).mean()
            print(f"| {done:,} | {seconds:.0f} | {lived.reward.sum(0).mean():.2f} | {earned:.2f} |", flush=True)


def main(
    preset: str = "quick",
    frames: int = 10_000_000,
    seed: int = 0,
    symbols: bool = False,
    relabel: bool = False,
    labels: float = 0.0,
    lr: float = 2e-3,
    lifetimes: int = 512,
    device: str = "cpu",
) -> None:
    """Train RL2 and print its learning curve.

    Args:
        preset: default, quick or large.
        frames: Steps of the environment in all.
        seed: Of weights, worlds and actions.
        symbols: Read true positions by colour instead of pixels.
        relabel: Name the actions anew in every training lifetime.
        labels: Weight of teaching the memory the hidden rule; 0 for none.
        lr: Adam's initial learning rate; it falls linearly.
        lifetimes: Worlds at once; an update reads an eighth of them.
        device: Where to compute.
    """
    if preset not in PRESETS:
        raise UserError(f"preset is {preset!r}, but must be one of {', '.join(PRESETS)}.")
    settings, where = with_preset(Settings(), preset), get_device(device)
    world, evaluated = settings.world, settings.training.evaluation_lifetimes
    known = references(world, evaluated, "test", EVALUATION_SEEDS["test"], where)
    print("| frames | seconds | return, training | return, held out |\n|---|---|---|---|")
    for name in ("thompson", "known_rule"):
        print(f"| {AGENTS[name]} | | | {known[name].reward.sum(1).mean():.2f} |")
    train(world, evaluated, seed, frames, symbols, relabel, labels, lr, lifetimes, where)


if __name__ == "__main__":
    command_line(main)
