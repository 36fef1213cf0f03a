"""What a published folder promises of its files is held to when it loads."""

import hashlib

import pytest

from iomm_hf.integrity import CHECKSUMS, INDEX, check_files


def test_files_in_folders_of_a_part_are_compared_too(tmp_path):
    names = [INDEX, "processor/config.json", "processor/additional_chat_templates/tools.jinja"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    sums = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}" for name in names]
    (tmp_path / CHECKSUMS).write_text("\n".join(sums) + "\n\n")  # an empty line names no file
    check_files(tmp_path, ["processor"])
    (tmp_path / names[2]).write_text("altered")
    with pytest.raises(OSError, match="tools.jinja is not the file that was published"):
        check_files(tmp_path, ["processor"])
    check_files(tmp_path, [])  # what is not read may be missing
