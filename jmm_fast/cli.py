"""The command line, ``jmm-fast``. A user's mistake is one line on stderr and exit code 2, never a traceback."""

import contextlib
import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from jmm_fast import __version__, memory
from jmm_fast.errors import SharedError, UserError

# torch takes a second to load: each command imports what it needs, so that help and typing errors are quick.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code: 0; 1 when a kernel fails its parity check or a benchmark breaks off; 2 after a user's mistake; 130
        after Ctrl-C, 143 after SIGTERM.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] != ["bench"]:
        memory.settle()
    try:
        if not args or args[0] in ("-h", "--help"):
            print(_help())
            return 0
        if args[0] == "--version":
            print(f"jmm-fast {__version__}")
            return 0
        if args[0] not in COMMANDS:
            raise UserError(f"unknown command {args[0]!r}{_near(args[0], COMMANDS)}")
        COMMANDS[args[0]][0](args[1:])
        # Only now is a closed pipe noticed for what was buffered.
        sys.stdout.flush()
        return 0
    except SystemExit as stop:
        # tyro printed the help it was asked for.
        return int(stop.code or 0)
    except UserError as error:
        # Of the processes that torchrun started: what all know the first one says, the rest one on each machine.
        alone = not isinstance(error, SharedError) and os.environ.get("LOCAL_RANK", "0") == "0"
        if alone or os.environ.get("RANK", "0") == "0":
            print(f"jmm-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _ended(2)
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"jmm-fast: {stop}" if str(stop) else "jmm-fast: interrupted", file=sys.stderr)
        return _ended(128 + getattr(stop, "signum", 2))
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        if _in_group():
            traceback.print_exc()
            _ended(1)
        raise


def _in_group() -> bool:
    """Whether this process belongs to a group of processes that it could not leave."""
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized()


def _ended(code: int) -> int:
    """``code``; of a process that could not leave its group, the end.

    Threads of the group may still be in an exchange with the others. One that lets go of a tensor while the interpreter
    is being taken down is ended in the middle of C++ code, and so the process by SIGABRT; another is waited for.
    """
    if _in_group():
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"jmm-fast {__version__}: masked motion pretraining on 3D skeletons",
            "",
            "usage: jmm-fast COMMAND ... (each command has its own --help)",
            "",
            *lines,
        ]
    )


def _doctor(args: list[str]) -> None:
    _parse(make_dataclass("Doctor", []), args, "doctor", "What is installed, and which backends run here.")
    from jmm_fast.doctor import doctor

    print(doctor())


def _prepare(args: list[str]) -> None:
    from jmm_fast.data import READERS, prepare

    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {reader.help}" for name, reader in READERS.items()]
        print("usage: jmm-fast prepare FORMAT [RAW] --out FILE ...\n\nformats:\n" + "\n".join(lines))
        return
    if args[0] not in READERS:
        raise UserError(f"unknown format {args[0]!r}{_near(args[0], READERS)}")
    reader = READERS[args[0]]
    from tyro.conf import Positional, arg

    arguments: list[tuple] = (
        [("raw", Annotated[Positional[Path], arg(help="file to read")])] if reader.needs_input else []
    )
    arguments += [
        ("out", Annotated[Path, arg(help="clip store to write")]),
        ("options", Annotated[reader.options, arg(name="")], field(default_factory=reader.options)),
    ]
    if reader.open is not None:
        arguments.append(("workers", Annotated[int, arg(help="threads (0: one per core); the result is the same")], 0))
    lists = {"--" + item.name.replace("_", "-") for item in fields(reader.options) if isinstance(item.default, tuple)}
    kind = make_dataclass("Prepare", arguments, kw_only=True)
    given = _parse(kind, _gathered(args[1:], lists), f"prepare {args[0]}", reader.help)
    store = prepare(
        args[0],
        given.raw if reader.needs_input else None,
        given.out,
        given.options,
        workers=getattr(given, "workers", 0),
        say=_say,
    )
    left_out = len(store.provenance.get("log", store.provenance.get("dropped", ())))
    note = f", {left_out} {'note' if left_out == 1 else 'notes'} on what was left out" if left_out else ""
    print(f"{store.num_clips} clips written to {given.out}{note}; 'jmm-fast inspect {given.out}' shows them")


