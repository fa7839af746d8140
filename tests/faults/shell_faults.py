"""What a shell, a container or a notebook can be: closed pipes, environments, places, clocks."""

import os
import select
from pathlib import Path

from scene import NUM_EPOCHS, SMALL_RUN, Kind, Scene, Verdict, compare, goes_on, listed, places, refused, trouble

# Closed pipes.


def closed_pipe(scene: Scene, case: str) -> Verdict:
    """`| head -1` and `| true`: ends quietly."""
    work, results = scene.references.finished / "work", scene.references.finished / "results"
    name, _, lines = case.partition(", ")
    command: list[str]
    data = {}
    match name:
        case "predict":
            command = ["fmbench.predict", f"--model={work}", *[str(scene.references.picture)] * 2000]
        case "evaluate":
            command = ["fmbench.evaluate", f"--model={work}"]
        case "compare":
            command = ["fmbench.compare", "--help"]
        case "datasets":
            command, data = ["fmbench.datasets"], {"FMBENCH_CACHE": str(scene.references.data_cache)}
        case "leaderboard":
            command = ["fmbench.leaderboard", f"--results_dir={results}", "--check"]
        case _:
            command = ["fmbench.main", "--help"]
    reader, writer = os.pipe()
    stdout = f"/proc/{os.getpid()}/fd/{writer}"
    with scene.start(*command, stdout=stdout, env=data, small_data=bool(data)) as child:
        if lines == "a line":
            while child.is_running() and not select.select([reader], [], [], 0.1)[0]:
                pass
        os.close(reader)
        result = child.wait()
    os.close(writer)
    if wrong := trouble(result, 0, 1, 141, -13):
        return wrong
    noisy = "rror" in result.err or "roken" in result.err
    return Verdict("traceback", result.last_line) if noisy else Verdict("survived", f"exit code {result.code}")


# Environments: of processes that were not forked, because imports read them.

