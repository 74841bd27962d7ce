import json
from dataclasses import asdict

import pytest

from thalweg.lab.runs.environment import _commit, current_environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / ".git/refs/heads").mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    return tmp_path


def test_the_environment_is_json_and_names_versions_and_hardware():
    found = json.loads(json.dumps(asdict(current_environment())))
    assert {"thalweg", "python", "torch", "numpy", "scipy"} <= set(found["versions"])
    assert {"processor", "cores"} <= set(found["hardware"])


def test_the_commit_is_read_from_a_branch(checkout):
    (checkout / ".git/refs/heads/main").write_text(f"{COMMIT}\n")
    assert _commit(checkout) == COMMIT


def test_the_commit_is_read_from_packed_references(checkout):
    (checkout / ".git/packed-refs").write_text(f"# packed\n{'f' * 40} refs/heads/old\n{COMMIT} refs/heads/main\n")
    assert _commit(checkout) == COMMIT


def test_the_commit_is_read_from_a_detached_head(checkout):
    (checkout / ".git/HEAD").write_text(f"{COMMIT}\n")
    assert _commit(checkout) == COMMIT


def test_the_commit_is_read_from_a_linked_work_tree(checkout, tmp_path):
    (checkout / ".git/refs/heads/topic").write_text(f"{COMMIT}\n")
    linked = checkout / ".git/worktrees/topic"
    linked.mkdir(parents=True)
    (linked / "HEAD").write_text("ref: refs/heads/topic\n")
    (linked / "commondir").write_text("../..\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / ".git").write_text(f"gitdir: {linked}\n")
    assert _commit(tree) == COMMIT


def test_without_a_checkout_or_a_commit_there_is_none(checkout, tmp_path):
    assert _commit(checkout) is None
    assert _commit(tmp_path / "nowhere") is None
