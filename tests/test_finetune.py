"A run that begins with trained weights, as a user starts it."
import pytest
import torch
import yaml
from PIL import Image

from vit_course.finetune import FineTune
from vit_course.training import LitViT, load_model, save_model

BODY = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3,
        "mlp_ratio": 2.0, "stem": "early_conv", "pool": "mean", "num_classes": 3}
QUIET = ["--report", "false", "--trainer.enable_progress_bar", "false",
         "--trainer.enable_model_summary", "false", "--trainer.max_epochs", "2",
         "--trainer.precision", "32-true", "--data.num_workers", "0"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A trained model's file: its weights, and statistics that no folder of pictures has."
    torch.manual_seed(0)
    lit = LitViT(**BODY, mean=[0.1, 0.2, 0.3], std=[0.9, 0.8, 0.7], classes=["a", "b", "c"])
    file = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_model(lit, file)
    return file


@pytest.fixture
def pictures(tmp_path):
    "A folder of light and dark pictures."
    for split, count in {"train": 8, "valid": 2, "test": 2}.items():
        for name, light in {"dark": 40, "light": 200}.items():
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (light, light + i, light)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def options(start, pictures, *more) -> list:
    known = ["--config", "finetune", "--model.weights", start, "--data.data_dir", pictures]
    return ["fit", *known, *QUIET, *more]


def test_a_run_from_weights(command_line, start, pictures):
    command_line(*options(start, pictures, "--data.img_size", "16"))
    folder = command_line.folder / "runs/finetune"
    lit, old = load_model(folder / "checkpoints/last.ckpt"), load_model(start)
    assert lit.hparams.mean == old.hparams.mean and lit.hparams.std == old.hparams.std
    assert lit.hparams.classes == ["dark", "light"] and lit.vit.num_classes == 2
    assert lit.vit.embed_dim == 24 and len(lit.vit.encoder.blocks) == 2
    moved = [(a - b).abs().max() for a, b in zip(lit.vit.encoder.parameters(),
                                                old.vit.encoder.parameters())]
    assert 0 < max(moved) < 0.1  # trained on, and not begun anew
    settings = folder / "config.yaml"
    assert yaml.safe_load(settings.read_text())["model"]["weights"] == str(start)
    said = command_line("test", "--config", settings,
                        "--ckpt_path", folder / "checkpoints/last.ckpt")
    assert "test_acc" in said


def test_the_head_alone(command_line, start, pictures):
    alone = ["--model.freeze", "true", "--model.layer_decay", "1", "--data.img_size", "16"]
    command_line(*options(start, pictures, *alone))
    new = load_model(command_line.folder / "runs/finetune/checkpoints/last.ckpt").vit.state_dict()
    old = load_model(start).vit.state_dict()
    # the stem has batch norms: their statistics must stay, too
    other = [name for name in old if not name.startswith("head")
             and not torch.equal(old[name], new[name])]
    assert other == []


def test_what_does_not_fit_is_said_at_once(command_line, start, pictures):
    for more, says in {
        ("--model.embed_dim", "96"): "embed_dim=96, but the model in weights has 24",
        ("--model.optimizer", "muon"): "layer_decay=0.75 goes with optimizer='adamw'",
        ("--model.weights", "nowhere.ckpt"): "shipped models are",
    }.items():
        said = command_line(*options(start, pictures, *more), fails=True)
        assert says in said and "Traceback" not in said
    assert not (command_line.folder / "runs/finetune").exists()


def test_the_same_classes_keep_their_head(start):
    images = torch.rand(2, 3, 16, 16)
    old = load_model(start)
    assert torch.equal(FineTune(str(start)).eval()(images), old(images))
    kept = FineTune(str(start), classes=["a", "b", "c"], num_classes=3).eval()
    assert torch.equal(kept(images), old(images))
    renamed = FineTune(str(start), classes=["a", "c", "b"], num_classes=3).eval()
    assert not torch.allclose(renamed(images), old(images))


def test_another_size_of_image_resizes_the_positions(start):
    larger = FineTune(str(start), img_size=24).eval()
    assert larger.vit.grid == (6, 6)
    assert larger(torch.rand(1, 3, 24, 24)).shape == (1, 3)
