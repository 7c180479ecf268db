"""Pushing, through the real client: one commit, whole, over whatever goes wrong; and a person's words stay."""

WHOLE = {
    "README.md",
    "config.json",
    "dissolver/dissolver_config.json",
    "eval_results.json",
    "model.safetensors",
    "modeling_hf_anomaly.py",
    "preprocessor_config.json",
}


def test_one_commit_holds_all(hub):
    hub.run(f"""
        WHOLE = {WHOLE}
        model = AutoModel.from_pretrained(finished())
        url = model.push_to_hub("org/whole", commit_message="First", tags=["mine"], git_tag="v1")
        assert "org/whole/commit/" in url, url
        assert files("org/whole") - {{".gitattributes"}} == WHOLE, files("org/whole")
        assert titles("org/whole") == ["First", "initial commit"]
        card = text("org/whole")
        assert 'AutoModel.from_pretrained("org/whole")' in card and "0.8765" in card and "- mine" in card, card
        assert not api.model_info("org/whole").private
        # Nothing new: no commit. Another detector on a branch, which is made; main stays; the tag stays.
        model.push_to_hub("org/whole", tags=["mine"])
        assert len(titles("org/whole")) == 2, changed("org/whole")
        detector(1).push_to_hub("org/whole", revision="next", commit_message="Second")
        assert titles("org/whole", "next")[0] == "Second" and len(titles("org/whole")) == 2
        # What belongs to the old detector does not stay with the new one.
        assert files("org/whole", "next") >= {{"model.safetensors", "README.md"}}
        assert files("org/whole", "next").isdisjoint({{"dissolver/dissolver_config.json", "eval_results.json"}})
        assert "0.8765" not in text("org/whole", revision="next")
        first, second, tagged = (scores(AutoModel.from_pretrained("org/whole", revision=r)) for r in ("main", "next", "v1"))
        assert torch.equal(first, scores(detector())) and torch.equal(second, scores(detector(1))) and torch.equal(tagged, first)
    """)


def test_files_of_others_stay(hub):
    hub.run("""
        theirs = {"models/other.safetensors", "model_v0/a.safetensors", "notes/eval_results.json"}
        edit("org/shared", {name: b"theirs" for name in [*theirs, "model-00001-of-00002.safetensors", "dissolver/unet/config.json"]})
        detector().push_to_hub("org/shared", tags="mine")
        assert files("org/shared") == theirs | {"README.md", "config.json", "model.safetensors", "modeling_hf_anomaly.py"}, files("org/shared")
        assert "\\n- mine\\n" in text("org/shared")
    """)


def test_nothing_is_published_that_is_no_part_of_the_model(hub):
    output = hub.run(f"""
        from hf_anomaly.cli import main

        WHOLE = {WHOLE}
        folder = finished()
        stray = [".env", "config.json.orig", "scores.csv", "model_of_patient.safetensors", "training_args.json"]
        stray += ["patients/a.png", "overlays/b/c.png", "patients/config.json", "figures/notes.txt", "figures/patients/a.png", "dissolver/a.png"]
        parts = ["LICENSE", "modeling_own.py", "figures/roc.png"]
        parts += [f"pretrained/{{name}}" for name in ("config.json", "model-00001-of-00002.safetensors", "pretraining.json")]
        for name in stray + parts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("")
        (folder / "outside").symlink_to("/etc")  # what is not pushed may lie anywhere
        main(["push", str(folder), "org/clean"])
        assert files("org/clean") == WHOLE | set(parts), files("org/clean")
        AutoModel.from_pretrained(folder).push_to_hub("org/clean-too")
        assert files("org/clean-too") == WHOLE | {{"figures/roc.png"}}, files("org/clean-too")
    """)
    (line,) = [line for line in output.splitlines() if "not pushed" in line]
    named = ".env, checkpoint-3/, config.json.orig, dissolver/a.png, figures/notes.txt, figures/patients/, model_of_patient.safetensors, outside/,"
    assert line == f"INFO: org/clean: not pushed, as no part of the model: {named} overlays/, patients/ and 2 more"


