"""The command line: every command end to end, every mistake one line and exit code 2."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from jmm_fast.cli import main
from jmm_fast.data import write_store
from jmm_fast.data.readers.synthetic import SyntheticOptions, read

TINY = (
    "--epochs 1 --warmup-epochs 0 --device cpu --model.num-frames 16 --model.dim 16 --model.depth 1 --model.heads 2 "
    "--model.decoder-dim 16 --model.decoder-depth 1 --model.decoder-heads 2 --data.batch-size 8 --data.min-length 16 "
    "--finetune.epochs 1 --finetune.warmup-epochs 0 --finetune.hidden 16 --finetune.batch-size 8 --probe.epochs 1"
).split()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clips.safetensors"
    assert main(["prepare", "synthetic", "--out", str(path), "--clips", "48"]) == 0
    return str(path)


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", "demo", "--data", clips, "--out", str(out), *TINY]) == 0
    return str(out)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def complaint(capsys, *args) -> str:
    """The one line that ``args`` end in."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    text = capsys.readouterr().err
    assert text.startswith("jmm-fast: error: ") and text.endswith("\n") and text.count("\n") == 1, text
    assert "Traceback" not in text
    return text.removeprefix("jmm-fast: error: ").rstrip("\n")


def test_help_everywhere(capsys):
    for args in ([], ["--help"], ["-h"]):
        assert main(args) == 0
        assert "pretrain" in capsys.readouterr().out
    for command in ("doctor", "prepare", "layouts", "inspect", "pretrain", "probe", "knn", "finetune", "report"):
        assert main([command, "--help"]) == 0
        assert "jmm-fast " + command in capsys.readouterr().out
    assert main(["prepare", "ragged", "--help"]) == 0
    assert "--out" in capsys.readouterr().out
    assert main(["pretrain", "small", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(field in text for field in ("--model.dim", "--mask.tau", "--optim.lr", "--finetune.optim.layer-decay"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jmm-fast 0.")


def test_help_does_not_wait_for_torch():
    code = "import sys; from jmm_fast.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_doctor_tells_every_op_and_backend(capsys):
    import jmm_fast

    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for op, table in jmm_fast.backends().items():
        assert f"  {op}\n" in text
        assert all(reason in text for reason in table.values())
    assert "torch" in text and "cores" in text and "matplotlib" in text


def test_inspect(clips, capsys):
    assert main(["inspect", clips]) == 0
    text = capsys.readouterr().out
    assert "clips        48" in text and "ntu25, 25 joints" in text and "xsub" in text and "xview" in text


def test_layouts(clips, capsys):
    assert main(["layouts"]) == 0
    text = capsys.readouterr().out
    assert "ntu25       25 joints: spine_base" in text and "cmu31       31 joints: root" in text
    assert main(["layouts", "coco17", "ntu25"]) == 0
    rows = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 25 and rows[0] == ["spine_base", "middle", "left_hip, right_hip"]
    assert main(["layouts", clips, "coco17"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["nose", "nearest", "head"]


def test_every_command_leaves_its_record(clips, run, capsys):
    with open(os.path.join(run, "config.yaml")) as file:
        config = yaml.safe_load(file)
    assert (config["recipe"], config["model"]["dim"], config["data"]["split"]) == ("demo", 16, "xsub")
    common = ["--data", clips]
    assert main(["probe", run, *common]) == 0
    assert main(["probe", run, *common, "--encoder", "untrained", "--features", "online", "--split", "xview"]) == 0
    assert main(["knn", run, *common, "--k", "3"]) == 0
    assert main(["knn", run, *common, "--raw"]) == 0
    assert main(["finetune", run, *common, "--labels", "0.5"]) == 0
    assert main(["finetune", run, *common, "--encoder", "scratch", "--optim.lr", "1e-3"]) == 0
    out = capsys.readouterr().out
    assert "linear, pretrained encoder: top-1" in out and "knn, raw poses: top-1" in out
    with open(os.path.join(run, "evaluations.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    assert [(line["protocol"], line["encoder"], line["split"]) for line in lines] == [
        ("linear", "pretrained", "xsub"),
        ("linear", "untrained", "xview"),
        ("knn", "pretrained", "xsub"),
        ("knn", "raw", "xsub"),
        ("finetune", "pretrained", "xsub"),
        ("finetune", "scratch", "xsub"),
    ]
    assert lines[2]["k"] == 3 and lines[4]["labels"] == 0.5
    assert all(os.path.exists(os.path.join(run, line["predictions"])) for line in lines)


def test_report(clips, run, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["report", run, "--data", clips, "--out", str(tmp_path / "report.html")]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html")


def test_resume_and_overwrite(clips, run, tmp_path, capsys):
    out = str(tmp_path / "run")
    command = ["pretrain", "demo", "--data", clips, "--out", out, *TINY]
    assert main(command) == 0
    assert "already holds a run" in complaint(capsys, *command)
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--overwrite"]) == 0
    changed = [*command, "--resume", "--mask.tau", "0.7"]
    assert "was started with mask.tau = 0.8, not 0.7" in complaint(capsys, *changed)


def test_variant_sets_mask_and_topology_but_fields_win(clips, tmp_path):
    out = tmp_path / "run"
    command = ["pretrain", "small", "--data", clips, "--out", str(out), "--split", "xsub", *TINY]
    assert main([*command, "--variant", "released", "--model.topology", "adjacency"]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["mask"]["variant"], config["model"]["topology"]) == ("released", "adjacency")
    assert main([*command, "--variant=mamp", "--overwrite"]) == 0
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["mask"]["variant"], config["model"]["topology"]) == ("mamp", "none")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("bake", "unknown command 'bake'; expected one of doctor, prepare"),
        ("pretain", "unknown command 'pretain'; did you mean 'pretrain'?"),
        ("prepare raggd x --out y", "unknown format 'raggd'; did you mean 'ragged'?"),
        ("prepare ragged absent.npz --out y", "absent.npz: no such file"),
        ("prepare ragged", "see jmm-fast prepare ragged --help"),
        ("prepare synthetic", "--out is missing"),
        ("layouts coco17", "layouts takes no name or two, SOURCE and TARGET, got 1"),
        ("layouts coco17 ntu26", "unknown skeleton 'ntu26': expected one of ntu25"),
        ("layouts absent ntu25", "unknown skeleton 'absent'"),
        ("inspect", "see jmm-fast inspect --help"),
        ("inspect absent", "absent: no such file"),
        ("pretrain smal --data x --out y", "unknown recipe 'smal'; did you mean 'small'?"),
        ("pretrain absent.yaml --data x --out y", "cannot read absent.yaml"),
        ("pretrain small --out y", "--data is missing; see jmm-fast pretrain small --help"),
        ("pretrain small --data absent --out y", "absent: no such file"),
        ("pretrain small --data x --out y --variant papr", "unknown variant 'papr'; did you mean 'paper'?"),
        ("pretrain small --data x --out y --modle.dim 3", "unknown option --modle.dim; did you mean --model.dim?"),
        ("pretrain small --data x --out y --model.dim three", "--model.dim: invalid literal for int()"),
        ("pretrain small --data x --out y --dtype float16", "invalid choice 'float16' for argument '--dtype'"),
        ("pretrain small --data x --out y --data.modality bones", "invalid choice 'bones'"),
        ("pretrain small --data x --out y spare", "unknown option spare"),
        ("pretrain small --data x --out", "missing value for argument '--out'"),
        ("probe absent --data x", "absent does not exist: expected a run folder"),
        ("probe --data x", "say what to evaluate first: jmm-fast probe RUN --data FILE"),
        ("probe absent --recipe pper --data x", "unknown recipe 'pper'; did you mean 'paper'?"),
        ("report absent", "absent is not a run folder"),
        ("doctor now", "unknown option now"),
    ],
)
def test_mistakes(args, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert expected in complaint(capsys, *args.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--split", "xsubject"], "unknown split 'xsubject': stored splits are xsub, xview"),
        (["--split", "actor in 1"], "asks for a column 'actor'"),
        (["--mask.mask-ratio", "1.5"], "mask.mask_ratio is 1.5: expected between 0 and 1"),
        (["--model.heads", "3"], "model.dim must be a multiple of model.heads=3"),
        (["--model.num-joints", "20", "--model.skeleton", "kinect20"], "has 25 joints (ntu25), the network has 20"),
        (["--backend", "cuda"], "backend is 'cuda'"),
        (["--device", "cuda:99"], "device is 'cuda:99'"),
        (["--optim.lr", "1e30", "--optim.min-lr", "0", "--epochs", "9"], "try a smaller optim.lr"),
    ],
)
def test_mistakes_with_data(args, expected, clips, tmp_path, capsys):
    command = ["pretrain", "small", "--data", clips, "--out", tmp_path / "run", "--split", "xsub", *TINY]
    assert expected in complaint(capsys, *command, *args)


@pytest.mark.parametrize("kind", ["truncated", "text", "nan", "label"])
def test_bad_stores(kind, clips, tmp_path, capsys):
    path = tmp_path / "bad.safetensors"
    data = open(clips, "rb").read()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "text":
        path.write_text("subject,label\n")
    else:
        contents = read(options=SyntheticOptions(clips=21))
        write_store(path, contents)
        raw = bytearray(path.read_bytes())
        if kind == "nan":
            raw[-4:] = np.float32("nan").tobytes()
        else:
            bad = np.int64(77).tobytes()
            at = raw.find(contents.labels.tobytes())
            raw[at : at + 8] = bad
        path.write_bytes(raw)
    train = ["pretrain", "small", "--data", path, "--out", tmp_path / "run", *TINY]
    if kind == "nan":
        # inspect is the tool to find such clips with, so it goes on and lists them.
        assert main(["inspect", str(path)]) == 0
        assert "NaN" in capsys.readouterr().out
    for command in (train,) if kind == "nan" else (train, ["inspect", path]):
        text = complaint(capsys, *command)
        assert str(path) in text
        assert ("clip" in text) if kind in ("nan", "label") else True
    assert not (tmp_path / "run").exists()


def test_weights_that_are_none(clips, run, tmp_path, capsys):
    junk = tmp_path / "weights.pth"
    junk.write_bytes(b"junk")
    text = complaint(capsys, "probe", junk, "--data", clips, "--out", tmp_path / "results")
    assert str(junk) in text
    model = os.path.join(run, "model")
    assert "say with --out" in complaint(capsys, "knn", model, "--data", clips)


def test_an_unwritable_folder(clips, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    command = ["pretrain", "small", "--data", clips, "--out", tmp_path / "file" / "run", "--split", "xsub", *TINY]
    assert "cannot write" in complaint(capsys, *command)


def test_a_full_disk_leaves_no_scraps(clips, tmp_path, capsys):
    """A limit on the size of files stands for the full disk: the checkpoint cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        text = complaint(capsys, "pretrain", "demo", "--data", clips, "--out", tmp_path / "run", *TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert text.startswith("cannot write") and "step-000000003" in text and "File too large" in text
    assert not list((tmp_path / "run").rglob("*.part")) and not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_exit_codes_of_the_program(encoding):
    for args, code in (("--version", 0), ("bake", 2), ("doctor now", 2)):
        run = subprocess.run(
            [sys.executable, "-m", "jmm_fast", *args.split()],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONIOENCODING": encoding},
        )
        assert run.returncode == code
        assert (run.stderr.count("\n") == 1 and run.stderr.startswith("jmm-fast: error: ")) if code else not run.stderr


def test_interruption(monkeypatch, capsys):
    from jmm_fast import cli
    from jmm_fast.train.loop import Stopped

    def stops(_args):
        raise Stopped("stopped after step 3 of 9, checkpoint saved: --resume continues", 15)

    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "pretrain", (stops, ""))
    assert main(["pretrain"]) == 143
    assert capsys.readouterr().err == "jmm-fast: stopped after step 3 of 9, checkpoint saved: --resume continues\n"
    monkeypatch.setitem(cli.COMMANDS, "pretrain", (interrupted, ""))
    assert main(["pretrain"]) == 130