def _layouts(args: list[str]) -> None:
    from tyro.conf import Positional, arg

    kind = make_dataclass(
        "Layouts",
        [
            ("names", Annotated[Positional[tuple[str, ...]], arg(help="SOURCE (or a clip store) and TARGET")], ()),
            ("joint_map", Annotated[Path | None, arg(help="YAML file, as prepare takes it")], None),
        ],
        kw_only=True,
    )
    given = _parse(kind, args, "layouts", "The known joint layouts, or how SOURCE is mapped onto TARGET.")
    from jmm_fast import skeleton

    if not given.names:
        for layout in map(skeleton.get, skeleton.names()):
            print(f"{layout.name:<10}  {layout.num_joints} joints: {', '.join(layout.joint_names)}")
        return
    if len(given.names) != 2:
        raise UserError(f"layouts takes no name or two, SOURCE and TARGET, got {len(given.names)}")
    from jmm_fast.data import ClipStore
    from jmm_fast.data.mapping import joint_mapping

    source, target = given.names
    known = source in skeleton.names() or not Path(source).exists()
    source = skeleton.get(source) if known else ClipStore.open(Path(source), check_values=False).skeleton
    print(joint_mapping(source, skeleton.get(target), given.joint_map).table())


def _inspect(args: list[str]) -> None:
    from tyro.conf import Positional, arg

    kind = make_dataclass(
        "Inspect",
        [
            ("file", Annotated[Positional[Path], arg(help="clip store")]),
            (
                "picture",
                Annotated[Path | None, arg(help="also draw some clips (.png, .svg, .pdf)")],
                None,
            ),
            ("page", Annotated[Path | None, arg(help="also write an HTML page: histograms, clips to play")], None),
            ("log", Annotated[Path | None, arg(help="also write all notes on what was left out as text")], None),
        ],
        kw_only=True,
    )
    given = _parse(kind, args, "inspect", "What a clip store holds, and clips worth a look.")
    from jmm_fast.data import ClipStore
    from jmm_fast.data.inspect import inspect, log_lines

    store = ClipStore.open(given.file, check_values=False)
    print(inspect(store))
    if given.picture is not None or given.page is not None:
        from jmm_fast.viz import contact_sheet, save, write_dataset_page
    if given.picture is not None:
        save(contact_sheet(store), given.picture)
        print(f"\npicture: {given.picture}")
    if given.page is not None:
        print(f"\npage: {write_dataset_page(store, given.page)}")
    if given.log is not None:
        from jmm_fast.files import atomic_write_text

        lines = log_lines(store)
        atomic_write_text(given.log, "".join(f"{line}\n" for line in lines))
        print(f"\nlog: {given.log}, {len(lines)} lines")


