"""Training that pushes: the finished detector to main in one commit, checkpoints to a branch of their own, resumed from there."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TRAINER = """
    from hf_anomaly import AnomalyTrainer, AnomalyTrainingArguments, load_one_class, prepare

    splits = load_one_class("digits")
    processor = AnomalyImageProcessor.for_images(8, 1)

    def trainer(name, **settings):
        torch.manual_seed(0)
        backbone = SmallResNetConfig(hidden_sizes=[8], depths=[1])
        model = CSIModel(CSIConfig(image_size=8, projection_size=4, num_test_views=2, backbone_config=backbone))
        settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True} | settings
        args = AnomalyTrainingArguments(output_dir=name, use_cpu=True, push_to_hub=True, hub_model_id=f"org/{name}", **settings)
        normals = splits.train.select(range(16))
        return AnomalyTrainer(
            model, args, train_dataset=prepare(normals, processor), calibration_dataset=prepare(splits.calibration.select(range(19)), processor),
            processing_class=processor,
        )
"""


def test_strategies(hub):
    hub.run(
        TRAINER
        + """
    paths = {
        "end": None,
        "every_save": {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_hf_anomaly.py"},
        "checkpoint": {"last-checkpoint/trainer_state.json", "last-checkpoint/model.safetensors", "last-checkpoint/optimizer.pt"},
        "all_checkpoints": {"checkpoint-2/trainer_state.json", "checkpoint-4/trainer_state.json"},
    }
    for strategy, expected in paths.items():
        repo_id = f"org/{strategy}"
        t = trainer(strategy, hub_strategy=strategy, hub_private_repo=True)
        t.train()
        assert titles(repo_id) == ["initial commit"], titles(repo_id)  # no reader sees an unfinished detector
        branches = {branch.name for branch in api.list_repo_refs(repo_id).branches}
        assert branches == ({"main"} if expected is None else {"main", "training"})
        if expected is not None:
            there = files(repo_id, "training")
            assert titles(repo_id, "training")[:2] == ["Training in progress, step 4", "Training in progress, step 2"]
            assert there >= expected if "checkpoint" in strategy else there == expected, there
        refused(RuntimeError, t.push_to_hub, "fit_reference")
        t.fit_reference()
        t.calibrate()
        t.push_to_hub()
        assert titles(repo_id) == ["End of training", "initial commit"]
        assert files(repo_id) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "modeling_hf_anomaly.py"}
        assert api.model_info(repo_id).private
        assert torch.equal(scores(AutoModel.from_pretrained(repo_id)), scores(t.model.eval()))
    # A checkpoint from the branch continues the run, to the same end.
    checkpoint = Path(api.snapshot_download("org/all_checkpoints", revision="training"), "checkpoint-2")
    resumed = trainer("resumed")
    resumed.train(str(checkpoint))
    resumed.fit_reference()
    resumed.calibrate()
    assert torch.equal(scores(resumed.model.eval()), scores(t.model.eval()))
    """
    )


def test_a_push_that_fails_does_not_end_the_training(hub):
    hub.run(
        TRAINER
        + """
    t = trainer("failing", hub_strategy="checkpoint")
    fault("POST", "/commit/", status=403)
    t.train()
    assert titles("org/failing", "training")[:-1] == ["Training in progress, step 4"]
    refused(InputError, lambda: t.fit_reference() or t.push_to_hub(blocking=False), "blocking")
    refused(HubError, lambda: trainer("refused", hub_token="hf_wrong"), "org/refused", "hf auth login")
    """
    )


SCRIPT = """
    import runpy
    import sys

    def script(name, *options):
        sys.argv = [name, "--disable_tqdm=true", "--report_to=none", "--use_cpu=true", "--output_dir=run", "--push_to_hub=true", *options]
        try:
            runpy.run_path(f"SCRIPTS/{name}", run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0
""".replace("SCRIPTS", str(ROOT / "scripts"))
DETECTOR = {"README.md", "config.json", "eval_results.json", "model.safetensors", "modeling_hf_anomaly.py", "preprocessor_config.json"}
PRETRAINED = DETECTOR - {"eval_results.json"} | {"pretraining.json"}
NETWORKS = {"scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
SCRIPTS = {
    "train_shared_ae.py": (["--max_steps=2", "--hidden_sizes", "4", "4", "4", "--latent_size=4"], DETECTOR),
    "train_addp.py": (
        ["--max_steps=2", "--pretrain_steps=2", "--hidden_sizes", "4", "4"],
        DETECTOR | {f"pretrained/{name}" for name in PRETRAINED},
    ),
    "train_dia.py": (["--max_steps=2", "--dissolver=gaussian", "--dissolved_variants=1"], DETECTOR | {"dissolver/dissolver_config.json"}),
    "train_dissolver.py": (
        ["--max_steps=2", "--block_out_channels", "8", "8"],
        NETWORKS | {"README.md", "dissolver_config.json", "model_index.json"},
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(hub, name):
    repo_id, (options, expected) = f"org/{name.removesuffix('.py')}", SCRIPTS[name]
    options = [name, *options, f"--hub_model_id={repo_id}", "--hub_revision=next", "--save_strategy=no"]
    hub.run(
        SCRIPT
        + f"""
    assert script(*{options}) == 0
    """
    )
    repository = hub.state.repositories[repo_id]
    there = hub.state.files(repo_id, "next")
    assert there.keys() == expected
    assert [commit.title for commit in repository.history("next")] == ["End of training", "initial commit"]
    if "README.md" in there:
        card = there["README.md"].decode()
        assert f'.from_pretrained("{repo_id}")' in card
        assert ("AUROC" if expected >= DETECTOR else "normal images of `digits`, normal class `0`; 2 steps of") in card
        assert "hf_test" not in card


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_may_not_push_says_so_before_it_trains(hub, name):
    options = [name, "--max_steps=2", "--hub_model_id=other/x"]
    output = hub.run(
        SCRIPT
        + f"""
    assert script(*{options}) == 2
    assert not list(Path("run").rglob("*.safetensors"))
    """
    )
    (error,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "write permission" in error


def test_a_first_stage_alone_is_pushed_and_gone_on_with(hub):
    size = ["--hidden_sizes", "4", "4", "--pretrain_steps=2", "--pretrain_dataset_name=digits", "--normal_label=0"]
    hub.run(
        SCRIPT
        + f"""
    assert script("train_addp.py", "--pretrain_only=true", "--hub_model_id=org/denoiser", *{size}) == 0
    """
    )
    assert hub.state.files("org/denoiser", "main").keys() == PRETRAINED
    card = hub.state.files("org/denoiser", "main")["README.md"].decode()
    assert "# org/denoiser" in card
    assert "1409 images of `digits`" in card
    hub.run(
        SCRIPT
        + """
    from hf_anomaly import ADDPForPreTraining, ADDPModel

    weights = ADDPForPreTraining.from_pretrained("org/denoiser").state_dict()
    options = "--pretrained=org/denoiser --normal_label=1 --image_size=12 --hub_model_id=org/ones --learning_rate=1e-12 --ema_decay=0 --max_steps=2"
    assert script("train_addp.py", *options.split()) == 0
    detector = ADDPModel.from_pretrained("org/ones")
    assert detector.config.image_size == 12 and detector.is_fitted
    for name, value in detector.named_parameters():
        torch.testing.assert_close(value, weights[name])
    """
    )