def test_private_pull_request_shards_and_save_pretrained(hub):
    hub.run(f"""
        WHOLE = {WHOLE}
        model = AutoModel.from_pretrained(finished())
        model.save_pretrained("elsewhere", push_to_hub=True, repo_id="org/secret", private=True, commit_message="Saved")
        assert titles("org/secret") == ["Saved", "initial commit"] and files("org/secret") == WHOLE == {{
            path.relative_to("elsewhere").as_posix() for path in Path("elsewhere").rglob("*") if path.is_file()
        }}
        assert api.model_info("org/secret").private
        assert not HfApi(token=False).repo_exists("org/secret")
        # A pull request, from somebody who may not write.
        model.push_to_hub("org/open")
        detector(1).push_to_hub("org/open", token="hf_guest", create_pr=True, commit_message="Proposal")
        assert len(titles("org/open")) == 2
        assert titles("org/open", "refs/pr/1")[0] == "Proposal"
        assert torch.equal(scores(AutoModel.from_pretrained("org/open", revision="refs/pr/1")), scores(detector(1)))
        # Shards, and back to one file: nothing of the earlier save stays to be loaded.
        for settings, count in (({{"max_shard_size": "2KB"}}, 3), ({{}}, 1)):
            model = detector(count)
            model.push_to_hub("org/open", **settings)
            weights = [name for name in files("org/open") if name.endswith(".safetensors")]
            assert (len(weights) == 1) == (count == 1), weights
            assert torch.equal(scores(AutoModel.from_pretrained("org/open")), scores(model))
        # Saved in a folder named like the repository, in one's own namespace.
        detector().save_pretrained("folder", push_to_hub=True)
        assert "config.json" in files("tester/folder")
    """)


def test_a_pipeline_and_a_processor(hub):
    hub.run(f"""
        from transformers import pipeline

        WHOLE = {WHOLE}
        AutoModel.from_pretrained(finished()).push_to_hub("org/piped")
        pipe = pipeline("image-anomaly-detection", model=str(finished("another")))
        pipe.image_processor.window = "full"
        pipe.push_to_hub("org/piped", commit_message="Piped", private=True)
        assert titles("org/piped")[0] == "Piped" and files("org/piped") == WHOLE, (titles("org/piped"), files("org/piped"))
        assert "0.8765" in text("org/piped") and "library_name: hf-anomaly" in text("org/piped")
        assert '"window": "full"' in text("org/piped", "preprocessor_config.json")
        refused(TypeError, lambda: pipe.push_to_hub("org/piped", privat=True), "privat")
        # Of a detector and a processor that lie nowhere.
        pipe = pipeline("image-anomaly-detection", model=detector(), image_processor=pipe.image_processor)
        pipe.save_pretrained("piped", push_to_hub=True, repo_id="org/saved-pipe")
        assert files("org/saved-pipe") == {{"README.md", "config.json", "model.safetensors", "modeling_hf_anomaly.py", "preprocessor_config.json"}}
        assert "# saved-pipe" in text("org/saved-pipe") and '"window": "full"' in text("org/saved-pipe", "preprocessor_config.json")
        # A processor alone, with the file that its auto_map names.
        pipe.image_processor.save_pretrained("processor", push_to_hub=True, repo_id="org/processor")
        assert files("org/processor") >= {{"preprocessor_config.json", "modeling_hf_anomaly.py"}}, files("org/processor")
        pipe.image_processor.push_to_hub("org/pushed-processor")
        assert "modeling_hf_anomaly.py" in files("org/pushed-processor")
    """)


def test_a_detector_from_anywhere_is_pushed_whole(hub):
    hub.run(f"""
        WHOLE = {WHOLE}
        AutoModel.from_pretrained(finished()).push_to_hub("org/source")
        before = scores(AutoModel.from_pretrained("org/source"))
        AutoModel.from_pretrained("org/source").push_to_hub("org/from-hub")
        snapshot = api.snapshot_download("org/source")
        AutoModel.from_pretrained(snapshot).push_to_hub("org/from-cache")
        for path in (tmp / "detector").rglob("*"):
            if path.is_file() and "checkpoint" not in str(path):
                edit("org/nested", {{f"inner/{{path.relative_to(tmp / 'detector')}}": path.read_bytes()}})
        CSIModel.from_pretrained("org/nested", subfolder="inner").push_to_hub("org/from-subfolder")
        for name in ("hub", "cache", "subfolder"):
            repo_id = f"org/from-{{name}}"
            assert files(repo_id) == WHOLE, (name, files(repo_id))
            assert len(titles(repo_id)) == 2
            assert torch.equal(scores(AutoModel.from_pretrained(repo_id)), before)
            assert f'AutoModel.from_pretrained("{{repo_id}}")' in text(repo_id)
        AutoModel.from_pretrained("org/source").save_pretrained("copy")
        assert {{path.name for path in Path("copy").iterdir()}} == {{name.split("/")[0] for name in WHOLE}}
        # The state that was loaded counts, not what came after it.
        model = AutoModel.from_pretrained("org/source")
        edit("org/source", {{"README.md": b"# another"}})
        model.push_to_hub("org/pinned")
        assert "another" not in text("org/pinned")
        # A home that is gone: an error in a push, a warning when saving.
        model = AutoModel.from_pretrained("org/source", revision="main")
        fault("GET", "org/source", status=404, times=99)
        refused(HubError, lambda: model.push_to_hub("org/source-gone"), "org/source-gone")
        model.save_pretrained("alone")
        assert Path("alone/model.safetensors").exists()
    """)


