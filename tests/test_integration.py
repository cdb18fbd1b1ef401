"""A trained run of `quick` and what breaks it; real processes, kills and disks; benchmarks."""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from unittest import mock

import gymnasium
import numpy as np
import torch
import tyro

from agent import AgentController, Learner
from context_engine import ActionValues, KnownRuleAgent, ThompsonAgent, rollout
from environment import WORLDS, HiddenRulesWorld, WorldSettings
from main import Settings, build_system, evaluate, load_system, train, with_preset
from memory import RunFolder, UserError, WorldStep, merge
from tests.benchmarks import ablations, appearance, references, speed
from tests.shared import (
    ROOT,
    TINY,
    children_of,
    command,
    copy_of,
    free_port,
    in_process,
    installed,
    make_generator,
    only_run,
    quick_run,
    slow,
    start,
    temporary_folder,
    tiny,
    tiny_folder,
    tiny_run,
    wait_for,
)
from tune_hyperparams import TuneArguments

LIFETIMES = 128
RESULTS = ("metrics.jsonl", "evaluation.json")


def printed_by(call: Callable, *arguments: object, **options: object) -> str:
    """What a call prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        call(*arguments, **options)
    return printed.getvalue()


def benchmark(name: str) -> object:
    """A module of tests/benchmarks; some need tests/requirements.txt."""
    return importlib.import_module(f"tests.benchmarks.{name}")


class TestQuickRun(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.run_folder = quick_run()
        cls.result = json.loads((cls.run_folder / "evaluation.json").read_text())

    def score(self, **broken: Callable) -> float:
        """Normalised return on validation tasks with some methods of the trained agent replaced."""
        system, _ = load_system(self.run_folder)
        for name, replacement in broken.items():
            part, method = name.split("__")
            target = getattr(system, part)
            setattr(target, method, replacement(getattr(target, method)))
        return evaluate(system, "validation", LIFETIMES)["normalised"]

    def test_it_learns_and_its_order_among_the_references_is_right(self):
        self.assertGreater(self.result["normalised_ci95"][0], 0.6)
        self.assertEqual(self.result["split"], "test")
        order = [self.result[name]["return_mean"] for name in ("random", "agent", "known_rule")]
        self.assertEqual(order, sorted(order))

    def test_its_belief_is_near_that_of_the_exact_filter(self):
        self.assertLess(self.result["belief_nll"]["late_excess"], 0.3)
        nll = self.result["belief_nll"]["agent"]
        self.assertLess(np.mean(nll[16:]), nll[0] - 1)

    def test_it_collapses_without_planner_belief_or_reward_head(self):
        generator, whole = torch.Generator().manual_seed(0), self.score()
        self.assertGreater(whole, 0.6)

        def random_values(action_values: Callable) -> Callable:
            return lambda codes, *_, **__: torch.rand(len(codes), 4, generator=generator)

        def frozen_belief(step: Callable) -> Callable:
            return lambda belief, experience: belief

        def flipped_rewards(heads: Callable) -> Callable:  # goals count as hazards and hazards as goals
            def flipped(*arguments: object) -> tuple:
                reward, end = heads(*arguments)
                return reward.flip(-1), end

            return flipped

        for broken in (
            {"planner__action_values": random_values},
            {"engine__step": frozen_belief},
            {"transition__reward_and_termination": flipped_rewards},
        ):
            with self.subTest(broken=list(broken)):
                self.assertLess(self.score(**broken), 0.1)

    def test_one_effect_of_the_model_stands_for_one_effect_of_the_world(self):
        system, _ = load_system(self.run_folder)
        world = HiddenRulesWorld(system.settings.world, 128, "validation", 5)
        agent = AgentController(system)
        agent.explore(1.0, torch.Generator().manual_seed(0))
        agent.reset(world.reset())
        effects = []
        for _ in range(world.settings.lifetime):
            before, action = world.position[:, 0].clone(), agent.act()
            step = world.step(action)
            agent.observe(action, step)
            moved = (world.next_position[:, 0] - before) @ torch.tensor([3, 1])  # -3, 3, -1, 1, or 0
            effects.append(torch.where(moved == 0, -1, world.rule.colours[:, 0] * 7 + moved + 3))
        true, found = torch.stack(effects, 1), agent.memory.experience().posterior.float().argmax(-1)
        moving = true >= 0  # many effects leave a body at an edge where it is
        counts = torch.zeros(21, found.max() + 1)
        counts.index_put_((true[moving], found[moving]), torch.ones(()), accumulate=True)
        self.assertGreater(float(counts.amax(0).sum() / counts.sum()), 0.97)

    def test_its_evaluation_holds_what_the_readme_lists(self):
        for name in ("preset", "seed", "split", "lifetimes", "env_steps", "normalised", "of_thompson", "belief_nll"):
            self.assertIn(name, self.result)
        for agent in ("agent", "random", "thompson", "known_rule"):
            result = self.result[agent]
            self.assertEqual(len(result["by_step"]), WORLDS["quick"]["lifetime"])
            low, high = result["return_mean_ci95"]
            self.assertTrue(low <= result["return_mean"] <= high)
            self.assertAlmostEqual(sum(result["by_step"]), result["return_mean"], places=4)

    def test_it_acts_in_a_loop_of_the_users_own(self):
        system, _ = load_system(self.run_folder)
        env = gymnasium.make("HiddenRules-quick-v0", settings=system.settings.world, split="test")
        returns, agent = [], AgentController(system)
        for seed in range(6):
            frame, info = env.reset(seed=seed)
            agent.reset(frame)
            earned, truncated = 0.0, False
            while not truncated:
                action = agent.act()
                frame, reward, _, truncated, info = env.step(int(action))
                agent.observe(action, WorldStep.of(frame, reward, info))
                earned += reward
            returns.append(earned)
        self.assertGreater(np.mean(returns), 0.25 * self.result["known_rule"]["return_mean"])


class TestNewProcess(unittest.TestCase):
    """The command line as a user starts it; nearly all tests of it run in this process, in test_main.py."""

    def test_it_ends_in_the_same_bytes_as_in_this_process(self):
        folder = tiny_folder()
        done = command("--config", "tiny.json", folder=folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        for name in RESULTS:
            self.assertEqual((only_run(folder) / name).read_bytes(), (tiny_run() / name).read_bytes(), name)

    @slow
    @unittest.skipUnless(hasattr(os, "fork"), "only POSIX systems limit the size of files")
    def test_a_full_disk_leaves_the_last_checkpoint(self):
        run = copy_of(tiny_run())
        room = (run / "checkpoint.pt").stat().st_size // 2
        script = (
            f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
            f"import runpy; sys.argv = ['main.py', 'resume', {str(run)!r}, '--updates', '30']\n"
            "runpy.run_path('main.py', run_name='__main__')"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        self.assertEqual(done.returncode, 2, done.stderr)
        self.assertRegex(done.stderr, "could not write .*checkpoint.pt .*last checkpoint")
        self.assertEqual(RunFolder(run).load()[0]["counters"][0], 38)

    @slow
    def test_a_training_that_is_killed_again_and_again_ends_in_the_same_bytes(self):
        printed = printed_by(lambda: self.assertEqual(benchmark("kills").main(kills=3), 0))
        self.assertRegex(printed, "3 (of|kills of) 3")


TORCHRUN = ("-m", "torch.distributed.run")
STANDALONE = ("--standalone", "--nproc-per-node", "2")


def torchrun(
    *arguments: str, folder: Path, options: tuple[str, ...] = STANDALONE, script: str = "main.py"
) -> subprocess.Popen:
    """Start torchrun; -- is there, or it would take --run as one of its own options."""
    return start(*arguments, folder=folder, script=script, launcher=(*TORCHRUN, *options, "--"))


def finished(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and all output of a process."""
    output, errors = process.communicate()
    return process.returncode, output + errors


