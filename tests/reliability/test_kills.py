"""kill -9 at any instant, then the same command: the final weights are, byte for byte, those of a run never killed."""

import signal
from pathlib import Path

import pytest

from tests.helpers import kill_run, naive_save
from tests.helpers.kill_run import Command, exit_code, final_files, kill_again_and_again, output, wait_for_a_save
from tests.helpers.tiny import tiny_yaml

KILLS = 20
IN_A_SAVE = 5  # at least so many of them leave a half-made checkpoint behind
LAST = 18  # steps, a checkpoint after every third


def command_in(folder: Path) -> Command:
    """The command that a user types, for a run folder of its own."""
    config = tiny_yaml(folder, tokens__train_steps=LAST, checkpoints__checkpoint_interval=3)
    return Command(kill_run.pentode, lambda root: ["train", str(config), f"checkpoints.checkpoints_path={root}"])


def test_twenty_kills_change_no_byte(tmp_path: Path) -> None:
    command = command_in(tmp_path)
    assert command.run(tmp_path / "unkilled") == 0, output(tmp_path / "unkilled")
    expected = final_files(tmp_path / "unkilled")
    campaign = kill_again_and_again(command, tmp_path, kills=KILLS, in_a_save=IN_A_SAVE, seed=7)
    print(f"{campaign.kills} kills, {campaign.in_a_save} in a save, {len(campaign.completed)} runs")
    for root in campaign.completed:
        assert final_files(root) == expected, f"{root} differs:\n{output(root)}"
        assert final_files(root, "optimizer-*.safetensors") == final_files(
            tmp_path / "unkilled", "optimizer-*.safetensors"
        )
        assert [path.name for path in root.glob(".tmp-*") if "latest" not in path.name] == []


def test_a_naive_save_does_not_survive_the_same_kill(tmp_path: Path) -> None:
    careful = command_in(tmp_path)
    command = Command(naive_save.with_naive_save, lambda root: [careful.target, *careful.arguments_of(root)])
    assert command.run(tmp_path / "unkilled") == 0, output(tmp_path / "unkilled")
    (tmp_path / naive_save.HOLD).touch()
    process = command.start(tmp_path / "killed")
    wait_for_a_save(process, tmp_path / "killed")
    process.kill()
    assert exit_code(process) == -signal.SIGKILL, output(tmp_path / "killed")
    (tmp_path / naive_save.HOLD).unlink()
    code = command.run(tmp_path / "killed")
    assert code != 0 or final_files(tmp_path / "killed") != final_files(tmp_path / "unkilled")


def test_a_run_that_goes_wrong_by_itself_is_not_taken_for_a_killed_one(tmp_path: Path) -> None:
    command = Command(kill_run.pentode, lambda root: ["train", str(root / "missing.yaml")])
    with pytest.raises(AssertionError):
        kill_again_and_again(command, tmp_path, kills=1, in_a_save=0, seed=0)