def _pretrain(args: list[str]) -> None:
    from jmm_fast import recipes

    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<12} {_first_sentence(recipe)}" for name, recipe in recipes.RECIPES.items()]
        print(
            "usage: jmm-fast pretrain RECIPE --data FILE --out RUN ...\n\n"
            "RECIPE is one of these or a config.yaml; 'jmm-fast pretrain RECIPE --help' lists every field:\n"
            + "\n".join(lines)
        )
        return
    from tyro.conf import FlagCreatePairsOff, arg

    from jmm_fast.train.config import RunConfig, Variant

    run = recipes.get(args[0], _peek(args, "--variant"))
    kind = make_dataclass(
        "Pretrain",
        [
            ("data", Annotated[Path, arg(help="clip store to train on")]),
            ("out", Annotated[Path, arg(help="run folder to write")]),
            ("variant", Annotated[Variant | None, arg(help="sets mask.variant and model.topology together")], None),
            ("resume", Annotated[FlagCreatePairsOff[bool], arg(help="continue the run in --out")], False),
            ("overwrite", Annotated[FlagCreatePairsOff[bool], arg(help="remove the run in --out first")], False),
            ("profile", Annotated[FlagCreatePairsOff[bool], arg(help="write where a step's time goes")], False),
            ("run", Annotated[RunConfig, arg(name="")], field(default_factory=lambda: run)),
        ],
        kw_only=True,
    )
    given = _parse(kind, args[1:], f"pretrain {args[0]}", "Masked motion pretraining; writes a run folder.")
    from jmm_fast.train.distributed import session
    from jmm_fast.train.pretrain import pretrain

    with session():
        pretrain(
            given.run,
            data=given.data,
            out=given.out,
            resume=given.resume,
            overwrite=given.overwrite,
            profile=given.profile,
            say=_say,
        )


def _probe(args: list[str]) -> None:
    encoders = Literal["pretrained", "untrained"]
    source, given = _evaluation("probe", args, encoders, "Linear evaluation of the frozen encoder.")
    if source is not None:
        from jmm_fast.train.distributed import session
        from jmm_fast.train.probe import probe

        with session():
            probe(source, data=given.data, encoder=given.encoder, say=_say)


def _knn(args: list[str]) -> None:
    from tyro.conf import FlagCreatePairsOff, arg

    raw = ("raw", Annotated[FlagCreatePairsOff[bool], arg(help="compare raw poses instead of features")], False)
    encoders = Literal["pretrained", "untrained"]
    source, given = _evaluation("knn", args, encoders, "Nearest neighbours on pooled features or raw poses.", [raw])
    if source is not None:
        from jmm_fast.train.distributed import session
        from jmm_fast.train.knn import knn

        with session():
            knn(source, data=given.data, encoder=given.encoder, raw=given.raw, say=_say)


def _finetune(args: list[str]) -> None:
    from tyro.conf import FlagCreatePairsOff, arg

    shard = "whether several processes hold weights and optimiser state in parts (default: as the run did)"
    flags = [
        ("resume", Annotated[FlagCreatePairsOff[bool], arg(help="continue the finetuning that is there")], False),
        ("overwrite", Annotated[FlagCreatePairsOff[bool], arg(help="remove the finetuning that is there")], False),
        ("shard", Annotated[Literal["none", "full"] | None, arg(help=shard)], None),
    ]
    encoders = Literal["pretrained", "scratch"]
    source, given = _evaluation("finetune", args, encoders, "Train the whole network with labels.", flags)
    if source is not None:
        import dataclasses

        from jmm_fast.train.distributed import session
        from jmm_fast.train.finetune import finetune

        if given.shard is not None:
            source.config = dataclasses.replace(source.config, shard=given.shard)

        with session():
            finetune(
                source,
                data=given.data,
                encoder=given.encoder,
                resume=given.resume,
                overwrite=given.overwrite,
                say=_say,
            )


