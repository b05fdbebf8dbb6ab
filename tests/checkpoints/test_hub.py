"""What is handed to the hub, against a stub of its client."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest

from mmdefense.checkpoints.hub import HubTarget
from mmdefense.errors import BadInputError, UnsupportedError


class Api:
    """Stands in for ``huggingface_hub.HfApi``; notes its calls, and fails where it is told to."""

    calls: ClassVar[list] = []
    fails: ClassVar[str] = ""
    there: ClassVar[bool] = False

    def repo_exists(self, repo):
        return self.there

    def __getattr__(self, name):
        def call(*args, **options):
            if name == self.fails:
                raise RuntimeError(f"{name} said no\nand why")
            self.calls.append((name, args, options))
            return "https://hub.example/me/net"

        return call


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(Api, "fails", "")
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Api))
    return Api


def test_a_folder_is_uploaded_to_a_repository_that_is_private_where_it_is_new(hub, tmp_path):
    assert HubTarget("me/net").upload(tmp_path) == "https://hub.example/me/net"
    (who, made, sent) = hub.calls
    assert who[0] == "whoami"
    assert made == ("create_repo", ("me/net",), {"private": True, "exist_ok": True})
    assert sent[0] == "upload_folder"
    assert (sent[2]["repo_id"], sent[2]["folder_path"]) == ("me/net", str(tmp_path))


@pytest.mark.parametrize("repo", ["net", "me/net/x", "../net", ""])
def test_a_name_that_is_none_is_refused(hub, repo):
    with pytest.raises(BadInputError, match="OWNER/NAME"):
        HubTarget(repo)
    assert hub.calls == []


@pytest.mark.parametrize("step", ["whoami", "create_repo", "upload_folder"])
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, step):
    hub.fails = step
    with pytest.raises(BadInputError, match="said no") as caught:
        HubTarget("me/net").upload(tmp_path)
    assert "\n" not in str(caught.value)
    assert ("HF_TOKEN" in str(caught.value)) == (step == "whoami")


def test_what_is_there_already_is_not_uploaded_over(hub, monkeypatch, place, mmdefense):
    with pytest.raises(BadInputError, match="is the given model"):
        HubTarget("me/net", given="Me/Net", force=True)
    monkeypatch.setattr(hub, "there", True)
    outcome = mmdefense(*place.purify("--push-to-hub", "me/net"))
    assert outcome.code == 2
    assert "--force" in outcome.err
    assert place.files() == []
    assert HubTarget("me/net", force=True).repo == "me/net"


def test_a_missing_library_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnsupportedError, match="pip install"):
        HubTarget("me/net")


def test_the_command_pushes_what_passed_the_guard(hub, place, mmdefense):
    outcome = mmdefense(*place.purify("--push-to-hub", "me/net"))
    assert outcome.code == 0, outcome.err
    assert "pushed to https://hub.example/me/net" in outcome.out
    assert hub.calls[-1][2]["folder_path"] == str(place.out)


def test_a_login_that_is_missing_is_told_before_any_work(hub, place, mmdefense):
    hub.fails = "whoami"
    outcome = mmdefense(*place.purify("--push-to-hub", "me/net"))
    assert outcome.code == 2
    assert place.files() == []