def test_a_persons_words_stay(hub):
    hub.run("""
        model = AutoModel.from_pretrained(finished())
        model.push_to_hub("org/words")
        card = text("org/words").replace("# detector", "# Our detector\\n\\nAn introduction.").replace("library_name:", "license: mit\\nlibrary_name:")
        card = card.replace("tags:", "tags:\\n- ours").replace("<!-- hf-anomaly: limits -->", "## Ethics\\n\\nThink.\\n\\n<!-- hf-anomaly: limits -->")
        start, end = card.index("<!-- hf-anomaly: settings -->"), card.index("<!-- /hf-anomaly: settings -->")
        card = card[:start] + card[end + len("<!-- /hf-anomaly: settings -->"):]
        edit("org/words", {"README.md": card.encode()})

        def check(card):
            for word in ("# Our detector", "An introduction.", "license: mit", "- ours", "## Ethics", "Think.", "anomaly-detection"):
                assert card.count(word) == 1, (word, card)
            assert "Settings that differ" not in card

        # Pushed again from the folder, with new results.
        write_card(tmp / "detector", model, MEASURED | {"auroc": 0.4321})
        AutoModel.from_pretrained(tmp / "detector").push_to_hub("org/words")
        card = text("org/words")
        check(card)
        assert "0.4321" in card and "0.8765" not in card and card.count("value: 0.4321") == 1
        # Loaded, calibrated again and pushed: results go.
        model = AutoModel.from_pretrained("org/words")
        model.calibrate([images(39, 5)], progress=False)
        model.push_to_hub("org/words")
        card = text("org/words")
        check(card)
        assert "0.4321" not in card and "model-index" not in card and "calibrated again" in card
        assert "eval_results.json" not in files("org/words")
        # A card that is wholly a person's, with results of another task.
        own = "---\\nlicense: mit\\nmodel-index:\\n- name: x\\n  results:\\n  - task:\\n      type: other\\n    dataset:\\n      name: d\\n      type: d\\n"
        own += "    metrics:\\n    - type: acc\\n      value: 0.125\\n---\\n\\n# Mine\\n\\nAll of it.\\n"
        edit("org/own", {"README.md": own.encode()})
        for _ in range(2):
            AutoModel.from_pretrained(tmp / "detector").push_to_hub("org/own")
            card = text("org/own")
            for word in ("license: mit", "0.125", "value: 0.4321", "All of it.", "## How to use it", "# Mine"):
                assert card.count(word) == 1, (word, card)
        # What the website makes when one picks a license.
        edit("org/license", {"README.md": b"---\\nlicense: apache-2.0\\n---\\n"})
        AutoModel.from_pretrained(tmp / "detector").push_to_hub("org/license")
        assert "license: apache-2.0" in text("org/license") and "# detector" in text("org/license")
    """)


def test_refusals_are_one_line_with_the_remedy(hub):
    hub.run("""
        model = AutoModel.from_pretrained(finished())
        model.push_to_hub("org/mine")
        push = lambda *args, **settings: lambda: model.push_to_hub(*args, **settings)
        refused(HubError, push("org/mine", token="hf_wrong"), "org/mine", "hf auth login")
        refused(HubError, push("org/mine", token=False), "hf auth login")
        refused(HubError, push("other/mine"), "other/mine", "write permission")
        refused(HubError, push("org/mine", token="hf_guest"), "write permission")
        refused(HubError, push("org/mine", create_pr=True, revision="nowhere"), "check the name")
        refused(InputError, push("a/b/c"), "a/b/c", "organisation/name")
        model.push_to_hub("org/mine", git_tag="v1")
        refused(HubError, push("org/mine", git_tag="v1"), "another name")
        fault("POST", "/commit/", status=412)
        refused(HubError, push("org/mine", tags=["x"]), "push again")
        fault("POST", "/commit/", status=429)
        refused(HubError, push("org/mine", tags=["x"]), "wait")
        assert len(titles("org/mine")) == 2
        refused(RuntimeError, lambda: CSIModel(model.config.__class__(image_size=8)).push_to_hub("org/unfitted"), "fit_reference")
        assert not api.repo_exists("org/unfitted")
    """)