ENVIRONMENTS: dict[str, tuple[str, dict[str, str | None]]] = {  # the command: train, figures
    "a notebook's MPLBACKEND": ("figures", {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}),
    "an unknown MPLBACKEND": ("figures", {"MPLBACKEND": "nonsense"}),
    "MPLCONFIGDIR is a file": ("figures", {"MPLCONFIGDIR": "/etc/passwd"}),
    "JAX_PLATFORMS=cuda": ("train", {"JAX_PLATFORMS": "cuda"}),
    "JAX_PLATFORMS=tpu": ("train", {"JAX_PLATFORMS": "tpu"}),
    "JAX_PLATFORMS=nonsense": ("train", {"JAX_PLATFORMS": "nonsense"}),
    "JAX_PLATFORMS=cpu,nonsense": ("train", {"JAX_PLATFORMS": "cpu,nonsense"}),
    "JAX_ENABLE_X64=1": ("train", {"JAX_ENABLE_X64": "1"}),
    "JAX_NUM_CPU_DEVICES=nonsense": ("train", {"JAX_NUM_CPU_DEVICES": "nonsense"}),
    "JAX_LOGGING_LEVEL=nonsense": ("train", {"JAX_LOGGING_LEVEL": "nonsense"}),
    "XLA_FLAGS with an unknown flag": ("train", {"XLA_FLAGS": "--xla_nonsense=1"}),
    "OMP_NUM_THREADS=nonsense": ("train", {"OMP_NUM_THREADS": "nonsense"}),
    "OMP_NUM_THREADS=0": ("train", {"OMP_NUM_THREADS": "0"}),
    "no HOME": ("train", {"HOME": None}),
    "HOME is not there": ("train", {"HOME": "/nonexistent"}),
    "HOME is a file": ("train", {"HOME": "/etc/passwd"}),
    "no HOME and no cache named": ("train", {"HOME": None, "FMBENCH_CACHE": None}),
    "HOME is a file and no cache named": ("train", {"HOME": "/etc/passwd", "FMBENCH_CACHE": None}),
    "FMBENCH_CACHE is a file": ("train", {"FMBENCH_CACHE": "/etc/passwd"}),
    "FMBENCH_CACHE is empty": ("train", {"FMBENCH_CACHE": ""}),
    "LANG=C": ("train", {"LANG": "C"}),
    "LC_ALL=C and no UTF-8 mode": ("train", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "a locale that is not there": ("train", {"LC_ALL": "de_DE.ISO-8859-1"}),
    "PYTHONIOENCODING=ascii": ("train", {"PYTHONIOENCODING": "ascii"}),
    "TMPDIR is not there": ("train", {"TMPDIR": "/nonexistent"}),
    "TZ=nonsense": ("train", {"TZ": "Mars/Olympus"}),
    "COLUMNS=nonsense": ("train", {"COLUMNS": "nonsense"}),
    "COLUMNS=0": ("help", {"COLUMNS": "0"}),
    "TERM=dumb": ("train", {"TERM": "dumb"}),
    "an empty PATH": ("train", {"PATH": "/nonexistent"}),
    "PYTHONOPTIMIZE=2": ("train", {"PYTHONOPTIMIZE": "2"}),
    "PYTHONWARNINGS=error for deprecations of ours": (
        "help",
        {"PYTHONWARNINGS": "error::DeprecationWarning:fmbench"},
    ),
    "GIT_DIR is not there": ("train", {"GIT_DIR": "/nonexistent"}),
    "a proxy that is not there": (
        "train",
        {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"},
    ),
    "FMBENCH_MACHINE with a slash": ("train", {"FMBENCH_MACHINE": "../../x"}),
    "FMBENCH_MACHINE with lines": ("train", {"FMBENCH_MACHINE": "a\nb"}),
}


def environment(scene: Scene, case: str) -> Verdict:
    """As without it; or a line, and exit code 2."""
    command, env = ENVIRONMENTS[case]
    if command == "figures":
        flags = [f"--model={scene.references.convolutions / 'work'}", f"--output={scene.folder / 'figures'}"]
        result = scene.run("fmbench.figures", *flags, env=env, fresh=True)
        return trouble(result, 0) or Verdict("survived")
    if command == "help":
        return trouble(scene.run("fmbench.main", "--help", env=env, fresh=True), 0) or Verdict("survived")
    result = scene.train(env=env, fresh=True)
    if result.code == 2:
        return refused(result)
    if wrong := trouble(result, 0):
        return wrong
    if "X64" in case or "OMP" in case:  # other sums
        return Verdict("survived", "computed otherwise, on request")
    return compare(scene.folder, scene.references.finished)


# Places: how a person may spell a work directory.

PLACES = {  # what is spelt, and where that is; None: nowhere
    "~/x": "home/x",
    "file:///tmp/x": None,
    "s3://bucket/x": None,
    "gs://bucket/x": None,
    "http://localhost/x": None,
    "": None,
    ".": None,
    "/dev/null": None,
    "/proc/x": None,
    "a b/\u00e4\u4f60": "a b/\u00e4\u4f60",
    "-x": "-x",
    "x\ny": "x\ny",
    "x" * 300: None,
    "x/../y/": "y",
    "/": None,
}


def spelt(scene: Scene, case: str) -> Verdict:
    """The folder that is meant, or a line; and never a folder called '~' or 's3:'."""
    folder = scene.folder / "here"
    folder.mkdir()
    scene.env["HOME"] = str(folder / "home")
    (folder / "home").mkdir()
    (folder / "mine.txt").write_text("mine\n")
    inner = Scene.__new__(Scene)
    inner.__dict__ |= scene.__dict__ | {"folder": folder}
    before = {path.name for path in folder.iterdir()}
    flags = [*SMALL_RUN, f"--workdir={case}", f"--results_dir={scene.folder / 'results'}"]
    result = inner.run("fmbench.main", *flags)
    if wrong := trouble(result, 0, 2):
        return wrong
    new = {path.name for path in folder.iterdir()} - before - {path.name for path in folder.glob("std*")}
    where = PLACES[case]
    expected = {Path(where).parts[0]} - {"home"} if where and result.code == 0 else set()
    if (folder / "mine.txt").read_text() != "mine\n" or new - expected - {"x"}:
        return Verdict("believed", f"made {', '.join(new - expected)}")
    if where is None and result.code == 0:
        return Verdict("believed", "took it for a folder")
    if where and result.code == 0 and not (folder / where / "record.json").exists():
        return Verdict("lost", "the run is elsewhere")
    return Verdict("survived", result.last_line)


def somebodys_folder(scene: Scene, case: str) -> Verdict:
    """Files that are not a run's: refused, and not touched, with --force neither."""
    work = scene.folder / "work"
    work.mkdir()
    names = {
        "a foreign .lock": [".lock"],
        "a foreign .lock and texts": [".lock", "thesis.tex"],
        "a config.json of another program": ["config.json", "index.js"],
        "texts": ["thesis.tex"],
        "hidden files": [".git-credentials"],
        "a folder called checkpoints": ["checkpoints/mine.txt"],
        "what looks unfinished": [".config.json.backup", "notes"],
    }[case]
    for name in names:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text("mine\n")
    for flags in ((), ("--force",)):
        result = scene.train(*flags)
        if wrong := trouble(result, 0, 2):
            return wrong
        for name in names:
            if not (work / name).exists() or (work / name).read_text() != "mine\n":
                return Verdict("lost", f"{name} is gone after {' '.join(flags) or 'a run'}")
    return Verdict("survived", result.last_line)


# Descriptors, folders, processes.


def descriptors(scene: Scene, case: str) -> Verdict:
    """Started as cron jobs and services are."""
    shell = {
        "standard input closed": "exec <&-",
        "standard output closed": "exec >&-",
        "standard error closed": "exec 2>&-",
        "all closed": "exec <&- >&- 2>&-",
        "SIGPIPE and SIGHUP ignored": "trap '' PIPE HUP",
        "umask 777": "umask 777",
        "umask 077": "umask 077",
        "the current folder is gone": "mkdir gone; cd gone; rmdir ../gone",
        "nice 19": "renice -n 19 $$ >/dev/null",
        "one core": "taskset -p 1 $$ >/dev/null",
    }[case]
    prefix = ("/bin/sh", "-c", f'{shell}; exec "$@"', "sh")
    result = scene.train(fresh=True, prefix=prefix)
    if case in ("umask 777", "the current folder is gone") and result.code == 2:
        return refused(result)
    if wrong := trouble(result, 0):
        return wrong
    return compare(scene.folder, scene.references.finished) if case != "one core" else Verdict("survived")


def twice_in_one_process(scene: Scene, case: str) -> Verdict:
    """A notebook's second %run."""
    script = scene.folder / "notebook.py"
    flags = [*SMALL_RUN, *places(scene.folder)]
    script.write_text(
        "import runpy, sys\n"
        f"sys.argv = {['main', *flags]!r}\n"
        "for _ in range(2):\n"
        "    try:\n"
        f"        runpy.run_module({case!r}, run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end:\n"
        "        assert not end.code, end.code\n"
    )
    result = scene.run(str(script))
    return trouble(result, 0) or compare(scene.folder, scene.references.finished)


# Clocks.

HOUR, YEAR = 3600.0, 365 * 24 * 3600.0
CLOCKS: dict[str, tuple[float, float]] = {  # seconds that it is wrong by, at first and after the first epoch
    "set back an hour in training": (0, -HOUR),
    "set back ten years in training": (0, -10 * YEAR),
    "set forward an hour in training": (0, HOUR),
    "set forward ten years in training": (0, 10 * YEAR),
    "wrong by 50 years, then right": (-50 * YEAR, 0),
    "in the year 2100": (75 * YEAR, 75 * YEAR),
    "an hour before the last run": (-HOUR, -HOUR),
}


def clock(scene: Scene, case: str) -> Verdict:
    """Durations come from a clock that nobody sets: the record is written, and true."""
    offset, later = CLOCKS[case]
    when = scene.folder / "when"
    done = 0
    if "last run" in case:
        scene.copy(scene.references.half)
        done = NUM_EPOCHS - 2
    settings = {"offset": offset, "later": later, "when": str(when)}
    with scene.start("fmbench.main", *SMALL_RUN, *places(scene.folder), clock=settings) as child:
        while child.is_running(0.01) and "epoch 1/" not in child.err:
            pass
        when.touch()
        result = child.wait()
    return trouble(result, 0) or goes_on(scene, done)


COMMANDS = ("predict", "evaluate", "compare", "datasets", "leaderboard", "main")
KINDS = [
    Kind(
        "closed pipe",
        listed(*(f"{name}, {lines}" for name in COMMANDS for lines in ("a line", "nothing"))),
        closed_pipe,
    ),
    Kind("environment variables", listed(*ENVIRONMENTS), environment),
    Kind("spellings of a work directory", listed(*PLACES), spelt),
    Kind(
        "somebody's folder as a work directory",
        listed(
            *("a foreign .lock", "a foreign .lock and texts", "a config.json of another program", "texts"),
            *("hidden files", "a folder called checkpoints", "what looks unfinished"),
        ),
        somebodys_folder,
    ),
    Kind(
        "streams, masks and folders of services",
        listed(
            *("standard input closed", "standard output closed", "standard error closed", "all closed"),
            *(
                "SIGPIPE and SIGHUP ignored",
                "umask 777",
                "umask 077",
                "the current folder is gone",
                "nice 19",
                "one core",
            ),
        ),
        descriptors,
    ),
    Kind("a command twice in one process", listed("fmbench.main"), twice_in_one_process),
    Kind("the clock is set", listed(*CLOCKS), clock),
]