def _evaluation(command: str, args: list[str], encoders: Any, description: str, flags: Sequence[tuple] = ()):
    """Source and parsed arguments of probe, knn or finetune; defaults are those of the run that is evaluated."""
    import dataclasses

    from tyro.conf import arg

    from jmm_fast import recipes
    from jmm_fast.train.config import DataConfig, RunConfig

    asks_help = not args or "-h" in args or "--help" in args
    recipe = _peek(args, "--recipe") or "released"
    source, run, rest = None, recipes.get(recipe), args
    if args and not args[0].startswith("-"):
        from jmm_fast.train.evaluate import open_source

        rest = args[1:]
        if not asks_help:
            out = _peek(args, "--out")
            source = open_source(Path(args[0]), out=None if out is None else Path(out), fallback=run)
            run = source.config
    elif not asks_help:
        raise UserError(f"say what to evaluate first: jmm-fast {command} RUN --data FILE")
    types = {item.name: item.type for item in dataclasses.fields(RunConfig)}
    dtypes, backends = types["dtype"], types["backend"]
    settings = getattr(run, command)
    kind = make_dataclass(
        command.title(),
        [
            ("data", Annotated[Path, arg(help="clip store with the training and test clips")]),
            (
                "encoder",
                Annotated[encoders, arg(help="whose features: the run's, or random first weights")],
                "pretrained",
            ),
            ("out", Annotated[Path | None, arg(help="folder for the results (default: the run)")], None),
            ("recipe", Annotated[str, arg(help="settings for weights that come without a run")], recipe),
            ("device", Annotated[str, arg(help="auto, cpu, cuda or cuda:N")], run.device),
            ("dtype", Annotated[dtypes, arg(help="arithmetic of the forward pass")], run.dtype),
            ("backend", Annotated[backends, arg(help="backend of the ops; see jmm-fast doctor")], run.backend),
            *flags,
            ("clips", Annotated[DataConfig, arg(name="data")], field(default_factory=lambda: run.data)),
            ("settings", Annotated[type(settings), arg(name="")], field(default_factory=lambda: settings)),
        ],
        kw_only=True,
    )
    given = _parse(kind, rest if args else ["--help"], f"{command} RUN", description)
    source.config = dataclasses.replace(
        run,
        data=given.clips,
        device=given.device,
        dtype=given.dtype,
        backend=given.backend,
        **{command: given.settings},
    )
    return source, given


def _report(args: list[str]) -> None:
    from tyro.conf import Positional, arg

    kind = make_dataclass(
        "Report",
        [
            ("run", Annotated[Positional[Path], arg(help="run folder")]),
            ("data", Annotated[Path | None, arg(help="clip store for the pictures (default: the run's)")], None),
            ("out", Annotated[Path | None, arg(help="file to write (default: RUN/report.html)")], None),
        ],
        kw_only=True,
    )
    given = _parse(kind, args, "report", "One self-contained HTML page about a run.")
    from jmm_fast.viz.report import write_report

    print(f"report written to {write_report(given.run, given.out, given.data)}")


def _bench(args: list[str]) -> None:
    from tyro.conf import FlagCreatePairsOff, Positional, arg

    kind = make_dataclass(
        "Bench",
        [
            (
                "ops",
                Annotated[Positional[tuple[str, ...]], arg(help="ops to measure, block, feeder or step; default all")],
                (),
            ),
            ("quick", Annotated[FlagCreatePairsOff[bool], arg(help="fewer rounds, nothing that takes minutes")], False),
            ("json", Annotated[Path | None, arg(help="also write the record into this file")], None),
            ("threads", Annotated[int | None, arg(help="threads of torch and of the kernels")], None),
            (
                "device",
                Annotated[Literal["cpu", "cuda"] | None, arg(help="rows of this kind of device only; default all")],
                None,
            ),
            (
                "minutes",
                Annotated[float | None, arg(help="begin no row later than this; rows with a bar come first")],
                None,
            ),
            (
                "pages",
                Annotated[
                    Literal["huge", "default"],
                    arg(help="huge: huge pages, freed memory kept, as in all commands; default: torch as it comes"),
                ],
                "huge" if os.environ.get(memory.HUGE_PAGES, "1") == "1" else "default",
            ),
        ],
        kw_only=True,
    )
    given = _parse(kind, args, "bench", "Our kernels against what they replace, each figure with its parity check.")
    if given.json is not None and (given.json.is_dir() or not given.json.absolute().parent.is_dir()):
        raise UserError(f"--json must be a file in a folder that exists, got {given.json}")
    os.environ[memory.HUGE_PAGES] = "1" if given.pages == "huge" else "0"
    memory.settle()
    from jmm_fast.bench.command import bench

    options = {"quick": given.quick, "threads": given.threads, "device": given.device, "minutes": given.minutes}
    # Not a mistake of the user: a kernel of this build computes wrong numbers, or something could not be measured.
    if not bench(given.ops, out=given.json, **options):
        raise SystemExit(1)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "doctor": (_doctor, "what is installed, which backends run here and why the others do not"),
    "prepare": (_prepare, "make a clip store from raw data: prepare FORMAT RAW --out FILE"),
    "layouts": (_layouts, "known joint layouts, or how one is mapped onto another: layouts [SOURCE TARGET]"),
    "inspect": (_inspect, "counts, lengths, classes and splits of a clip store"),
    "pretrain": (_pretrain, "pretrain by masked motion prediction: pretrain RECIPE --data FILE --out RUN"),
    "probe": (_probe, "linear evaluation of a run: probe RUN --data FILE"),
    "knn": (_knn, "nearest neighbours on features or raw poses: knn RUN --data FILE"),
    "finetune": (_finetune, "train the whole network with labels: finetune RUN --data FILE"),
    "report": (_report, "one HTML page with the figures of a run: report RUN"),
    "bench": (_bench, "speed and memory of the kernels against their peers on this machine: bench [OP ...]"),
}


