"""A small clip store and a tiny network for the training tests."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jmm_fast.data import prepare, write_store
from jmm_fast.data.readers.synthetic import SyntheticOptions, read
from jmm_fast.models import ModelConfig
from jmm_fast.train.config import DataConfig, FinetuneConfig, KnnConfig, OptimConfig, ProbeConfig, RunConfig


def pytest_collection_modifyitems(config, items):
    if config.getoption("markexpr"):
        return
    for item in items:
        if Path(item.fspath).parent == Path(__file__).parent and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: ask for it with -m slow"))


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """48 synthetic clips, some with two bodies."""
    path = tmp_path_factory.mktemp("clips") / "clips.safetensors"
    prepare("synthetic", None, path, SyntheticOptions(clips=48))
    return path


@pytest.fixture(scope="session")
def gappy_clips(tmp_path_factory) -> Path:
    """The same with a fifth of the joints missing (zero), ten frames at a time."""
    contents = read(options=SyntheticOptions(clips=48))
    blocks = contents.frames if isinstance(contents.frames, list) else [contents.frames]
    contents.frames = np.concatenate(blocks)
    rows, joints = contents.frames.shape[:2]
    missing = np.random.default_rng(0).random((rows // 10 + 1, joints)).repeat(10, axis=0)[:rows] < 0.2
    contents.confidence = np.where(missing, 0, 1).astype(np.float16)
    contents.frames[missing] = 0
    path = tmp_path_factory.mktemp("gappy") / "clips.safetensors"
    write_store(path, contents)
    return path


@pytest.fixture
def config() -> RunConfig:
    """Three steps an epoch, milliseconds each."""
    return RunConfig(
        recipe="tiny",
        epochs=3,
        warmup_epochs=1,
        device="cpu",
        log_every=2,
        checkpoint_every=2,
        model=ModelConfig(
            num_frames=16,
            dim=16,
            depth=2,
            heads=2,
            topology="hops",
            decoder_dim=16,
            decoder_depth=1,
            decoder_heads=2,
        ),
        data=DataConfig(split="xsub", batch_size=8, min_length=16),
        probe=ProbeConfig(epochs=3, batch_size=8, features="cached"),
        knn=KnnConfig(),
        finetune=FinetuneConfig(
            epochs=2,
            warmup_epochs=1,
            batch_size=8,
            hidden=16,
            optim=OptimConfig(lr=1e-3, min_lr=0.0, betas=(0.9, 0.999), layer_decay=0.8),
        ),
    )


@pytest.fixture
def said() -> list[str]:
    return []