def test_trouble_on_the_way_leaves_the_old_state_or_the_new(hub):
    hub.run("""
        import hf_anomaly.hub

        hf_anomaly.hub._PAUSES = (0.1, 0.1)
        old, new = detector(), detector(1)
        old.push_to_hub("org/trouble")
        reader = lambda: scores(AutoModel.from_pretrained("org/trouble"))
        # Bursts of errors and dropped connections are met with another attempt.
        fault("POST", "/commit/", status=503)
        fault("POST", "lfs/objects/batch", status=500)
        fault("PUT", "/lfs/", drop_after=100)
        new.push_to_hub("org/trouble")
        assert len(titles("org/trouble")) == 3
        assert torch.equal(reader(), scores(new))
        # A commit whose answer is lost was made; the next attempt sees it and makes no second one.
        fault("POST", "/commit/", drop_after=20)
        fault("GET", "/resolve/", delay=1.0)
        old.push_to_hub("org/trouble")
        assert len(titles("org/trouble")) == 4
        fault("POST", "/validate-yaml", status=502, page=True)
        new.push_to_hub("org/trouble")
        fault("POST", "/validate-yaml", status=502, page=True, times=9)
        refused(HubError, lambda: old.push_to_hub("org/trouble"), "org/trouble", "out of order")
        call("/_mend", {})
        old.push_to_hub("org/trouble")
        assert len(titles("org/trouble")) == 6
        # Trouble without end: one line, and readers have what was there.
        fault("POST", "/commit/", status=503, times=9)
        refused(HubError, lambda: new.push_to_hub("org/trouble"), "out of order (503)")
        assert torch.equal(reader(), scores(old))
    """)


def test_the_network_is_down(hub):
    hub.run("""
        from huggingface_hub import constants

        model = detector()
        constants.HF_HUB_OFFLINE = True
        refused(HubError, lambda: model.push_to_hub("org/x"), "org/x", "cannot be reached", "OFFLINE")
        constants.HF_HUB_OFFLINE, constants.ENDPOINT = False, "http://127.0.0.1:9"
        for settings in ({}, {"create_pr": True}, {"revision": "next"}):
            refused(HubError, lambda: model.push_to_hub("org/x", **settings), "org/x", "cannot be reached", "check the network")
    """)


def test_a_dissolver_of_its_own(hub):
    hub.run("""
        from diffusers import DDPMPipeline, UNet2DModel
        from hf_anomaly import DiffusionDissolver, Dissolver
        from hf_anomaly.dissolving import build_scheduler, build_unet

        torch.manual_seed(0)
        dissolver = DiffusionDissolver(build_unet(8, 1, (8, 16)), build_scheduler(), 20, 90)
        run = {"dataset": "x.npz", "normal_label": "good"}
        dissolver.training_notes = {"steps": 7, "batch_size": 4, "num_images": 40, "seed": 3, "max_timestep": 180, "run": run}
        dissolver.push_to_hub("org/dissolves", git_tag="v1", private=True)
        assert titles("org/dissolves") == ["Upload DiffusionDissolver", "initial commit"] and api.model_info("org/dissolves").private
        networks = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
        assert files("org/dissolves", "v1") == networks | {"README.md", "dissolver_config.json", "model_index.json"}
        card = text("org/dissolves")
        for words in ("library_name: diffusers", "- dissolver", "40 normal images of `x.npz`, normal class `good`; 7 steps of 4 images, seed 3", "below 180",
                      'Dissolver.from_pretrained("org/dissolves")', 'DDPMPipeline.from_pretrained("org/dissolves")', "timesteps 20 to 90", "8×8 pixels"):
            assert words in card, (words, card)
        # Bit for bit, by the card's own lines.
        pixel_values, steps = images(5), torch.full((5,), 50)
        for class_ in (Dissolver, DiffusionDissolver):
            loaded = class_.from_pretrained("org/dissolves", revision="v1")
            assert loaded.fingerprint() == dissolver.fingerprint() and loaded.training_notes == dissolver.training_notes
            assert torch.equal(loaded(pixel_values, steps), dissolver(pixel_values, steps))
        for unet in (DDPMPipeline.from_pretrained("org/dissolves").unet, UNet2DModel.from_pretrained("org/dissolves", subfolder="unet")):
            for name, value in dissolver.unet.state_dict().items():
                assert torch.equal(unet.state_dict()[name], value), name
        # A person's words stay, the networks do not, when a blur comes in its place.
        edit("org/dissolves", {"README.md": card.replace("## Training", "## Thanks\\n\\nTo all.\\n\\n## Training").replace(
            "<!-- hf-anomaly: data -->", "Mine.\\n\\n<!-- hf-anomaly: data -->").encode()})
        GaussianDissolver(3).push_to_hub("org/dissolves")
        assert files("org/dissolves") == {"README.md", "dissolver_config.json"}
        assert Dissolver.from_pretrained("org/dissolves").fingerprint() == GaussianDissolver(3).fingerprint()
        assert "Mine." in text("org/dissolves") and "DDPMPipeline" not in text("org/dissolves")
        refused(HubError, lambda: dissolver.push_to_hub("other/x"), "other/x", "write permission")
    """)
