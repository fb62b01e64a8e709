"""The model card: what a run writes beside its weights."""

import re
import shutil
from pathlib import Path

import yaml
from conftest import ROOT, read_metrics, run

from runtime.card import CARD, model_card


def parts_of(card: str) -> tuple[dict, dict, str]:
    """The front matter, the recipe, and the text."""
    _, front, text = card.split("---\n", 2)
    return (
        yaml.safe_load(front),
        yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.S)[1]),
        text,
    )


def test_the_card_of_a_run(base, tmp_path):
    values = base | {"max_steps": 2, "loss": "simpo", "loss_args": "beta=2.5,gamma=0.5"}
    run(values, tmp_path / "mine")
    card = (tmp_path / "mine" / "final" / "README.md").read_text()
    assert str(tmp_path) not in card and str(Path(base["train_data"]).parent) not in card
    front, recipe, text = parts_of(card)
    assert front["pipeline_tag"] == "text-generation" and "base_model" not in front
    names = {"model": Path(base["model"]).name, "output_dir": "mine"}
    names |= {"train_data": "train.jsonl", "eval_data": "heldout.jsonl"}
    assert recipe.items() >= (values | names).items()
    config = (tmp_path / "mine" / "config.yaml").read_text()
    for name in ("training tokens", "held-out tokens", "model files", "torch", "commit"):
        assert re.search(f"^# ({name}: .+)$", config, re.M)[1] in text
    first, *_, last = (x for x in read_metrics(tmp_path / "mine") if "eval/loss" in x)
    assert "| held-out pairs | step 0 | step 2 |" in text
    assert f"| loss | {first['eval/loss']:.4f} | {last['eval/loss']:.4f} |" in text
    assert "`simpo`" in text and "By `train.py RECIPE`" in text
    code = re.search("```python\n(.*?)```", text, re.S)[1]
    code = code.replace('"mine"', repr(str(tmp_path / "mine" / "final"))).replace("256", "3")
    exec(code, {"print": lambda answer: None})


def test_the_card_of_a_model_of_the_hub(base, model_folder, tmp_path):
    values = base | {"max_steps": 1, "eval_data": ""}
    run(values, tmp_path / "mine")
    source = tmp_path / "models--someone--tiny" / "snapshots" / "abc"
    shutil.copytree(model_folder, source)
    licence = "license: other\nlicense_name: theirs\n"
    (source / "README.md").write_text(f"---\n{licence}pipeline_tag: x\n---\n# Tiny\n")
    path = tmp_path / "mine" / "config.yaml"
    config = yaml.safe_load(path.read_text()) | {"model": "someone/tiny@v1"}
    config |= {"train_data": "someone/pairs@v2:train:0.5,someone/more"}
    path.write_text("# ranks: 16\n" + yaml.safe_dump(config))
    card = model_card(tmp_path / "mine", str(source), False, 1)
    front, recipe, text = parts_of(card)
    assert front["base_model"] == "someone/tiny"
    assert front["datasets"] == ["someone/more", "someone/pairs"]
    assert front["license"] == "other" and front["license_name"] == "theirs"
    assert recipe["model"] == "someone/tiny@v1" and recipe["train_data"] == config["train_data"]
    assert "\nranks: 16\n" in text
    assert "held-out" not in text and 'model("Hello"' in text


def test_the_citation_is_that_of_the_repository():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    title, authors = (re.search(f"{name} = {{(.*)", CARD)[1] for name in ("title", "author"))
    assert re.sub("[{},]", "", title) == paper["title"]
    for author in paper["authors"]:
        assert author["family-names"] in CARD, authors