@slow
class TestTorchrun(unittest.TestCase):
    def test_two_processes_train_one_agent_in_one_run(self):
        folder = tiny_folder()
        code, output = finished(torchrun("--config", "tiny.json", "--run", "two", folder=folder))
        self.assertEqual(code, 0, output)
        run = only_run(folder)
        self.assertEqual(output.count("training runs"), 1)
        lines, alone = (
            [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
            for each in (run, tiny_run())
        )
        steps = [[(line["update"], line["env_steps"]) for line in one] for one in (lines, alone)]
        self.assertEqual(*steps)
        code, printed = in_process(["resume", run, "--updates", "30"], folder)
        self.assertEqual(code, 2)
        self.assertIn("trained by 2 processes, not 1", " ".join(printed.split()))


@slow
@unittest.skipIf(os.name == "nt", "sends POSIX signals")
class TestElasticTorchrun(unittest.TestCase):
    def started(self, *options: str, folder: Path) -> subprocess.Popen:
        """A torchrun that does not outlive the test."""
        process = torchrun("--config", "tiny.json", "--run", "elastic", folder=folder, options=options)
        self.addCleanup(process.communicate)
        self.addCleanup(process.terminate)  # which ends its children too
        return process

    def wait_for_checkpoint(self, folder: Path, *processes: subprocess.Popen) -> None:
        """Return after the run's next checkpoint, or when all processes have ended."""

        def latest() -> int:
            return max((path.stat().st_mtime_ns for path in folder.glob("runs/*/checkpoint.pt")), default=0)

        before = latest()
        wait_for(lambda: latest() > before or all(process.poll() is not None for process in processes))

    def test_a_killed_process_is_restarted_and_the_run_ends_in_the_same_bytes(self):
        folder, whole = tiny_folder(updates=200), tiny_folder(updates=200)
        killed = self.started(*STANDALONE, "--max-restarts", "2", folder=folder)
        for victim in range(2):  # each of the two once
            self.wait_for_checkpoint(folder, killed)
            os.kill(children_of(killed)[victim], signal.SIGKILL)
        code, output = finished(killed)
        self.assertEqual(code, 0, output)
        self.assertEqual(output.count("training runs"), 3, output)
        code, output = finished(self.started(*STANDALONE, folder=whole))
        self.assertEqual(code, 0, output)
        for name in RESULTS:
            self.assertEqual((only_run(folder) / name).read_bytes(), (only_run(whole) / name).read_bytes(), name)

    def test_two_nodes_stop_at_ctrl_c_after_the_update_and_their_job_goes_on(self):
        folder, reached, endpoint = tiny_folder(updates=4000), 0, f"localhost:{free_port()}"
        node = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
        for _ in range(2):
            nodes = [self.started(*node, "--rdzv-id", "seven", folder=folder) for _ in range(2)]
            self.wait_for_checkpoint(folder, *nodes)
            for each in nodes:
                each.send_signal(signal.SIGINT)
            output = "".join(finished(each)[1] for each in nodes)
            self.assertIn("python3 main.py resume", output)
            update = int(re.search(r"update (\d+)", output)[1])
            state, _ = RunFolder(only_run(folder)).load()
            self.assertEqual((state["counters"][0], len(state["shards"])), (update, 2))
            self.assertTrue(reached < update < 4000)
            reached = update


class TestBenchmarksByHand(unittest.TestCase):
    """What benchmarks compute, against loops and known results."""

    def test_watkins_targets_of_the_variant_without_look_ahead(self):
        """Cut where another action was better; the last step is bootstrapped from its own next observation."""
        learner = Learner(build_system(tiny(planner={"discount": 0.9, "lambda_": 0.8}), planner=ablations.ModelFree))
        train(learner, until=20)
        system, experience = learner.system, learner.store.experience.rows(slice(3))
        squares, T = [], experience.action.shape[1]
        with torch.no_grad():
            context = system.engine.context(system.engine.sequence(experience))
            # Actions not taken yet are worth the same: rounding would decide which is best, and where the trace is cut.
            context = context + torch.randn(context.shape, generator=make_generator())
            loss = float(system.planner.loss(system.value, experience, context)["value"])
            for row in range(3):
                action = experience.action[row].tolist()
                codes = [*experience.codes[row], experience.next_codes[row, -1]]  # before each step and at the end
                q = [system.planner.action_values(codes[t][None], context[row, t][None])[0] for t in range(T + 1)]
                target = None
                for t in reversed(range(T)):
                    kept = t + 1 < T and action[t + 1] == int(q[t + 1].argmax())
                    best = float(q[t + 1].max())
                    boot = 0.8 * (target if kept else best) + 0.2 * best
                    target = float(experience.reward[row, t]) + 0.9 * boot
                    own = system.planner._values(system.value, codes[t][None], context[row, t][None])[0, action[t]]
                    squares.append((float(own) - target) ** 2)
        self.assertAlmostEqual(loss, float(np.mean(squares)), places=5)
        self.assertGreater(loss, 0)

    def test_code_accuracy(self):
        colours = torch.tensor([[[0, 3, 3, 1], [3, 0, 3, 1]], [[0, 3, 3, 1], [3, 0, 3, 1]]])
        codes = torch.tensor([[[5, 2, 2, 4], [2, 5, 2, 4]], [[4, 2, 2, 4], [2, 4, 2, 4]]])
        self.assertEqual(appearance.code_accuracy(codes[:1], colours[:1], 6), (1.0, 1.0))
        self.assertEqual(appearance.code_accuracy(codes, colours, 6), (0.75, 0.5))  # code 4 stands for two colours

    def test_a_part_half_as_fast_as_recorded_is_noticed(self):
        rows = [speed.Row(name, "", ratio, "") for name, ratio in json.loads(speed.RATIOS.read_text()).items()]
        for share, code in ((0.6, 0), (0.4, 1)):
            slower = [row._replace(ratio=row.ratio * share) for row in rows]
            with mock.patch.object(speed, "recorded_rows", lambda slower=slower: slower):
                printed_by(lambda code=code: self.assertEqual(speed.check_ratios(), code))
        left, right = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
        self.assertEqual(speed.count_flops(lambda: left @ right), 2 * 3 * 5 * 7)
        backward = speed.count_flops(lambda: (left @ right).sum().backward())
        self.assertEqual(backward, 2 * 2 * 3 * 5 * 7)  # forward, and one gradient
        self.assertEqual(speed.count_flops(speed.matrix_product(2 * 64 * 64 * 9, "cpu")), 2 * 64 * 64 * 9)

    def test_rollouts_agree_with_the_known_rule_where_nothing_is_hidden(self):
        settings = WorldSettings(grid=4, slip=0, lifetime=32)
        q = ActionValues(settings)
        world = HiddenRulesWorld(settings, 8, "validation", 0)
        agent = references.BayesAdaptiveAgent(world, q, 0, rollouts=64, horizon=4)
        agent.reset(world.reset())
        agent.filter.log_posterior = torch.nn.functional.one_hot(world.task, 144).float().log()
        known = KnownRuleAgent(world, q).values()
        chosen = known.gather(1, agent._mean_returns(torch.arange(8)).argmax(1)[:, None])[:, 0]
        spread = float((known.amax(1) - known.mean(1)).mean())
        self.assertLess(float((known.amax(1) - chosen).mean()), 0.1 * spread)


@slow
class TestBenchmarks(unittest.TestCase):
    """Benchmarks on the quick run, or trained with tiny settings: what they print, not how well anything learns."""

    def returns(self, printed: str) -> dict[str, float]:
        """Second column of a table by the first."""
        return {name: float(x) for name, x in re.findall(r"^\| ([^|]+?) \| (-?[\d.]+) ?\[?", printed, re.M)}

    def test_robustness(self):
        run, module = copy_of(quick_run()), benchmark("robustness")
        with mock.patch.multiple(module, LIFETIMES=64, NOISES=(0.05, 0.4), SLIPS=(0.1,)):
            printed = printed_by(module.main, (run,))
        clear, noisy = (float(re.search(rf"\| 0.1 \| {noise} \| (\S+)", printed)[1]) for noise in ("0.05", "0.4"))
        self.assertGreater(clear, noisy + 1)
        self.assertGreater((run / "robustness.png").stat().st_size, 10_000)

    def test_ablations_of_a_run(self):
        returns = self.returns(printed_by(ablations.main, runs=(quick_run(),), lifetimes=64))
        self.assertEqual(set(returns), {ablations.FULL, *get_args(ablations.Ablation)} - {"perception"})
        for part in ("belief", "prior", "reward_and_termination", "value"):
            self.assertLess(returns[part], returns[ablations.FULL] - 0.5, part)

    def test_ablations_train_what_is_missing(self):
        output = temporary_folder() / "ablations"
        options = {"seeds": (0,), "updates": 24, "lifetimes": 16, "output": output}
        rows = {ablations.FULL, *get_args(ablations.Ablation), *ablations.TRAINED} - {"perception"}
        with mock.patch.object(ablations, "BASE", tiny()):
            for trains in (True, False):
                with contextlib.redirect_stderr(io.StringIO()) as progress:
                    printed = printed_by(ablations.main, **options)
                self.assertEqual("training, seed 0" in progress.getvalue(), trains)
                self.assertNotIn("training, seed", printed)  # a record keeps what is printed
        self.assertEqual(set(self.returns(printed)), rows)
        with self.assertRaisesRegex(UserError, "another --output"):
            ablations.main(**(options | {"updates": 25}))

    def test_recovery_after_a_switch(self):
        """The quick run has never met a switch, but can be placed where rules switch."""
        run, module = copy_of(quick_run()), benchmark("switching")
        with self.assertRaisesRegex((UserError, SystemExit), "--preset switching"):
            module.main((run,))
        config = json.loads((run / "config.json").read_text())
        config["world"]["switch"] = 0.02
        (run / "config.json").write_text(json.dumps(config))
        checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
        checkpoint["settings"]["world.switch"] = 0.02
        torch.save(checkpoint, run / "checkpoint.pt")
        with mock.patch.object(module, "LIFETIMES", 64):
            returns = self.returns(printed_by(module.main, (run,)))
        expects, unaware = (returns[name] for name in returns if name.startswith("Thompson"))
        self.assertTrue(returns["known rule"] > expects > unaware)
        self.assertGreater((run / "switching.png").stat().st_size, 10_000)

    def test_belief(self):
        run, module = copy_of(quick_run()), benchmark("belief")
        with mock.patch.object(module, "LIFETIMES", 128):
            printed = printed_by(module.main, run)
        (last,) = re.findall(r"^\| 32 to 63 \|(.*)\|$", printed, re.M)
        agent, exact, calibration, moves, _, roles = map(float, last.split("|"))
        self.assertLess(exact, agent)
        self.assertLess(calibration, 0.1)
        self.assertGreater(min(moves, roles), 0.5)
        self.assertGreater((run / "belief.png").stat().st_size, 10_000)

    def test_tuning(self):
        tuning, first, folder = benchmark("tuning"), quick_run(), temporary_folder()
        with self.assertRaisesRegex(UserError, "a different seed each"):
            tuning.main((first, copy_of(first)))
        study = folder / "runs" / "tune-tuning"
        study.mkdir(parents=True)
        scores = (("COMPLETE", 0.8), ("PRUNED", 0.95), ("COMPLETE", 0.9))
        trials = [{"number": i, "state": state, "score": score} for i, (state, score) in enumerate(scores)]
        (study / "trials.json").write_text(json.dumps({"baseline": 0, "trials": trials}))
        (folder / "runs" / "tuning-0").symlink_to(first)  # as if the best set trained to the same agent
        with mock.patch.multiple(tuning, ROOT=folder, run_command=mock.DEFAULT) as replaced:
            printed = printed_by(tuning.main, (first,), trials=3)
        commands = [call.args[0][1:] for call in replaced["run_command"].call_args_list]
        self.assertEqual([command[0] for command in commands], ["tune_hyperparams.py", "main.py"])
        arguments = tyro.cli(TuneArguments, args=commands[0][1:])
        self.assertEqual((arguments.config, arguments.study, arguments.trials), (first / "config.json", "tuning", 3))
        self.assertEqual(commands[1][1:3], ["--config", str(study / "best.json")])
        start, best = r"start, trial 0 \| 0.800 \| .*\|  \| (\S+)", r"best, trial 2 \| 0.900 \| .*\| 0.00 \| \1"
        self.assertRegex(printed, rf"\| {start} \|\n\| {best} \|")
        self.assertIn("3 trials, of which 2 were not pruned; 1 runs", printed)

    def test_places(self):
        places, run = benchmark("places"), tiny_run()
        printed = printed_by(places.main, (run,), lifetimes=4)
        self.assertRegex(printed, r"\| nothing \| .* \|  \| \S+ \|\n\| the memory of places \| ")
        trained = places.train_without(tiny())
        self.assertEqual(float(trained.transition.place_past.weight.detach().abs().max()), 0.0)
        self.assertGreater(float(trained.transition.place_out[-1].weight.detach().abs().max()), 0.0)  # the rest learns

    def test_processes(self):
        from torch.distributed.run import get_args_parser

        processes = benchmark("processes")
        with mock.patch.object(processes, "run_command") as run_command, self.assertRaises(UserError):
            processes.main("quick", (3,), 4)  # nothing was trained
        self.assertEqual(
            [call.args[0][-1] for call in run_command.call_args_list],
            [f"processes-quick-3-{way}" for way in ("1-1", "1-4", "4-1")],
        )
        self.assertEqual(
            ["torch.distributed.run" in call.args[0] for call in run_command.call_args_list], [False, False, True]
        )
        arguments = run_command.call_args.args[0][3:]  # after python3 -m torch.distributed.run
        self.assertEqual(get_args_parser().parse_args(arguments).training_script, "main.py")  # --run is not torchrun's
        with mock.patch.object(processes, "train", return_value=quick_run()):
            printed = printed_by(processes.main, preset="quick")
        self.assertRegex(printed, r"\| 2 \| 1 \| [\d, ]+ \| 1.00 \|")

    def test_references_are_kept_and_reported(self):
        run, other = (copy_of(tiny_run()) for _ in range(2))
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"seed": 1}))
        result = json.loads((other / "evaluation.json").read_text())
        (other / "evaluation.json").write_text(json.dumps(result | {"seed": 1}))
        printed_by(references.main, run, lifetimes=4, rollouts=2)
        (saved,) = (run.parent / "references").iterdir()
        content = json.loads(saved.read_text())
        self.assertEqual((content["lifetimes"], content["rollouts"], content["world"]["grid"]), (4, 2, 4))
        self.assertEqual(set(content["agents"]), {"random", "thompson", "known_rule", "bayes_adaptive"})
        output, report = temporary_folder() / "report", benchmark("report")
        printed_by(report.main, (run, other), output)
        ((name, joined),) = json.loads((output / "report.json").read_text()).items()
        self.assertTrue(name.startswith("default, world.grid 4, "))
        self.assertEqual(joined["seeds"], [0, 1])
        self.assertAlmostEqual(joined["return_mean"], result["return_mean"])
        self.assertIn("known rule", (output / "report.md").read_text())
        self.assertGreater((output / "adaptation-0.png").stat().st_size, 5_000)
        with self.assertRaisesRegex(UserError, "exists"):
            report.main((run,), output)
        for content in (None, "{", '{"preset": "default"}'):  # missing, damaged, of an earlier version
            (other / "evaluation.json").unlink(missing_ok=True)
            if content is not None:
                (other / "evaluation.json").write_text(content)
            with self.assertRaisesRegex(UserError, "main.py resume"):
                report.main((other,), output / "none")

    def test_rollouts_earn_more_than_thompson_sampling_at_the_beginning(self):
        settings = WorldSettings(grid=4, lifetime=24, episode_limit=10)
        q, returns = ActionValues(settings), []
        for make in (
            lambda world: references.BayesAdaptiveAgent(world, q, 0, rollouts=8, horizon=12),
            lambda world: ThompsonAgent(world, q, 0),
        ):
            world = HiddenRulesWorld(settings, 128, "validation", 0)
            returns.append(rollout(world, make(world)).reward.sum(1))
        self.assertGreater(float((returns[0] - returns[1]).mean()), 0)

    @installed("psutil")
    def test_speed_of_every_part(self):
        output, (system, _) = temporary_folder(), load_system(quick_run())
        learner = speed.prepare_learner(tiny())
        self.assertGreater(len(learner.store.experience.codes.flatten(0, 1).unique(dim=0)), 4)  # no single grid
        with mock.patch.object(speed, "GROWTH", {"batch": speed.GROWTH["batch"][:2]}):
            rows = speed.growth(tiny(), output / "growth.png")
        rows += [speed.world_row("cpu", 3), speed.decision_row(system, 2)]
        rows += speed.learning_rows(learner) + speed.memory_rows(learner)
        self.assertEqual(len(rows), 5 + 1 + 1 + 4 + 2)
        for row in rows:
            self.assertTrue(np.isfinite(row.ratio) and (row.ratio > 0 or "growth" in row.name), row)
        self.assertGreater((output / "growth.png").stat().st_size, 5000)

    @installed("psutil")
    def test_endurance_records_memory_and_stops(self):
        module = benchmark("endurance")

        class Brief(module.MonitoredLearner):  # its time is over after 8 records, however fast the machine is
            def set_learning_rates(self, phase, update):
                super().set_learning_rates(phase, update)
                if len(self.rows) >= 8:
                    self.end = 0

        output = temporary_folder() / "endurance"
        with mock.patch.multiple(module, with_preset=lambda *_: tiny(), MonitoredLearner=Brief):
            printed = printed_by(module.main, output=output)
        self.assertRegex(printed, r"resident memory \d+ and \d+ MB")
        updates = json.loads((output / "endurance.json").read_text())["update"]
        self.assertEqual(updates, list(range(20, 20 * len(updates) + 1, 20)))
        self.assertTrue((output / "checkpoint.pt").exists())

    @installed("minigrid")
    def test_an_external_run_beside_shortest_paths(self):
        settings, module = merge(with_preset(Settings(), "gym"), TINY), benchmark("external")
        world = {"gym_id": "MiniGrid-Empty-5x5-v0", "lifetime": 24, "cell": 8}
        run = self.untrained(merge(settings, {"world": world}))
        returns = self.returns(printed_by(module.main, (run,), lifetimes=4, columns=3))
        self.assertGreater(returns["known rule"], 3)  # five steps to the goal, again and again
        self.assertLess(returns["random"], 1)
        self.assertGreater((run / "external.png").stat().st_size, 10_000)

    def test_appearance(self):
        runs = [self.untrained(tiny(world={"tint": 0.5}, context={"appearance": n})) for n in (4, 0)]
        with mock.patch.object(appearance, "LIFETIMES", 16):
            printed = printed_by(appearance.main, runs)
        self.assertEqual(len(re.findall(r"^\| (with(?:out)? [a-z]+) \|", printed, re.M)), 2)
        self.assertGreater((runs[0] / "appearance.png").stat().st_size, 10_000)

    def untrained(self, settings: Settings) -> Path:
        """The folder of a run of one update."""
        run = RunFolder(temporary_folder())
        with run.locked(settings):
            learner = Learner(build_system(settings))
            train(learner, run, until=1, checkpoints=False)
            run.save(learner)
        return run.folder


if __name__ == "__main__":
    unittest.main()
