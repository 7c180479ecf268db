"""A Space of a detector's page, through the real client."""


def test_a_space_in_one_commit(hub):
    hub.run("""
        from hf_anomaly.demo import make_space
        AutoModel.from_pretrained(finished()).push_to_hub("org/lungs")
        made = dict(repo_type="space")
        url = make_space("org/lungs", "org/lungs", folder="space", private=True)  # a model and a Space may share a name
        assert "spaces/org/lungs/commit/" in url, url
        three = {"app.py", "requirements.txt", "README.md"}
        assert set(api.list_repo_files("org/lungs", **made)) == three == {path.name for path in Path("space").iterdir()}
        assert [commit.title for commit in api.list_repo_commits("org/lungs", **made)] == ["Demo of org/lungs", "initial commit"]
        assert api.space_info("org/lungs").private and not api.model_info("org/lungs").private
        assert "model.safetensors" in files("org/lungs")
        for name in three:
            assert Path(api.hf_hub_download("org/lungs", name, **made)).read_bytes() == Path("space", name).read_bytes()
        # Made again for another: its files are written anew, others stay.
        edit("spaces/org/lungs", {"notes.txt": b"mine", "figures/own.svg": b"mine", "README.md": b"# old"})
        AutoModel.from_pretrained(finished("other", 1)).push_to_hub("org/skin", git_tag="v1")
        make_space("org/skin", "org/lungs", revision="v1")
        assert set(api.list_repo_files("org/lungs", **made)) == three | {"notes.txt", "figures/own.svg"}
        now = {name: Path(api.hf_hub_download("org/lungs", name, **made)).read_text() for name in three}
        assert "run_demo('org/skin', revision='v1')" in now["app.py"] and "# old" not in now["README.md"]
        refused(HubError, lambda: make_space("org/skni", "org/new", folder="new"), "org/skni", "check the name")
        assert not Path("new").exists()
        assert not api.repo_exists("org/new", **made)
    """)


def test_the_dissolver_of_a_detector_on_the_hub(hub):
    hub.run("""
        from hf_anomaly.demo import make_space
        from hf_anomaly.demo.serving import load_dissolver
        AutoModel.from_pretrained(finished()).push_to_hub("org/with")
        AutoModel.from_pretrained(finished("without", dissolver=False)).push_to_hub("org/without")
        assert load_dissolver("org/with").kind == "gaussian"
        assert load_dissolver("org/without") is None
        refused(HubError, lambda: load_dissolver("org/nowhere"), "org/nowhere")
        AutoModel.from_pretrained(finished("gated")).push_to_hub("org/gated")
        for load in (load_dissolver, lambda name: make_space(name, "org/page")):
            fault("GET", "org/gated", status=403, times=9)
            refused(HubError, lambda: load("org/gated"), "org/gated", "ask for access")
    """)