def _gathered(args: list[str], lists: set[str]) -> list[str]:
    """``args`` with all values of each flag of ``lists`` after one flag: of two, the first would be forgotten."""
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    into = rest
    for text in args:
        flag, given, value = text.partition("=")
        if flag in lists:
            into = values.setdefault(flag, [])
            into += [value] * bool(given)
        else:
            into = rest if text.startswith("--") else into
            into.append(text)
    return rest + [text for flag in values for text in (flag, *values[flag])]


def _parse(kind: type, args: list[str], command: str, description: str) -> Any:
    """``args`` as the dataclass ``kind``; tyro's boxed complaint becomes one line.

    Raises:
        UserError: the arguments do not fit.
        SystemExit: help was asked for and printed.
    """
    import tyro

    complaint = io.StringIO()
    prog = f"jmm-fast {command}"
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(kind, args=args, prog=prog, description=description)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"{_one_line(complaint.getvalue())}; see {prog} --help") from None


def _one_line(box: str) -> str:
    """The first statement of tyro's error box, with its first suggestion."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [line.strip().strip("│").strip() for line in plain.splitlines() if line.strip()[:1] not in ("╭", "╰", "")]
    parts: list[list[str]] = [[]]
    for row in rows:
        if row and not row.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(row)
    if "╭" not in plain:
        del parts[0]  # without UTF-8 the title is a row of its own, with a line below
    text = " ".join(" ".join(parts[0]).split()).rstrip(".") if parts else "cannot read the arguments"
    unknown = re.match(r"Unrecognized options: ([^\s,]+)", text)
    if unknown:
        text = f"unknown option {unknown[1]}"
    missing = re.match(r"Missing from [^:]+: (--?[\w.\-]+|[A-Z]+)", text)
    if missing:
        text = f"{missing[1]} is missing"
    for part in parts[1:]:
        near = re.search(r"(--[\w.\-]+)", " ".join(part)) if part and part[0].startswith("Perhaps you meant") else None
        if near:
            text += f"; did you mean {near[1]}?"
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def _peek(args: list[str], option: str) -> str | None:
    """Value of ``option`` in ``args`` before they are parsed: it decides the defaults of the others."""
    for position, text in enumerate(args):
        if text == option and position + 1 < len(args):
            return args[position + 1]
        if text.startswith(option + "="):
            return text.partition("=")[2]
    return None


def _near(name: str, known: Sequence[str] | dict) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def _first_sentence(function: Callable) -> str:
    return " ".join((function.__doc__ or "").split(".")[0].split())


def _say(text: str) -> None:
    print(text, flush=True)
