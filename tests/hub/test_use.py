"""What the Hub is for: score with a detector that lies there, from Python and from the command line."""

import textwrap

SAVED = """
    import contextlib
    import io
    import PIL.Image
    import numpy as np
    from hf_anomaly.cli import main

    def run(*argv):
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main(list(argv))
        except SystemExit as end:
            return end.code or 0, out.getvalue(), err.getvalue()
        return 0, out.getvalue(), err.getvalue()

    def picture(seed):
        return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8))
"""


def test_pipeline(hub):
    hub.run(
        SAVED
        + """
    from transformers import pipeline

    folder = finished()
    AutoModel.from_pretrained(folder).push_to_hub("org/pipeline")
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    edit("org/images", {"a.png": file.getvalue(), "b.png": b"no image"})

    there, here = (pipeline("image-anomaly-detection", model=name) for name in ("org/pipeline", str(folder)))
    assert there(picture(0)) == here(picture(0))
    url = f"{os.environ['HF_ENDPOINT']}/org/images/resolve/main"
    assert there([f"{url}/a.png"]) == [here(picture(0))]
    refused(InputError, lambda: there(f"{url}/b.png"), f"{url}/b.png", "unreadable")
    refused(InputError, lambda: there(f"{url}/c.png"), f"{url}/c.png", "404")
    """
    )


def test_push_info_and_predict(hub):
    hub.run(
        SAVED
        + """
    folder = finished()
    picture(0).save("a.png")
    status, out, err = run("push", str(folder), "org/command", "--private", "--git-tag", "v1")
    assert status == 0, err
    assert "org/command" in out and titles("org/command") == ["Upload model", "initial commit"]
    assert api.model_info("org/command").private
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "dissolver/dissolver_config.json"} <= files("org/command", "v1")
    assert not [name for name in files("org/command") if "checkpoint" in name]

    status, out, err = run("info", "org/command", "--revision", "v1")
    assert status == 0 and "AUROC 0.8765" in out and "on 39 held-out normal images" in out, out + err
    (there, here) = (run("predict", name, "a.png") for name in ("org/command", str(folder)))
    assert there[0] == 0 and there[1] == here[1], there
    status, out, err = run("evaluate", "org/command", "--dataset_name", "digits", "--protocol", "balanced", "--seed", "4")
    assert status == 2 and "org/command was trained with --seed 0" in err, err
    status, out, err = run("dissolve", "org/command", "a.png")
    assert status == 0 and Path("dissolved.png").is_file(), err

    wrong = {
        "other/x": ["push", str(folder), "other/x"],
        "org/none": ["info", "org/none"],
        "org/nobody": ["predict", "org/nobody", "a.png"],
        "org/no-images": ["predict", "org/command", "org/no-images"],
    }
    for name, argv in wrong.items():
        status, out, err = run(*argv)
        error = err.splitlines()[-1]
        assert status == 2 and error.startswith("error: ") and name in error, (argv, err)
    """
    )


def test_offline_from_the_cache(hub):
    """What was used once is used again without the network: the pipeline and every command that reads."""
    use = """
    from transformers import pipeline

    os.chdir(HERE)
    told = pipeline("image-anomaly-detection", model="org/offline")(picture(0))
    commands = (("predict", "org/offline", "a.png"), ("info", "org/offline"), ("dissolve", "org/offline", "a.png"))
    outcome = [told, *([status, out] for status, out, err in (run(*argv) for argv in commands))]
    """
    line = f"\n    HERE = {str(hub.home)!r}\n"
    hub.run(
        SAVED
        + line
        + """
    AutoModel.from_pretrained(finished()).push_to_hub("org/offline")
    picture(0).save(Path(HERE, "a.png"))
    """
        + use
        + """
    assert [status for status, _ in outcome[1:]] == [0, 0, 0], outcome
    Path(HERE, "outcome.json").write_text(json.dumps(outcome))
    """
    )
    offline = """
    assert outcome == json.loads(Path(HERE, "outcome.json").read_text()), outcome
    status, out, err = run("info", "org/never-seen")
    assert status == 2 and "org/never-seen" in err.splitlines()[-1], err
    print("done")
    """
    script = textwrap.dedent(SAVED + line + use + offline)
    assert hub.run_fresh(script, prelude=True, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=None).endswith("done\n")


def test_predict_from_a_private_repository(hub):
    hub.run(
        SAVED
        + """
    folder = finished()
    picture(0).save("a.png")
    AutoModel.from_pretrained(folder).push_to_hub("org/secret", private=True)
    token = os.environ.pop("HF_TOKEN")
    for argv in (("predict", "org/secret", "a.png"), ("info", "org/secret"), ("dissolve", "org/secret", "a.png")):
        status, out, err = run(*argv)
        assert status == 2 and not out, (argv, out)
        error = err.splitlines()[-1]
        assert error.startswith("error: ") and "org/secret" in error and "private" in error and "hf auth login" in error, (argv, error)
    os.environ["HF_TOKEN"] = token
    there, here = (run("predict", name, "a.png") for name in ("org/secret", str(folder)))
    assert there[0] == 0 and there[1] == here[1], there
    """
    )
